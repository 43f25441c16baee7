"""The command line: `python -m sirius_ext generate | chat | serve | calibrate | prepare | eval | report | study | analyze |
lm_eval | demo | info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path

from rich.progress import Progress

from .. import __version__
from ..config import DENSITY, SiriusConfig
from ..decoding.calibrate import calibrate
from ..decoding.stats import CostlyDrafts, Stats
from ..decoding.thresholds import check_density
from ..engine import encode, engine_of, prepare
from ..errors import reason
from . import chat, demo, evaluation, info, interrupts, serve, tiers
from .arguments import (
    Parser,
    as_option,
    check_distinct,
    check_text,
    density,
    input_text,
    not_empty,
    number,
    output_file,
    output_text,
    period,
)
from .options import DEFAULTS, TOKENS, add_command, add_mode_options, add_sampling_options, mode_config, sampling_of
from .streamer import KeepingStreamer
from .terminal import BROKEN_PIPE, Console, drop_output, flushed


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A wrong argument is one line on stderr and exit status 2, a machine that is too small status 1, an
    interrupt 130, and a reader of the output that has left 141."""
    parser = _parser()
    try:
        interrupts.raise_again()
        warnings.simplefilter("ignore", CostlyDrafts)  # `generate` says it in a line, and tables have the effective density
        with flushed():
            arguments = sys.argv[1:] if arguments is None else arguments
            check_text(arguments)
            if arguments[:1] == ["lm_eval"]:
                return evaluation.lm_eval(arguments[1:])
            options = parser.parse_args(arguments)
            parser = options.parser
            status: int = options.command(options)
            return status
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        drop_output()
        print(f"sirius_ext: error: {as_option(reason(error), parser)}", file=sys.stderr)
        return 1 if isinstance(error, (RuntimeError, MemoryError)) else 2
    except KeyboardInterrupt as stop:
        # A terminal has shown ^C, which is no line.
        print("\n" if sys.stderr.isatty() else "", "; ".join(("sirius_ext: interrupted", *stop.args)), sep="", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sirius" if Path(sys.argv[0]).stem == "sirius" else "python -m sirius_ext",
        description="Decode language models with contextual sparsity and correction.",
    )
    parser.add_argument("--version", action="version", version=f"sirius_ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = add_command(commands, "generate", _generate, "decode one prompt, streaming the text")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", type=not_empty, help="what the text goes on from")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=input_text, help="read the prompt from a UTF-8 file; - is standard input"
    )
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    add_mode_options(generate)
    add_sampling_options(generate)
    generate.add_argument("--max-new-tokens", type=TOKENS, default=256, help="length of the text at most (default: %(default)s)")
    generate.add_argument(
        "--stop", metavar="STRING", type=not_empty, action="append", help="end the text after this; may be given again"
    )
    generate.add_argument(
        "--json",
        metavar="FILE",
        type=output_text,
        help="write config, text, token ids and stats; - is standard output, and the text goes to standard error",
    )

    chat.add(commands)
    serve.add(commands)

    calibration = add_command(commands, "calibrate", _calibrate, "thresholds for fsparse, from a text")
    calibration.description = (
        "Per-layer thresholds for --sparsity fsparse. The last fifth of the text is held back to try them on."
    )
    calibration.add_argument("--text", metavar="FILE", type=input_text, required=True, help="UTF-8; - is standard input")
    calibration.add_argument(
        "--density", type=number, default=DENSITY, help="fraction of MLP neurons to keep (default: %(default)s)"
    )
    calibration.add_argument("--out", metavar="FILE", type=output_file, required=True, help="gets the thresholds")

    tiers.add(commands)
    evaluation.add(commands)

    show = add_command(commands, "demo", _demo, "transformers, Full, CSparse and Sirius side by side")
    show.set_defaults(weights="q8")
    show.add_argument(
        "--density", type=density, default=DEFAULTS.density, help="fraction of MLP neurons kept, or auto (default: %(default)s)"
    )
    show.add_argument(
        "--period",
        type=period,
        default=DEFAULTS.period,
        help="tokens that one full pass verifies, or auto (default: %(default)s)",
    )
    purpose = "length of each text at most (default: %(default)s)"
    show.add_argument("--max-new-tokens", type=TOKENS, default=demo.MAX_NEW_TOKENS, help=purpose)

    info.add(commands)
    return parser


def _generate(options: argparse.Namespace) -> int:
    config = mode_config(options)
    sampling, generator = sampling_of(options)
    check_distinct(json=options.json, prompt_file=options.prompt_file, thresholds=getattr(options, "thresholds", None))
    prompt = options.prompt or _read("prompt_file", options.prompt_file)
    engine = engine_of(options, config)
    tokenizer = engine.tokenizer
    inputs = encode(tokenizer, prompt, options.chat)
    assert tokenizer is not None  # or `encode` has raised
    length, context = inputs["input_ids"].shape[1], prepare(engine.model).weights.context
    if length >= context:
        raise ValueError(f"prompt: it has {length} tokens; the model's context holds {context}, one for the answer")
    streamer = KeepingStreamer(tokenizer, stderr=str(options.json) == "-")

    def keep(stats: Stats | None) -> None:
        if options.json is not None:
            record = {
                "model": options.model,
                "dtype": options.dtype,
                "config": dataclasses.asdict(config) | {"thresholds": config.thresholds and str(config.thresholds)},
                "sampling": {**sampling, "seed": getattr(options, "seed", None)},
                "prompt": prompt,
                "text": tokenizer.decode(streamer.tokens, skip_special_tokens=True),
                "token_ids": streamer.tokens,
                "interrupted": stats is None,
                "stats": None if stats is None else stats.to_dict(),
            }
            text = json.dumps(record, indent=1) + "\n"
            if str(options.json) == "-":
                print(text, end="")
            else:
                options.json.write_text(text, encoding="utf-8")

    settings = {"max_new_tokens": options.max_new_tokens, "stop_strings": options.stop, "generator": generator, **sampling}
    try:
        stats = engine.generate(inputs["input_ids"], inputs["attention_mask"], streamer=streamer, **settings).stats
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        if isinstance(stop, KeyboardInterrupt):
            streamer.end()  # type: ignore[no-untyped-call]  # prints what it has held back; transformers has no types for it
        keep(None)
        raise
    assert stats is not None
    print(summary(stats), file=sys.stderr)
    for line in filter(None, (stats.advice, stats.abstained)):
        print(f"sirius_ext: {line}", file=sys.stderr)
    keep(stats)
    return 0


def summary(stats: Stats) -> str:
    """One line on a call: tokens, speed, and what the correction did."""
    assert stats.prefill_seconds is not None and stats.decode_seconds is not None  # only texts side by side have no times
    seconds = stats.prefill_seconds + stats.decode_seconds
    parts = [
        f"{stats.tokens} tokens in {seconds:.2f} s (prefill {stats.prefill_seconds:.2f} s), {stats.ms_per_token:.1f} ms/token"
    ]
    if stats.average_advance_length is not None:
        of = "" if stats.period == "auto" else f" of {stats.period}"
        nodes = f", {stats.drafted_nodes:.1f} drafted" if stats.tree_width > 1 else ""
        parts.append(
            f"AAL {stats.average_advance_length:.2f}{of}{nodes}, effective density {stats.effective_density:.3f}, "
            f"corrected {stats.corrected_fraction:.1%}"
        )
    return "; ".join(parts)


def _read(name: str, file: Path) -> str:
    """A text that is not empty. A byte order mark at its beginning is not part of it."""
    if str(file) == "-":
        if sys.stdin is None:
            raise ValueError(f"{name}: standard input is closed")
        content, called = sys.stdin.buffer.read(), "standard input"
    else:
        content, called = file.read_bytes(), str(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {called} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    if not text:
        raise ValueError(f"{name}: {called} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text


def _calibrate(options: argparse.Namespace) -> int:
    check_density(options.density)
    check_distinct(text=options.text, out=options.out)
    text = _read("text", options.text)
    engine = engine_of(options, SiriusConfig(mode="full"))  # it looks at the full model alone
    if engine.tokenizer is None:
        raise ValueError("model: it has no tokenizer, so a text cannot be read")
    tokens = engine.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    model = prepare(engine.model)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=len(tokens))
        found = calibrate(model, tokens, options.density, lambda read: bar.update(task, completed=read))
    found.save(options.out)
    read, held_back = found.tokens
    print(
        f"density {options.density}: on the {held_back} of {read} tokens held back the layers keep {min(found.kept):.3f} to "
        f"{max(found.kept):.3f}, {sum(found.kept) / len(found.kept):.3f} on average; written to {options.out}"
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    config = SiriusConfig(density=options.density, period=options.period)
    packed = engine_of(options, config) if options.weights != "plain" else None
    # Beside packed weights plain ones are for the full model alone.
    alone = config if packed is None else dataclasses.replace(config, mode="full")
    plain = engine_of(argparse.Namespace(**{**vars(options), "weights": "plain"}), alone)
    return demo.run(plain, packed, options.model, options.max_new_tokens)
