"""Packages that not everyone needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package's module. ValueError that says how to get it if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{what} needs {package} ({error}): pip install 'sirius_ext[{extra}]'") from error
