"""The command line: `python -m sirius_ext generate | demo | info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from transformers import TextStreamer

from . import __version__, demo, ops
from .config import ACCEPT_RULES, SiriusConfig
from .engine import GREEDY, Engine, encode
from .hub import DEFAULT_MODEL, parse_dtype
from .stats import Stats

MODES = ("full", "csparse", "sirius")
DEFAULTS = SiriusConfig()


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A wrong argument is one line on stderr and exit status 2; an interrupt is status 130."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"sirius_ext: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsirius_ext: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sirius_ext", description="Decode language models with contextual sparsity and correction."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="decode one prompt, streaming the text", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_model_options(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a UTF-8 file; - is standard input")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument("--mode", choices=MODES, default="sirius")
    generate.add_argument("--density", type=float, default=DEFAULTS.density, help="fraction of MLP neurons kept")
    generate.add_argument("--period", type=int, default=DEFAULTS.period, help="tokens that one full pass verifies")
    generate.add_argument("--threshold", type=float, default=DEFAULTS.threshold, help="least likelihood of a kept token")
    generate.add_argument("--accept", choices=ACCEPT_RULES, default=DEFAULTS.accept)
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--json", metavar="FILE", type=Path, help="write config, text, token ids and stats")
    generate.set_defaults(command=_generate)

    show = commands.add_parser(
        "demo", help="transformers, Full, CSparse and Sirius side by side", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_model_options(show)
    show.add_argument("--density", type=float, default=demo.DENSITY, help="fraction of MLP neurons kept")
    show.add_argument("--period", type=int, default=demo.PERIOD, help="tokens that one full pass verifies")
    show.add_argument("--max-new-tokens", type=int, default=demo.MAX_NEW_TOKENS)
    show.set_defaults(command=_demo)

    info = commands.add_parser("info", help="version, backends, instruction sets, devices")
    info.set_defaults(command=_info)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")


def _engine(options: argparse.Namespace, config: SiriusConfig) -> Engine:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {options.max_new_tokens}")
    return Engine.from_pretrained(options.model, config, options.device, parse_dtype(options.dtype))


def _generate(options: argparse.Namespace) -> int:
    config = SiriusConfig(
        mode="sparse" if options.mode == "csparse" else options.mode,
        density=options.density,
        period=options.period,
        threshold=options.threshold,
        accept=options.accept,
    )
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json: no folder {options.json.absolute().parent}")
    prompt = _prompt(options)
    engine = _engine(options, config)
    inputs = encode(engine.tokenizer, prompt, options.chat)
    streamer = TextStreamer(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = engine.generate(**inputs, streamer=streamer, max_new_tokens=options.max_new_tokens, **GREEDY)
    print(summary(out.stats), file=sys.stderr)
    if options.json:
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        record = {
            "model": options.model,
            "dtype": options.dtype,
            "config": dataclasses.asdict(config),
            "prompt": prompt,
            "text": engine.tokenizer.decode(tokens, skip_special_tokens=True),
            "token_ids": tokens,
            "stats": out.stats.to_dict(),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def summary(stats: Stats) -> str:
    """One line on a call: tokens, speed, and what the correction did."""
    seconds = stats.prefill_seconds + stats.decode_seconds
    parts = [
        f"{stats.tokens} tokens in {seconds:.2f} s (prefill {stats.prefill_seconds:.2f} s), {stats.ms_per_token:.1f} ms/token"
    ]
    if stats.average_advance_length is not None:
        parts.append(
            f"AAL {stats.average_advance_length:.2f} of {stats.period}, effective density {stats.effective_density:.3f}, "
            f"corrected {stats.corrected_fraction:.1%}"
        )
    return "; ".join(parts)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        prompt = options.prompt
    elif str(options.prompt_file) == "-":
        prompt = sys.stdin.read()
    else:
        try:
            prompt = options.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file: {options.prompt_file} is not UTF-8 text ({error.reason})") from error
    if not prompt:
        raise ValueError("--prompt: the prompt is empty")
    return prompt


def _demo(options: argparse.Namespace) -> int:
    config = SiriusConfig(density=options.density, period=options.period)
    return demo.run(_engine(options, config), options.model, options.max_new_tokens)


def _info(options: argparse.Namespace) -> int:
    sets = ", ".join(f"{name} (in use)" if name == ops.isa() else name for name in ops.available_isas())
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    for name, value in (
        ("sirius_ext", __version__),
        ("backends", "cpu"),
        ("instruction sets", sets),
        ("devices", ", ".join(devices)),
        ("threads", torch.get_num_threads()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("python", platform.python_version()),
    ):
        print(f"{name:17} {value}")
    return 0
