"""How fast prompts are read: tokens per second by a prompt's length, of ours with each kind of weights, of transformers and of
llama.cpp. A prompt is read to the end, and its first token chosen; nothing of the one before is kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import alternate, console, header, save
from flags import about, positive
from llama_cpp import KINDS, LlamaCpp, check_named, gguf_of, running
from prompts import PROMPTS
from rich.table import Table
from variants import check_known, numbers, words

from sirius_ext import Engine, SiriusConfig
from sirius_ext.engine import prepare, release
from sirius_ext.loading import DEFAULT_MODEL, WEIGHTS
from sirius_ext.models.hub import parse_dtype


def ours(engine: Engine, ids: torch.Tensor) -> float:
    """Tokens per second of a prompt, int64 [1, t]."""
    prepare(engine.model).caches.clear()
    (prompt,) = engine.generate(ids, max_new_tokens=1, do_sample=False).stats.prompts
    if prompt.reused_tokens or not prompt.prefill_seconds:
        raise RuntimeError(f"expected a prompt that was read whole, got {prompt.reused_tokens} tokens of an earlier one")
    return ids.shape[1] / prompt.prefill_seconds


def transformers(engine: Engine, ids: torch.Tensor) -> float:
    """The same by the model as `transformers` loaded it."""
    release(engine.model)
    started = time.perf_counter()
    with torch.inference_mode():
        engine.model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
    return ids.shape[1] / (time.perf_counter() - started)


def llama_cpp(process: LlamaCpp, ids: torch.Tensor) -> float:
    """The same by llama.cpp."""
    return ids.shape[1] / process.generate(ids[0].tolist(), 1)["prompt_seconds"]


def contestants(
    options: argparse.Namespace, engines: dict[str, Engine], processes: dict[str, LlamaCpp]
) -> dict[str, Callable[[torch.Tensor], float]]:
    """By name: what reads a prompt."""
    found: dict[str, Callable[[torch.Tensor], float]] = {}
    if "transformers" not in options.skip and "plain" in engines:
        found["transformers"] = lambda ids: transformers(engines["plain"], ids)
    for weights, engine in engines.items():
        found[f"ours, {weights}"] = lambda ids, engine=engine: ours(engine, ids)
    for kind, process in processes.items():
        found[f"llama.cpp, {kind}"] = lambda ids, process=process: llama_cpp(process, ids)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with the reason for what cannot be run."""
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--gguf", type=Path, help="the same model as GGUF, for llama.cpp (known for the default model)")
    parser.add_argument("--llama-types", type=words, default="own", help=f"of {', '.join(KINDS)}; own is the file as it is")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", type=words, default=",".join(WEIGHTS), help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--lengths", type=numbers(int), default="64,256,1024,2048", help="of prompts, in tokens")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--skip", type=words, default="", help="of transformers, llama.cpp")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    try:
        check_named(options)
        check_known("weights", options.weights, WEIGHTS)
        check_known("skip", options.skip, ("", "transformers", "llama.cpp"))
        if not options.lengths or min(options.lengths) < 1:
            raise ValueError(f"lengths: expected numbers of tokens, got {options.lengths}")
        parse_dtype(options.dtype)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    header()
    engines = {
        weights: Engine.from_pretrained(
            options.model, SiriusConfig(mode="full"), dtype=parse_dtype(options.dtype), weights=weights, device="cpu"
        )
        for weights in options.weights
    }
    text = next(iter(engines.values())).tokenizer("\n\n".join(PROMPTS.values()), return_tensors="pt").input_ids
    text = text.repeat(1, -(-max(options.lengths) // text.shape[1]))
    results = []
    with running(gguf_of(options), options.llama_types, torch.get_num_threads()) as processes:
        found = contestants(options, engines, processes)
        table = Table("prompt", *found, title=f"{options.model}, {options.dtype}: tokens of a prompt per second")
        for length in options.lengths:
            variants = {name: lambda read=read, ids=text[:, :length]: read(ids) for name, read in found.items()}
            for warm_up in variants.values():
                warm_up()
            rates = alternate(variants, options.rounds, f"prompts of {length} tokens")
            table.add_row(str(length), *(f"{rates[name]:.0f}" for name in found))
            results += [{"variant": name, "length": length, "tokens_per_second": rate} for name, rate in rates.items()]
    console.print(table)
    about = {"benchmark": "prefill", "model": str(options.model), "dtype": options.dtype, "rounds": options.rounds}
    save(options.out, {**about, "results": results})


if __name__ == "__main__":
    main()
