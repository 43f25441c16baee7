"""Tokens as they come: a period's are certain once the full model has verified them.

usage: python examples/streaming.py [MODEL]
"""

import sys

from transformers import TextStreamer

from sirius_ext import Engine, SiriusConfig

engine = Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None, SiriusConfig(period=4))
inputs = engine.tokenizer("Once upon a time there was a small robot who", return_tensors="pt")
streamer = TextStreamer(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
engine.generate(**inputs, max_new_tokens=48, do_sample=False, streamer=streamer)

# Or by hand: a sequence is stepped by whoever wants its tokens, and several may be alive at a time.
sequence = engine.start(inputs["input_ids"], max_new_tokens=24)
while not sequence.ended:
    step = sequence.step()
    print(engine.tokenizer.decode(step.tokens), end="|", flush=True)
print(f"\nended by {sequence.finish}")
