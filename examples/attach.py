"""A script that calls `model.generate` decodes with Sirius inside `attach`, and as before after it.

usage: python examples/attach.py [MODEL]
"""

import sys

from sirius_ext import Engine, SiriusConfig, attach

# Any loaded transformers model will do; this loads one, and its tokenizer.
loaded = Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
model, tokenizer = loaded.model, loaded.tokenizer

inputs = tokenizer("The three primary colours are", return_tensors="pt")
with attach(model, SiriusConfig(period=4, accept="match")) as handle:
    sequences = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print("Sirius:      ", tokenizer.decode(sequences[0], skip_special_tokens=True))
    print(handle.stats)
print(
    "transformers:", tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0], skip_special_tokens=True)
)
