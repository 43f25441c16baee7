"""What the commands have in common: options for a model and for decoding, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..config import ACCEPT_RULES, COLDEST, DRAFT_WEIGHTS, GREEDY, SPARSITIES, SiriusConfig
from ..decoding.thresholds import read_thresholds
from ..loading import DEFAULT_MODEL, check_threads, dtype_name, parse_memory, parse_weights
from .arguments import Commands, density, input_file, integer, integer_in, number, period, reads

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
Checked = TypeVar("Checked")
Run: TypeAlias = Callable[[], int]  # a command that is ready to run; it returns the exit status
Options: TypeAlias = "argparse._ActionsContainer"  # a parser, or a group of options in its help
Command: TypeAlias = Callable[[argparse.Namespace], Run]

DEFAULTS = SiriusConfig()
# The paper's. Answers under "auto" would depend on what passes cost on a machine: they could not be compared.
EVALUATION_PERIOD = 16
# "csparse" and "fsparse" decode with that sparse model alone.
MODE_CHOICES = ("full", *SPARSITIES, "sirius")
# And what is drawn with where they are not given.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}
TOKENS = integer_in(1, 2**31 - 1)
FIELDS = (
    "sparsity",
    "follow",
    "density",
    "thresholds",
    "period",
    "tree_width",
    "prune",
    "accept",
    "threshold",
    "draft_weights",
    "lookup",
)


def add_command(commands: Commands, name: str, command: Command, purpose: str, example: str = "") -> argparse.ArgumentParser:
    """A command that works with a model. example: arguments, which its help shows."""
    parser = commands.add_parser(name, help=purpose, epilog=f"example: %(prog)s {example}" if example else None)
    parser.set_defaults(command=command, parser=parser)
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file (default: %(default)s)")
    add_device_option(model, "auto")
    add_weights_options(model)
    add_memory_option(model)
    add("--threads", type=_threads, help="CPU threads (default: torch's, and no more than a container allows)")
    return parser


def add_device_option(parser: Options, default: str) -> None:
    purpose = "cpu, cuda, cuda:1, ...; auto is a CUDA device where there is one (default: %(default)s)"
    parser.add_argument("--device", type=_device, default=default, help=purpose)


def add_weights_options(parser: Options) -> None:
    """In which form a model's weights are wanted."""
    add = parser.add_argument
    add(
        "--dtype",
        type=_dtype,
        default="bfloat16",
        help="bfloat16, float16, float32, or auto: the checkpoint's (default: %(default)s)",
    )
    add(
        "--weights",
        type=_weights,
        default="plain",
        help="plain, or packed: q8, into eight bits, of which the sparse model reads four, or q4, into four, as a GGUF file's "
        "are (default: %(default)s)",
    )


def add_memory_option(parser: Options) -> None:
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=some_bytes,
        help="what weights and caches may take, like 6GB; of a larger model the rest is read from the disk, or to a CUDA device "
        "from host memory, whenever it is needed (default: what is free)",
    )


def add_setting(parser: Options, name: str, purpose: str, default: object = None, **how: Any) -> None:
    """An option whose value the namespace has only if it was given: a setting that nothing uses can then be refused."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(name, default=argparse.SUPPRESS, help=purpose + shown, **how)


def add_sparsity_options(parser: Options) -> None:
    purpose = "the neurons of csparse and cascade stay as the prompt chose them; without it they follow the text"
    add_setting(parser, "--no-follow", purpose, dest="follow", action="store_false")
    purpose = "what the sparse model reads of a weight: same, q4 (four bits), or auto: q4, beside plain weights if it has room"
    add_setting(parser, "--draft-weights", purpose, DEFAULTS.draft_weights, choices=DRAFT_WEIGHTS)
    add_setting(parser, "--density", "fraction of MLP neurons kept, or auto", DEFAULTS.density, type=density)
    purpose = "of `calibrate`, for fsparse: in place of a fixed number"
    add_setting(parser, "--thresholds", purpose, metavar="FILE", type=input_file)
    add_setting(parser, "--threshold", "least likelihood of a kept token", DEFAULTS.threshold, type=number)


def add_decoding_options(parser: Options, accept: str = DEFAULTS.accept, period_default: int | str = DEFAULTS.period) -> None:
    """accept, period_default: what is said of their defaults."""
    add_sparsity_options(parser)
    add_setting(parser, "--period", "tokens that one full pass verifies, or auto", period_default, type=period)
    add_setting(parser, "--tree-width", "branches of a draft; 1 is a chain", DEFAULTS.tree_width, type=integer)
    add_setting(parser, "--prune", "a leaf that is sure of its next token proposes no other", action="store_true")
    add_setting(parser, "--accept", "the rule by which drafted tokens are kept", accept, choices=ACCEPT_RULES)


def add_mode_options(parser: argparse.ArgumentParser) -> None:
    """How a text is decoded. What was asked for is `mode_config`."""
    group = parser.add_argument_group("decoding")
    purpose = "full and the sparse models decode alone (default: %(default)s)"
    group.add_argument("--mode", choices=MODE_CHOICES, default="sirius", help=purpose)
    add_setting(group, "--sparsity", "neurons per prompt, or per token", DEFAULTS.sparsity, choices=SPARSITIES)
    add_decoding_options(group, f"{DEFAULTS.accept}, with --sample sample")
    purpose = "copy what followed the last tokens earlier in the text: the same text in fewer passes (default: where it pays)"
    add_setting(group, "--lookup", purpose, action=argparse.BooleanOptionalAction)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn. What was asked for is `sampling_of`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    add_setting(group, "--temperature", "with --sample", SAMPLING["temperature"], type=number)
    add_setting(group, "--top-k", "with --sample; 0 is no limit", SAMPLING["top_k"], type=integer_in(0, 2**31 - 1))
    add_setting(group, "--top-p", "with --sample", SAMPLING["top_p"], type=number)
    purpose = "with --sample; the same seed gives the same text"
    add_setting(group, "--seed", purpose, type=integer_in(0, 2**64 - 1))


def mode_config(options: argparse.Namespace) -> SiriusConfig:
    """Of the options of `add_mode_options`. ValueError for settings that contradict each other."""
    by, values = f"--mode {options.mode}", {"mode": options.mode}
    if options.sample and getattr(options, "lookup", False):
        raise ValueError("lookup: not with --sample, whose tokens are drawn")
    if options.mode in SPARSITIES:
        if getattr(options, "sparsity", options.mode) != options.mode:
            raise ValueError(f"sparsity: --mode {options.mode} decodes with {options.mode} alone, got {options.sparsity}")
        values = {"mode": "sparse", "sparsity": options.mode}
    accept = getattr(options, "accept", "sample" if options.sample else DEFAULTS.accept)
    if options.mode == "sirius":
        if options.sample != (accept == "sample"):
            raise ValueError(
                "accept: sample needs --sample" if accept == "sample" else f"accept: --sample needs sample, got {accept}"
            )
        by += f" --sparsity {getattr(options, 'sparsity', DEFAULTS.sparsity)} --accept {accept}"
    # First what is used, so that no other setting is named for it.
    config = SiriusConfig(**{"sparsity": getattr(options, "sparsity", DEFAULTS.sparsity), **values}, accept=accept)
    check_used(options, config.used, by)
    return decoding_config(options, **values, accept=accept)


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """What generate takes."""
    if not options.sample:
        for name in SAMPLING:
            if hasattr(options, name):
                raise ValueError(f"{name}: it needs --sample; greedy decoding draws nothing")
        return GREEDY
    settings = {name: getattr(options, name, default) for name, default in SAMPLING.items()}
    del settings["seed"]  # it is the generator's
    if not COLDEST <= settings["temperature"] < float("inf"):
        raise ValueError(f"temperature: expected a finite number of at least {COLDEST:f}, got {settings['temperature']}")
    if not 0 < settings["top_p"] <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {settings['top_p']}")
    return {"do_sample": True, **settings}


def generator_of(options: argparse.Namespace) -> torch.Generator | None:
    """What draws, if anything does."""
    import torch

    if not options.sample:
        return None
    generator = torch.Generator()
    if (seed := getattr(options, "seed", SAMPLING["seed"])) is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def decoding_config(options: argparse.Namespace, **values: Any) -> SiriusConfig:
    """Of the settings that were given, and other values, which go before."""
    given = {name: getattr(options, name) for name in FIELDS if hasattr(options, name)}
    config = SiriusConfig(**given | values)
    if "thresholds" in given:
        read_thresholds(given["thresholds"], config.density_with())
    return config


def evaluation_config(options: argparse.Namespace) -> SiriusConfig:
    """What the modes of an evaluation have in common. Thresholds are for FSparse; `config_of` drops them for the others."""
    return decoding_config(options, sparsity="fsparse", period=getattr(options, "period", EVALUATION_PERIOD))


def check_used(options: argparse.Namespace, used: Container[str], by: str) -> None:
    """ValueError for a setting that was given and is not used: who gave it expects something else than will happen."""
    for name in FIELDS:
        if hasattr(options, name) and name not in used:
            raise ValueError(f"{name}: {by} does not use it")


@reads
def _threads(text: str) -> int:
    return _unnamed(check_threads, integer(text))


@reads
def _dtype(text: str) -> str:
    _unnamed(dtype_name, text)
    return text


@reads
def some_bytes(text: str) -> int:
    """A size that is not 0."""
    return _unnamed(parse_memory, text)


@reads
def _weights(text: str) -> str:
    return _unnamed(parse_weights, text)


def _device(text: str) -> str:
    """torch's number of a CUDA device is its name too."""
    return f"cuda:{text}" if text.isdecimal() else text


def _unnamed(check: Callable[[Value], Checked], value: Value) -> Checked:
    """What the check returns. Its message does not name the setting again: argparse has done so."""
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(str(error).partition(": ")[2]) from error
