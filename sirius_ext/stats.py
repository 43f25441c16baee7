"""What is counted (SPEC section 7): per period, per prompt, and pooled over the prompts of a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass
class Period:
    """One verification.

    drafted: tokens that S proposed. accepted: length of the accepted run. committed: tokens that joined the text, F's own one
    included. cut: the end of the text shortened the period, so that it says nothing about how far a verification advances.
    likelihoods: F's likelihood of each drafted token. seconds: wall time of draft, verification and acceptance.
    """

    drafted: int
    accepted: int
    committed: int
    cut: bool
    likelihoods: list[float]
    seconds: float


class _Metrics:
    """The metrics of SPEC section 7 over `periods`; None where there is nothing to count."""

    periods: list[Period]
    period: int
    density: float
    tokens: int
    decode_seconds: float

    @property
    def average_advance_length(self) -> float | None:
        """Tokens committed by verifications / verifications; x0 and periods cut short by the end of the text are left out."""
        whole = [period.committed for period in self.periods if not period.cut]
        return sum(whole) / len(whole) if whole else None

    @property
    def effective_density(self) -> float | None:
        """((n - 1) * density of the sparse model + 1) / AAL."""
        advance = self.average_advance_length
        return None if advance is None else ((self.period - 1) * self.density + 1) / advance

    @property
    def corrected_fraction(self) -> float | None:
        """Tokens rejected and replaced / tokens committed by verifications."""
        committed = sum(period.committed for period in self.periods)
        replaced = sum(period.accepted < min(period.drafted, period.committed) for period in self.periods)
        return replaced / committed if committed else None

    @property
    def rollback_length(self) -> float | None:
        """Drafted tokens thrown away per verification, those behind the end of the text among them."""
        thrown_away = sum(period.drafted - min(period.accepted, period.committed) for period in self.periods)
        return thrown_away / len(self.periods) if self.periods else None

    @property
    def ms_per_token(self) -> float | None:
        """Wall time of decoding, prefill excluded / tokens returned, in milliseconds."""
        return 1e3 * self.decode_seconds / self.tokens if self.tokens else None

    def metrics(self) -> dict[str, float | None]:
        names = ("average_advance_length", "effective_density", "corrected_fraction", "rollback_length", "ms_per_token")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class PromptStats(_Metrics):
    """One prompt's decoding.

    mode, period: as configured. density: of the sparse model, parameters touched per token / all parameters (1 in mode "full").
    prompt_tokens, tokens: lengths of prompt and returned text. finish: "eos", "length" (the limit asked for), "context" (the
    model's limit) or "criteria" (a stopping criterion). Seconds are wall time.
    """

    mode: str
    period: int
    density: float
    prompt_tokens: int
    tokens: int = 0
    finish: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    periods: list[Period] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict:
        """Everything, metrics included, for JSON."""
        return {**dataclasses.asdict(self), **self.metrics()}


class Stats(_Metrics):
    """A call's stats: `prompts` has one entry per prompt; every metric is pooled over them."""

    def __init__(self, prompts: Iterable[PromptStats]) -> None:
        self.prompts = list(prompts)
        self.period, self.density = self.prompts[0].period, self.prompts[0].density
        self.periods = [period for prompt in self.prompts for period in prompt.periods]
        self.tokens = sum(prompt.tokens for prompt in self.prompts)
        self.decode_seconds = sum(prompt.decode_seconds for prompt in self.prompts)
        self.prefill_seconds = sum(prompt.prefill_seconds for prompt in self.prompts)

    def to_dict(self) -> dict:
        """Everything, metrics included, for JSON."""
        return {**self.metrics(), "prompts": [prompt.to_dict() for prompt in self.prompts]}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.3f}" for name, value in self.metrics().items() if value is not None)
        return f"Stats(prompts={len(self.prompts)}, tokens={self.tokens}, {shown})"
