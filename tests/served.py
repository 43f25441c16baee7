"""A tiny model that is served, and a tokenizer for it: every token is a byte or a few, so that characters lie across tokens."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import tiny
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from sirius_ext import SiriusConfig
from sirius_ext.cli.serve import listen

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
MERGED = ["th", "he", "in", "er", "Ċ Ċ"]
VOCAB = 256 + len(MERGED) + len(SPECIAL)
CONTEXT = 512
NAME = "tiny"
# A fixed period, so that no costs are measured; short, so that texts have many.
CONFIG = SiriusConfig(period=4, density=0.4, accept="match")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(pair.split(" ")) if " " in pair else (pair[0], pair[1]) for pair in MERGED]
    vocab = {piece: place for place, piece in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL[0])
    found.chat_template = TEMPLATE
    return found


# What `learned` goes on with after the first words of it; each character beyond ASCII is two to four tokens.
TEXT = "In the inn: 日本語 — 🎉👩‍🔬 the thing there, é and e\u0301; ﷽ then the other thing."


def model(**config) -> transformers.PreTrainedModel:
    """A random one that says printable ASCII alone."""
    settings = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "eos_token_id": None, **config}
    made = tiny.tiny("llama3", **settings)
    names = tokenizer()
    with torch.no_grad():
        for token in range(VOCAB):
            if token >= VOCAB - len(SPECIAL) or not names.decode([token]).isascii() or not names.decode([token]).isprintable():
                made.lm_head.weight[token] = 0  # another token is always likelier
    return made


@functools.cache
def learned() -> transformers.PreTrainedModel:
    """One that knows TEXT by heart, and that it ends there."""
    made = tiny.tiny("llama3", vocab_size=VOCAB, max_position_embeddings=CONTEXT, eos_token_id=VOCAB - len(SPECIAL))
    ids = torch.tensor([[*tokenizer()(TEXT).input_ids, VOCAB - len(SPECIAL)]])
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would only wait for each other
    for _ in range(70):
        loss = made(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss < 0.3, loss
    return made.requires_grad_(False)


def save(folder: Path) -> Path:
    """A model's folder, as save_pretrained writes it."""
    model(eos_token_id=VOCAB - len(SPECIAL)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def running(scheduler, **options) -> Iterator[str]:
    """The address of a server of this process, over a real socket."""
    import uvicorn

    from sirius_ext.serving.app import Options, create_app

    app = create_app(scheduler, Options(**{"name": NAME, "max_tokens": 40, **options}))
    with listen("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
