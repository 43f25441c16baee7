"""Tiny models in folders, and their tiers."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tiny import tiny

from sirius_ext.models.packed import Checkpoint
from sirius_ext.models.tier_files import TierFiles, prepare

FOLDERS = tempfile.TemporaryDirectory(prefix="sirius-tiers-")


def source_of(name: str, dtype: torch.dtype, weights: str) -> Checkpoint:
    folder = Path(FOLDERS.name) / f"{name}-{dtype}"
    if not folder.is_dir():
        tiny(name, dtype).save_pretrained(folder)
    return Checkpoint(folder, tiny(name, dtype).config, dtype, weights)


@functools.cache
def files_of(name: str = "llama3", dtype: torch.dtype = torch.float32, weights: str = "plain") -> TierFiles:
    return prepare(source_of(name, dtype, weights), Path(FOLDERS.name) / f"{name}-{dtype}-{weights}-tiers")
