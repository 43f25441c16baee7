"""The modes of an evaluation: what their names make of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ..config import ACCEPT_RULES, SiriusConfig

GREEDY_RULES = tuple(rule for rule in ACCEPT_RULES if rule != "sample")  # which draws

# What a mode's name makes of a config.
NAMED_MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "csparse": {"mode": "sparse", "sparsity": "csparse", "thresholds": None},
    "fsparse": {"mode": "sparse", "sparsity": "fsparse"},
    "cascade": {"mode": "sparse", "sparsity": "cascade", "thresholds": None},
    "sirius-c": {"mode": "sirius", "sparsity": "csparse", "thresholds": None},
    "sirius-f": {"mode": "sirius", "sparsity": "fsparse"},
    "sirius-cascade": {"mode": "sirius", "sparsity": "cascade", "thresholds": None},
}

# What may be set for one mode, after its name, and how it is read.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "density": float,
    "follow": lambda text: {"yes": True, "no": False}[text],
    "period": lambda text: text if text == "auto" else int(text),
    "tree_width": int,
    "threshold": float,
    "score_temperature": float,
    "accept": lambda text: {rule: rule for rule in GREEDY_RULES}[text],
}


def config_of(mode: str, base: SiriusConfig) -> SiriusConfig:
    """A mode's config: one of NAMED_MODES, and after colons what differs from the base, as in `sirius-c:period=8:threshold=0.2`.

    ValueError for an unknown mode, or a setting that is none or not one of this mode's.
    """
    name, *texts = mode.split(":")
    if name not in NAMED_MODES:
        raise ValueError(f"modes: expected some of {', '.join(NAMED_MODES)}, got {mode!r}")
    own = {}
    for text in texts:
        setting, _, value = text.partition("=")
        usable = SETTINGS if name.startswith("sirius") else () if name == "full" else ("density",)
        if setting in own:
            raise ValueError(f"modes: expected {setting} once, got {mode!r}")
        if setting not in usable:
            raise ValueError(f"modes: expected settings among {', '.join(usable) or 'none'} for {name}, got {mode!r}")
        try:
            own[setting] = SETTINGS[setting](value)
        except (ValueError, KeyError) as error:
            expected = {"follow": "yes or no", "accept": " or ".join(GREEDY_RULES)}.get(setting, "a number")
            raise ValueError(f"modes: expected {expected} for {setting}, got {mode!r}") from error
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | NAMED_MODES[name]
    if "density" in own and values["thresholds"] is not None:
        raise ValueError(f"--thresholds: made for one density, so not for {mode}")
    try:
        return SiriusConfig(**values | own)
    except ValueError as error:
        raise ValueError(f"modes: {mode}: {error}" if own else str(error)) from error


def modes_in(records: Iterable[dict[str, Any]]) -> list[str]:
    """The modes of records in the order of NAMED_MODES, those with settings of their own after the others of their name."""
    found = dict.fromkeys(record["mode"] for record in records)
    return sorted(found, key=lambda mode: (list(NAMED_MODES).index(mode.split(":")[0]), ":" in mode))
