"""What passes cost, in passes of F over one token: measured once for a model on a machine, rounded, and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import is_progress_bar_enabled

from .. import _C
from ..config import SiriusConfig
from ..errors import write_text
from ..kernels import ops
from ..kernels.threads import cpu_threads
from ..models.hub import ModelLoadError, cache_dir, reporting
from ..models.scratch import alone, scratch
from ..runtime.model import Model
from ..runtime.passes import Pass
from .lookup import MOST
from .period import Costs
from .sparsity import CSparse, FSparse, density_of, four_bits, sparse_density, sparsity_of

# Of the passes that are measured, beside one over one token. Kernels take rows in blocks, so that one more may cost much or
# nothing; the most that copies ask for is among them.
ROWS = 2, 4, 8, 1 + MOST, 16  # of F
FEW_ROWS = 4, 16  # of F where it is slow: then it waits for its weights, whatever the rows
SPARSE_ROWS = 4, 8, 1 + MOST
_SECONDS = 1.0  # that measuring takes, unless few passes take longer
_SLOW = 0.2  # seconds of a pass
_ROUNDS = 3, 15  # at least (one where passes are slow), at most
_SLOTS = 128  # of the cache that is measured over
LEAST, GREATEST = 1e-6, 1e6  # that a pass can cost; a file that says anything else was not written by this module

# Of each model, by what it was asked for. Every text asks, and a key for the file wants all layers hashed.
_at_hand: weakref.WeakKeyDictionary[Model, dict[tuple[object, ...], Costs]] = weakref.WeakKeyDictionary()
_measuring = threading.Lock()  # two texts that begin together have the same costs, and do not measure each other


def costs_of(model: Model, config: SiriusConfig, copies: bool, thresholds: torch.Tensor | None = None) -> Costs:
    """The costs of this model's passes with the sparse model of a config, measured now if they never were on this machine.

    copies: S has passes over tokens that were copied, too.
    thresholds: FSparse's, float32 [layers].
    """
    sparse: tuple[object, ...] = ("full",)
    if config.mode != "full":
        less = four_bits(config, model.weights)
        density = density_of(config, model.weights)
        sparse = config.sparsity, config.follow, density, config.thresholds, config.tree_width, less, copies
    asked, at_hand = (ops.isa(), cpu_threads(), *sparse), _at_hand.setdefault(model, {})
    with _measuring:
        if asked not in at_hand:
            rows = SPARSE_ROWS if copies and config.mode != "full" else ()
            measure = functools.partial(_measure, model, config, copies, thresholds)
            at_hand[asked] = _kept_or_measured(_key(model, sparse), rows, measure)
    return at_hand[asked]


def keep_costs(old: Model, new: Model) -> None:
    """Those of the old model are the new one's, too: its weights have other values, and nothing else is different."""
    if old in _at_hand:
        _at_hand[new] = dict(_at_hand[old])


def _kept_or_measured(key: str, sparse_rows: Sequence[int], measure: Callable[[], Costs]) -> Costs:
    """sparse_rows: of S, as they must be in what is kept."""
    if (kept := _costs_in(_read().get(key), sparse_rows)) is not None:
        return kept
    with reporting("measuring what passes cost, once on this machine", is_progress_bar_enabled()):
        measured = measure()
    _keep(key, measured)
    return measured


def _costs_in(entry: Any, sparse_rows: Sequence[int]) -> Costs | None:
    """The costs that an entry of the file holds. None if it was changed or damaged: a period goes by them, and divides."""
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in dataclasses.fields(Costs)}:
        return None
    full = next((found for rows in (ROWS, FEW_ROWS) if (found := _rising_in(entry["full"], rows)) is not None), None)
    copies = _rising_in(entry["copies"], sparse_rows)
    if full is None or copies is None or not _is_cost(entry["sparse"]) or not _is_cost(entry["follow"], least=0.0):
        return None
    return Costs(float(entry["sparse"]), full, float(entry["follow"]), copies)


def _rising_in(kept: Any, rows: Sequence[int]) -> tuple[tuple[int, float], ...] | None:
    """What `_rising` has made of these rows, as it comes out of the file; None for anything else."""
    if not isinstance(kept, list) or not all(isinstance(each, list) and len(each) == 2 for each in kept):
        return None
    costs = [cost for _, cost in kept]
    if [each for each, _ in kept] != list(rows) or not all(_is_cost(cost, least=1.0) for cost in costs) or costs != sorted(costs):
        return None
    return tuple((each, float(cost)) for each, cost in zip(rows, costs))


def _is_cost(value: object, least: float = LEAST) -> bool:
    """Neither NaN nor infinite, either."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= GREATEST


def _key(model: Model, sparse: tuple[object, ...]) -> str:
    """What the costs depend on. sparse: the settings of S."""
    w = model.weights
    backend = ops.isa() if w.device.type == "cpu" else torch.cuda.get_device_name(w.device)
    parts = [
        w.fingerprint()[:16],
        w.layers[0].gate.format.name,
        w.dtype,
        _build(),
        backend,
        _processor(),
        cpu_threads(),
    ]
    if w.tiers is not None and w.streams:
        parts.append(f"reading {w.tiers.plan.streamed} of {w.tiers.files.neurons}")
    return " ".join(map(str, (*parts, *sparse)))


@functools.cache
def _build() -> str:
    """Of the kernels: what others take says nothing of these."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _file() -> Path:
    return cache_dir() / "costs.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _keep(key: str, measured: Costs) -> None:
    """In one step, beside what others have kept. A cache folder that cannot be written to, or that has no place, means measuring
    again, next time."""
    with contextlib.suppress(OSError, ModelLoadError):
        file = _file()
        with scratch(file.parent, "costs-") as folder, alone(file.parent):
            fresh = folder / file.name
            write_text(fresh, json.dumps({**_read(), key: dataclasses.asdict(measured)}, indent=1))
            os.replace(fresh, file)


def _measure(model: Model, config: SiriusConfig, copies: bool, thresholds: torch.Tensor | None) -> Costs:
    w, width = model.weights, config.tree_width
    cache = model.new_cache()
    sparsity = sparsity_of(config, w, thresholds) if config.mode != "full" else None
    model.reserve(cache, _SLOTS, max(*ROWS, width))
    cache.k.zero_()
    cache.v.zero_()
    if isinstance(sparsity, CSparse):  # any neurons, but not the first ones, which stand side by side
        generator = torch.Generator("cpu").manual_seed(0)  # torch's own one draws the user's samples
        for layer in range(len(w.layers)):
            z = torch.randn(1, w.intermediate, generator=generator, dtype=torch.float32, device="cpu").to(w.device)
            sparsity.usage.observe(layer, z, z)

    def run(rows: int, by: CSparse | FSparse | None, follow: bool = False) -> Callable[[], float]:
        asked = Pass.chain(torch.zeros(rows, dtype=torch.int32, device="cpu"), _SLOTS - rows, by, keep_z=follow)

        def body() -> float:
            begun = time.perf_counter()
            result = model.compute(cache, asked)
            if follow and isinstance(sparsity, CSparse) and result.z is not None:
                sparsity.follow(result.z, list(range(1, rows)))
            result.argmax.tolist()  # waits for the device
            return time.perf_counter() - begun

        return body

    full = run(1, None)
    full()  # the first pass loads what there is to load
    slow = full() > _SLOW
    full_rows, sparse_rows = FEW_ROWS if slow else ROWS, SPARSE_ROWS if copies and sparsity else ()
    bodies = {"full": full, **{f"full {rows}": run(rows, None) for rows in full_rows}}
    if sparsity is not None:
        bodies |= {"sparse": run(width, sparsity), **{f"sparse {rows}": run(rows, sparsity) for rows in sparse_rows}}
        if sparsity.follows:
            bodies["follow"] = run(FEW_ROWS[0], None, follow=True)
    ratios: dict[str, list[float]] = {name: [] for name in bodies}
    started = time.perf_counter()
    for count in itertools.count():
        seconds = {name: body() for name, body in bodies.items()}
        if count:  # so does the first round
            for name, taken in seconds.items():
                ratios[name].append(taken / seconds["full"])
        enough = count >= (1 if slow else _ROUNDS[0])
        if count == _ROUNDS[1] or (enough and time.perf_counter() - started > _SECONDS):
            break
    cost = {name: statistics.median(each) for name, each in ratios.items()}
    if sparsity is None:
        return Costs(1.0, _rising(cost, "full", full_rows))
    # Something else may have had the processor. S reads what it reads: no machine does it faster than its share of the bytes,
    # unless F's come from a disk.
    sparse = max(cost["sparse"], 0.0 if w.streams else sparse_density(config, w))
    return Costs(
        _rounded(sparse),
        _rising(cost, "full", full_rows),
        max(0.0, round(cost["follow"] - cost[f"full {FEW_ROWS[0]}"], 2)) if sparsity.follows else 0.0,
        _rising(cost, "sparse", sparse_rows, cost["sparse"]),
    )


def _rising(cost: dict[str, float], model: str, rows: Sequence[int], one: float = 1.0) -> tuple[tuple[int, float], ...]:
    """(rows, cost), in passes over one token, the cost of which is `one`. More rows are never cheaper."""
    costs = (_rounded(cost[f"{model} {each}"] / one) for each in rows)
    return tuple(zip(rows, list(itertools.accumulate(costs, max, initial=1.0))[1:]))


def _rounded(cost: float) -> float:
    """To hundredths, or two digits where those say more: beside an F that waits for a disk a pass of S may cost thousandths, and
    never nothing."""
    cost = min(max(cost, LEAST), GREATEST)
    return round(cost, 2) if cost >= 0.1 else float(f"{cost:.2g}")
