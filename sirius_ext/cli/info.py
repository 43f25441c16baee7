"""The command `info`."""

from __future__ import annotations

import argparse
import functools
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from .. import __version__
from ..decoding.forecast import forecast
from ..decoding.sparsity import drafts_of
from ..engine import device_of
from ..kernels import ops
from ..kernels.dispatch import has_cuda_kernels, is_cuda
from ..kernels.threads import cpu_threads
from ..models.hub import Division, division
from ..models.tier_files import NEURONS
from ..runtime.speeds import direct_read_speed, memory_read_speed
from .options import DEFAULTS

DISK_SECONDS = 1.0  # that are spent on measuring it


def run(options: argparse.Namespace) -> int:
    for name, value in _of_machine() if options.model is None else _of_model(options):
        print(_line(name, str(value)))
    return 0


def _line(name: str, value: str) -> str:
    """A name and what is said of it, within the width of the terminal. What is none gets a line, for who searches in it."""
    text = f"{name:17} {value}"
    if not sys.stdout.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(text, width, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False)


def _of_machine() -> Iterable[tuple[str, object]]:
    sets = ", ".join(f"{name} (in use)" if name == ops.isa() else name for name in ops.available_isas())
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return (
        ("sirius_ext", __version__),
        ("backends", "cpu, cuda" if has_cuda_kernels() else "cpu"),
        ("instruction sets", sets),
        ("devices", ", ".join(devices)),
        ("threads", cpu_threads()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("python", platform.python_version()),
    )


def _of_model(options: argparse.Namespace) -> Iterable[tuple[str, object]]:
    device, drafts = device_of(options.device), functools.partial(drafts_of, DEFAULTS)
    found = division(options.memory, drafts, options.model, options.dtype, weights=options.weights, device=device)
    files, plan = found.layout, found.plan
    asked = "asked for" if options.memory else "free"
    density = "" if plan.density is None else f", with a density of {plan.density:g}, for which there is room"
    divided = (
        ("model", f"{options.model}, {files.weights} weights, {str(files.dtype).removeprefix('torch.')}"),
        ("memory", f"{plan.memory / 1e9:.2f} GB are {asked}, {plan.used / 1e9:.2f} would be used:"),
        *(("", f"{size / 1e9:.2f} GB {name}") for name, size in plan.parts.items() if size),
    )
    if is_cuda(device):
        return (*divided, ("neurons", _neurons(found) + density), ("a period moves", _moved(found, "host memory")))
    disk = direct_read_speed(found.file, DISK_SECONDS) if plan.streamed else None
    memory = memory_read_speed()
    of = "of Qwen2.5-Coder-1.5B; a pass takes what reading its weights takes"
    times = forecast(DEFAULTS, files, plan, disk, memory)
    return (
        *divided,
        ("neurons", _neurons(found)),
        ("a period reads", _moved(found)),
        ("memory speed", f"{memory / 1e9:.1f} GB/s"),
        *([("disk speed", _disk(found.file, disk))] if plan.streamed else []),
        ("predicted", f"Full {_seconds(times.full)}, S alone {_seconds(times.sparse)}, Sirius {_seconds(times.sirius)}{density}"),
        ("assumed", f"the full model accepts {times.accepted:.1%} of what the sparse one drafts, as it was measured to do {of}"),
    )


def _neurons(found: Division) -> str:
    files, plan = found.layout, found.plan
    copy = ", beside the sparse model's copy of all in four bits" if plan.copy else ""
    if plan.resident[0] == files.intermediate and not plan.streamed:
        return f"all stay in memory{copy}"
    shares = [f"{count / files.intermediate:.0%}" for count in plan.resident]
    if len(files.layers[0].images) == 1:
        text = f"{shares[0]} of every layer's stay in memory"
    else:
        text = f"of every layer's {shares[0]} of the upper halves stay in memory, {shares[1]} of the lower ones"
    slots = f", and those of the sparse model, up to {plan.slots} of {files.intermediate}" if plan.slots else ""
    return text + slots + copy


def _moved(found: Division, source: str = "the disk") -> str:
    if not found.plan.streamed:
        return f"nothing from {source}"
    what = "of MLPs, attention and LM head" if found.plan.streams_rest else "of the MLPs"
    text = f"{found.plan.streamed / 1e9:.2f} GB {what} from {source}, in the full model's pass"
    return text if found.file.name == NEURONS else f"{text}; its files are not there yet (sirius prepare)"


def _disk(file: Path, speed: float | None) -> str:
    if speed is None:
        return f"not known: {file} is too small for direct reads, or its file system takes none"
    return f"{speed / 1e9:.2f} GB/s, by direct reads of {file}"


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s/token"
