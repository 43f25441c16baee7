"""An engine: a model and how to decode with it.

usage: python examples/engine.py [MODEL]     a Hugging Face id, a folder or a GGUF file; without one, the default model
"""

import sys

from sirius_ext import Engine, SiriusConfig

engine = Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None, SiriusConfig(period=4, accept="match"))
inputs = engine.tokenizer("def fibonacci(n):", return_tensors="pt")
out = engine.generate(**inputs, max_new_tokens=48, do_sample=False)
print(engine.tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(f"\n{out.stats.average_advance_length:.2f} tokens a verification, {out.stats.ms_per_token:.1f} ms per token")
