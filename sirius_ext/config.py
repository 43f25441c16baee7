"""What a user may set, checked once."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os

MODES = ("sirius", "sparse", "full")
SPARSITIES = ("csparse", "fsparse", "cascade")
ACCEPT_RULES = ("threshold", "match", "sample")
DRAFT_WEIGHTS = ("auto", "same", "q4")
OFFLOAD = ("auto", "never")
MAX_PERIOD = 256
MAX_AUTO_PERIOD = 32
MAX_AUTO_PERIOD_FROM_DISK = 64  # where F comes from a disk, and S costs next to nothing beside it
MAX_WIDTH = 16
MAX_NODES_ON_CUDA = 256  # of a tree
# Tokens in a pass of a prefill, which begins at multiples of it: the bits of what a prompt begins with then do not depend on what
# follows. It bounds the activations, too.
PREFILL_CHUNK = 256
# Chunks that go through a layer together where layers come from a disk: their activations take memory.
TOGETHER = 16
COLDEST = 1e-6  # a temperature by which the logits of any model can be divided
DENSITY = 0.5
# Makes `transformers`' generate greedy, whatever sampling the model's own generation config proposes.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclasses.dataclass(frozen=True)
class SiriusConfig:
    """How to decode. Names are those of the Sirius paper (arXiv 2409.03856); so are the defaults, but for `follow` and what is
    "auto".

    mode: "sirius" drafts with the sparse model and corrects with the full one; "sparse" and "full" decode with one of them alone.
    sparsity: "csparse", one set of neurons, chosen during the prompt's prefill (GRIFFIN's rule); "fsparse", a set per token,
        those of largest |silu(gate x)| (CATS' idea); "cascade" (ours), csparse's set for gate, inside it a set per token for up,
        and inside that one a set per token for down: those that add most to the output, by what is known of them by then.
    follow: the set of csparse and of the cascade follows the text: every verification shows which neurons its tokens used, and
        the set is chosen anew. With False it stays as the prompt chose it, which is the paper's rule.
    density: fraction of MLP neurons kept in every layer, in (0, 1]; of the cascade, the share of gate, up and down that is read.
        "auto" is 1 of csparse that reads four bits where the full model reads more, as it does by default, since that is cheap;
        0.5 elsewhere, and less where not all is in memory and there is no room for more.
    thresholds: for fsparse, a file of `python -m sirius_ext calibrate`: instead of a fixed number, the neurons are kept whose
        |silu(gate x)| reaches their layer's threshold. It must have been made for this model and density.
    period: tokens that one full pass verifies, 1 to 256; the first of them was chosen by the full model. with "auto" S drafts
        as long as one more token is expected to bring more than it costs, for 32 at most, and not at all where F alone is faster
        (`decoding.period.AdaptivePeriod`). What passes cost is measured once on a machine and kept in the cache folder; under
        "threshold" and "sample" the text depends on it.
    tree_width: branches kept at each draft step, 1 to 16; 1 is a chain. A period has 1 + (period - 1) * tree_width nodes,
        on a CUDA device 256 at most, to which "auto" keeps.
    prune: in a tree, a leaf whose best continuation is above 0.95 proposes only that one.
    threshold: a drafted token is kept when the full model gives it at least this likelihood, in [0, 1].
    score_temperature: temperature of the softmax behind that likelihood, more than 0.
    accept: "threshold" (the paper's rule: text close to the full model's), "match" (text equal to the full model's greedy text)
        or "sample" (text distributed exactly as the full model's samples; needs do_sample=True).
    draft_weights: what the sparse model reads of a weight. "same": what the full model reads. "q4": four bits of it; of weights
        in eight bits (`Engine.from_pretrained(weights="q8")`) that is their upper half, beside plain weights it is a copy, which
        takes 0.29 of the memory of 16-bit ones. "auto": "q4" of packed weights, and of plain ones if the copy has room: in what
        `Engine.from_pretrained(memory=...)` leaves of that memory, else in nine tenths of what is free on the model's device,
        beside caches. "same" where it has none. It is decided when a sparse model is first asked for, and kept for as long as the
        model's weights are the same.
    lookup: copy from the text: tokens that followed the last ones earlier in prompt, text or draft join the next pass, and stay
        where they are what the model chooses: the same text in fewer passes. (With period="auto" drafts may end elsewhere, since
        they have to beat the full model with copies; under "threshold" the text may then differ.) For chains of csparse and for
        the full model alone, decoded greedily; "auto" copies on the CPU where S drafts such chains with period="auto".

    offload: "auto": of a model that is larger than the memory, what only the full model reads comes from the disk whenever it is
        read, to a CUDA device from host memory (`Engine.from_pretrained(memory=...)`). "never": all weights are loaded. It
        counts when a model is loaded.

    Raises TypeError or ValueError that names the field.
    """

    mode: str = "sirius"
    sparsity: str = "csparse"
    follow: bool = True
    density: float | str = "auto"
    thresholds: str | os.PathLike[str] | None = None
    period: int | str = "auto"
    tree_width: int = 1
    prune: bool = False
    threshold: float = 0.1
    score_temperature: float = 0.6
    accept: str = "threshold"
    lookup: bool | str = "auto"
    draft_weights: str = "auto"
    offload: str = "auto"

    def __post_init__(self) -> None:
        choices_of: dict[str, tuple[str, ...]] = {"mode": MODES, "sparsity": SPARSITIES, "accept": ACCEPT_RULES}
        choices_of |= {"draft_weights": DRAFT_WEIGHTS, "offload": OFFLOAD}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("density", "threshold", "score_temperature"):
            value = getattr(self, name)
            if name == "density" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                other = ' or "auto"' if name == "density" else ""
                raise TypeError(f"{name}: expected a number{other}, got {value!r}")
            object.__setattr__(self, name, float(value))  # of whatever kind it was: numpy has its own
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if self.period != "auto":
            object.__setattr__(self, "period", _count("period", self.period, MAX_PERIOD, ' or "auto"'))
        object.__setattr__(self, "tree_width", _count("tree_width", self.tree_width, MAX_WIDTH))
        for name, other in (("prune", ""), ("follow", ""), ("lookup", "auto")):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (other and value == other):
                expected = "True or False" if not other else f'True, False or "{other}"'
                raise TypeError(f"{name}: expected {expected}, got {value!r}")
        if self.prune and self.tree_width == 1:
            raise ValueError("prune: a chain has nothing to prune; it needs tree_width > 1")
        if self.prune and self.accept == "sample":
            raise ValueError('prune: not with accept="sample", whose proposals are drawn')
        if self.thresholds is not None and not isinstance(self.thresholds, (str, os.PathLike)):
            raise TypeError(f"thresholds: expected a path, got {type(self.thresholds).__name__}")
        if self.thresholds is not None and self.sparsity != "fsparse":
            raise ValueError(f'thresholds: they need sparsity="fsparse", got {self.sparsity!r}')
        if self.lookup is True and (refused := self._not_copied):
            raise ValueError(f"lookup: {refused}")
        if isinstance(self.density, float) and not 0 < self.density <= 1:
            raise ValueError(f"density: expected more than 0 and at most 1, got {self.density}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected 0 to 1, got {self.threshold}")
        if not self.score_temperature > 0:
            raise ValueError(f"score_temperature: expected more than 0, got {self.score_temperature}")

    @property
    def _not_copied(self) -> str:
        """Why tokens cannot be copied with these settings; "" if they can."""
        if self.mode != "full" and self.sparsity != "csparse":
            return f'not with sparsity="{self.sparsity}", whose neurons depend on all tokens of a pass'
        if self.mode == "sirius" and self.tree_width > 1:
            return f"it needs a chain, tree_width=1, got {self.tree_width}"
        if self.mode == "sirius" and self.accept == "sample":
            return 'not with accept="sample", whose proposals are drawn'
        return ""

    def density_with(self, fewer_bits: bool = False) -> float:
        """The density of a sparse model. fewer_bits: it reads four bits where the full one reads more. Then all neurons are worth
        more than what csparse saves without some of them (tests/test_period.py)."""
        if isinstance(self.density, float):
            return self.density
        return 1.0 if fewer_bits and self.sparsity == "csparse" else DENSITY

    @property
    def used(self) -> set[str]:
        """The fields that make a difference to what is decoded. Whoever is told another one by a user refuses it."""
        used = {"mode", "lookup"}
        if self.mode != "full":
            used |= {"sparsity", "density", "draft_weights", "thresholds" if self.sparsity == "fsparse" else "follow"}
        if self.mode == "sirius":
            used |= {"period", "tree_width", "prune", "accept"}
        if self.mode == "sirius" and self.accept == "threshold":
            used |= {"threshold", "score_temperature"}
        return used

    @property
    def copies(self) -> bool:
        """Whether tokens are copied from the text: what `lookup` comes to."""
        if self.lookup == "auto":
            return self.mode == "sirius" and self.period == "auto" and not self._not_copied
        return bool(self.lookup)

    @property
    def longest_period(self) -> int:
        """The period, or the longest one that "auto" may choose."""
        return self.longest_period_with()

    def longest_period_with(self, from_disk: bool = False) -> int:
        """As `longest_period`. from_disk: the full model comes from a disk."""
        if isinstance(self.period, int):
            return self.period
        return MAX_AUTO_PERIOD_FROM_DISK if from_disk else MAX_AUTO_PERIOD


def _count(name: str, value: object, most: int, alternative: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer{alternative}, got {value!r}")
    count = int(value)
    if not 1 <= count <= most:
        raise ValueError(f"{name}: expected 1 to {most}{alternative}, got {count}")
    return count
