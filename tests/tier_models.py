"""Tiny models in folders, and their tiers."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import tiny
from transformers import AutoModelForCausalLM

from sirius_ext import Engine
from sirius_ext.models.device_tiers import DeviceTiers
from sirius_ext.models.packed import Checkpoint, load_packed
from sirius_ext.models.tier_files import TierFiles, prepare
from sirius_ext.models.tiers import Plan

CPU = torch.device("cpu")
FOLDERS = tempfile.TemporaryDirectory(prefix="sirius-tiers-")


def source_of(name: str, dtype: torch.dtype, weights: str) -> Checkpoint:
    folder = Path(FOLDERS.name) / f"{name}-{dtype}"
    if not folder.is_dir():
        tiny(name, dtype).save_pretrained(folder)
    return Checkpoint(folder, tiny(name, dtype).config, dtype, weights)


@functools.cache
def files_of(name: str = "llama3", dtype: torch.dtype = torch.float32, weights: str = "plain") -> TierFiles:
    return prepare(source_of(name, dtype, weights), Path(FOLDERS.name) / f"{name}-{dtype}-{weights}-tiers")


def moved(model: Any) -> Any:
    """In memory of its own, where rows are aligned, as on a device; not in a file's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def whole(name: str = "llama3", dtype: torch.dtype = torch.float32, weights: str = "plain", device: torch.device = CPU) -> Engine:
    """With all of the same weights on the device."""
    source = source_of(name, dtype, weights)
    if weights == "plain":
        return Engine(AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).to(device))
    return Engine(moved(load_packed(source, Path(FOLDERS.name))).to(device))


def tiered(
    files: TierFiles,
    resident: tuple[int, ...],
    copy: bool = False,
    slots: int = 0,
    streams_rest: bool = False,
    device: torch.device = CPU,
) -> Engine:
    """On a CUDA device, or the emulated one. resident: neurons of each image that stay, at most all."""
    model = moved(TierFiles.open(files.folder).model(not streams_rest, on_device=True))
    stay = [min(count, files.intermediate) for count in resident]
    plan = Plan(
        memory=0,
        resident=(stay[0], stay[1]),
        slots=slots,
        copy=int(copy),
        streams_rest=streams_rest,
        caches=1 << 30,
        used=0,
        streamed=0,
    )
    model.tiers = DeviceTiers(model.tier_files, plan, device)
    return Engine(model.to(device))
