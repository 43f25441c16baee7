"""Sampling: the text is distributed exactly as the full model's own samples, whatever the sparse model drafts.

usage: python examples/sampling.py [MODEL]
"""

import sys

import torch

from sirius_ext import Engine, SiriusConfig

engine = Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None, SiriusConfig(accept="sample", period=4))
inputs = engine.tokenizer("My favourite food is", return_tensors="pt")
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    out = engine.generate(**inputs, max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.9, generator=generator)
    print(f"{seed}:", engine.tokenizer.decode(out.sequences[0], skip_special_tokens=True).replace("\n", " "))
