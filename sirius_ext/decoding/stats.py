"""What is counted (SPEC section 7): per period, per prompt, and pooled over the prompts of a call."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any


class CostlyDrafts(UserWarning):
    """A text was decoded with settings that read more than the full model alone: see `Stats.advice`."""


METRICS = (
    "average_advance_length",
    "effective_density",
    "corrected_fraction",
    "rollback_length",
    "drafted_nodes",
    "ms_per_token",
)

_TELLING = 6  # drafts that say how often the next ones will be accepted


@dataclasses.dataclass
class Period:
    """One verification.

    drafted: as many tokens as could be accepted, each after a pass of S unless it was copied.
    nodes: tokens that were proposed, in all branches.
    accepted: length of the accepted run.
    branch: which node of its depth ended that run, 0 the likeliest; None if nothing was accepted.
    committed: tokens that joined the text, F's own one included.
    cut: the end of the text shortened the period, so that it says nothing about how far a verification advances.
    likelihoods: F's likelihood of each proposed token; none of those that F alone copies.
    seconds: wall time of draft, verification and acceptance.
    copied: of the drafted, those that took no pass of S: copies from the text, one pass for several tokens of S, or none where F
        decodes alone.
    """

    drafted: int
    nodes: int
    accepted: int
    branch: int | None
    committed: int
    cut: bool
    likelihoods: list[float]
    seconds: float = 0.0
    copied: int = 0

    @property
    def passes(self) -> int:
        """Of S."""
        return self.drafted - self.copied

    @property
    def replaced(self) -> bool:
        """Whether F rejected a token of S and put its own in the place."""
        return self.passes > 0 and self.accepted < min(self.drafted, self.committed)


class _Metrics:
    """The metrics of SPEC section 7 over `periods`; None where there is nothing to count."""

    periods: list[Period]
    period: int | str
    density: float
    sparse_cost: float | None
    weights: str
    draft_weights: str
    tokens: int
    decode_seconds: float | None

    def _whole(self) -> list[Period]:
        return [period for period in self.periods if not period.cut]

    @property
    def average_advance_length(self) -> float | None:
        """Tokens committed by verifications / verifications; x0 and periods cut short by the end of the text are left out."""
        whole = self._whole()
        return sum(period.committed for period in whole) / len(whole) if whole else None

    @property
    def effective_density(self) -> float | None:
        """(passes of S * its density + 1) / AAL: weights read per token committed, as a share of the model."""
        whole = self._whole()
        if not whole:
            return None
        return sum(period.passes * self.density + 1 for period in whole) / sum(period.committed for period in whole)

    @property
    def corrected_fraction(self) -> float | None:
        """Tokens of S rejected and replaced / tokens committed by verifications."""
        committed = sum(period.committed for period in self.periods)
        replaced = sum(period.replaced for period in self.periods)
        return replaced / committed if committed else None

    @property
    def rollback_length(self) -> float | None:
        """Drafted tokens thrown away per verification, those after the end of the text among them."""
        thrown_away = sum(period.nodes - min(period.accepted, period.committed) for period in self.periods)
        return thrown_away / len(self.periods) if self.periods else None

    @property
    def drafted_nodes(self) -> float | None:
        """Tokens that were proposed per verification, in all branches."""
        return sum(period.nodes for period in self.periods) / len(self.periods) if self.periods else None

    @property
    def alone(self) -> float | None:
        """Share of the verifications for which S drafted nothing: there F decoded alone."""
        return sum(period.passes == 0 for period in self.periods) / len(self.periods) if self.periods else None

    @property
    def branches(self) -> dict[int, int]:
        """How often which node of its depth ended the accepted run, 0 the likeliest; verifications that accepted nothing are left
        out."""
        counts = Counter(period.branch for period in self.periods if period.branch is not None)
        return dict(sorted(counts.items()))

    @property
    def ms_per_token(self) -> float | None:
        """Wall time of decoding, prefill excluded / tokens returned, in milliseconds; None where texts were decoded side by
        side."""
        return 1e3 * self.decode_seconds / self.tokens if self.tokens and self.decode_seconds is not None else None

    @property
    def advice(self) -> str | None:
        """What to change, in one line, where drafts read more than they saved: effective density above 1. None elsewhere, where
        periods are adaptive, which need no advice, and where too few drafts were looked at to say."""
        density = self.effective_density
        whole = self._whole()
        tried = sum(min(period.drafted, period.accepted + 1) for period in whole)  # drafts after a rejected one say nothing
        if density is None or density <= 1 or self.period == "auto" or tried < _TELLING:
            return None
        alpha = sum(period.accepted for period in whole) / tried
        price = self.density * sum(period.passes for period in whole) / sum(period.drafted for period in whole)

        def expected(length: int) -> float:
            """The effective density of periods of so many tokens, each draft accepted with probability alpha."""
            return ((length - 1) * price + 1) / sum(alpha**accepted for accepted in range(length))

        longest = max(period.drafted for period in whole) + 1
        best = min(range(1, longest + 1), key=expected)
        hint = f"period={best} suits it" if best > 1 else 'mode="full" suits it, or a higher density if that is below 1'
        return (
            f"this text read more than the full model alone would have: effective density {density:.2f}, "
            f"{self.average_advance_length:.1f} tokens a verification; {hint}"
        )

    @property
    def abstained(self) -> str | None:
        """In one line, that S drafted for less than half of a text with adaptive periods, and why; None elsewhere."""
        if self.sparse_cost is None or self.alone is None or self.alone <= 0.5:
            return None
        cheaper = ""
        if self.draft_weights == "same" and self.weights != "q4":  # else S reads four bits already
            packed = "" if self.weights == "q8" else "weights='q8', or "
            memory = "" if self.weights == "q8" else ", for which there must be memory"
            cheaper = f"; four bits make it cheaper: {packed}draft_weights='q4'{memory}"
        return (
            f"the full model decoded {self.alone:.0%} of the steps alone: a pass of the sparse model costs "
            f"{self.sparse_cost:.2f} of a pass of the full model here, and a draft was not expected to bring more than it costs"
            f"{cheaper}"
        )

    def metrics(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in METRICS}

    def _for_json(self) -> dict[str, Any]:
        return {**self.metrics(), "branches": [list(pair) for pair in self.branches.items()]}


@dataclasses.dataclass
class PromptStats(_Metrics):
    """One prompt's decoding.

    mode, period, tree_width: as configured; with copies in mode "full", period is the most that one of its passes may commit.
    density: of the sparse model, parameters touched per token / all parameters (1 in mode "full").
    weights: the form of the full model's, "q8", "q4" or a dtype's name.
    draft_weights: what the sparse model read of them, "same" or "q4"; "" where there is none. Both are "" where it is not known.
    prompt_tokens, tokens: lengths of prompt and returned text.
    reused_tokens: of the prompt, those that a cache held already and that were not prefilled again.
    sparse_cost: of a pass of S, in passes of F over one token, where periods are adaptive.
    finish: "eos", "length" (the limit asked for), "context" (the model's limit), "criteria" (a stopping criterion or string),
        "cancelled", or "error" (one was raised).
    Seconds are wall time; None where texts were decoded side by side, so that none has a time of its own.
    """

    mode: str
    period: int | str
    density: float
    prompt_tokens: int
    tree_width: int = 1
    reused_tokens: int = 0
    tokens: int = 0
    sparse_cost: float | None = None
    weights: str = ""
    draft_weights: str = ""
    finish: str = ""
    prefill_seconds: float | None = 0.0
    decode_seconds: float | None = 0.0
    periods: list[Period] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, metrics included, for JSON."""
        return {**dataclasses.asdict(self), **self._for_json()}


class Stats(_Metrics):
    """A call's stats: `prompts` has one entry per prompt; every metric is pooled over them."""

    def __init__(self, prompts: Iterable[PromptStats]) -> None:
        self.prompts = list(prompts)
        self.period, self.tree_width = self.prompts[0].period, self.prompts[0].tree_width
        self.density, self.sparse_cost = self.prompts[0].density, self.prompts[0].sparse_cost
        self.weights, self.draft_weights = self.prompts[0].weights, self.prompts[0].draft_weights
        self.periods = [period for prompt in self.prompts for period in prompt.periods]
        self.tokens = sum(prompt.tokens for prompt in self.prompts)
        self.decode_seconds = _total(prompt.decode_seconds for prompt in self.prompts)
        self.prefill_seconds = _total(prompt.prefill_seconds for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Everything, metrics included, for JSON."""
        return {**self._for_json(), "prompts": [prompt.to_dict() for prompt in self.prompts]}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.3f}" for name, value in self.metrics().items() if value is not None)
        return f"Stats(prompts={len(self.prompts)}, tokens={self.tokens}, {shown})"


def _total(seconds: Iterable[float | None]) -> float | None:
    """Their sum; None if one is not known."""
    given = list(seconds)
    known = [each for each in given if each is not None]
    return sum(known) if len(known) == len(given) else None
