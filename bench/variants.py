"""Which of our own decoding settings a benchmark compares, what they are called, and the flags that ask for them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from sirius_ext import SiriusConfig


def words(text: str) -> list[str]:
    """Of a flag: parts between commas."""
    return text.split(",")


def numbers(kind: Callable) -> Callable[[str], list]:
    """Of a flag: parts between commas, each made a number by `kind`."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def advances(text: str) -> dict[int, float]:
    """Of a flag: PERIOD=TOKENS between commas."""
    return {int(key): float(value) for key, _, value in (part.partition("=") for part in text.split(",") if part)}


def or_auto(kind: Callable) -> Callable[[str], object]:
    """Of a part: "auto", or a number."""
    return lambda text: text if text == "auto" else kind(text)


def draft_of(weights: str, asked: str = "auto") -> str:
    """What S reads in a benchmark, where "auto" does not depend on how much memory is free, but is what it was when results were
    first recorded: what F reads of plain weights, four bits of packed ones."""
    return "same" if asked == "auto" and weights == "plain" else asked


def own_arguments(parser: argparse.ArgumentParser, default: Callable[[str], str], limits: str = "") -> None:
    """Add the flags that `own_variants` reads. default: what to say of a flag's default, where the benchmark fills it in. limits:
    what to say of those that a benchmark does not take in all of its ways."""
    parser.add_argument("--weights", type=words, default="plain", help="of plain, q8, q4" + limits)
    purpose = "of auto, same, q4; auto is same of plain weights, unless memory is divided for a copy"
    parser.add_argument("--draft-weights", type=words, default="auto", help=purpose + limits)
    parser.add_argument("--densities", type=numbers(or_auto(float)), default="0.5", help="or auto")
    parser.add_argument(
        "--sparsities", type=words, help=f"of csparse, csparse-fixed, fsparse, cascade {default('sparsities')}{limits}"
    )
    parser.add_argument("--periods", type=numbers(or_auto(int)), help=default("periods"))
    parser.add_argument("--widths", type=numbers(int), help=f"of the tree {default('widths')}")
    parser.add_argument("--accepts", type=words, default="threshold,match", help="of threshold, match" + limits)
    parser.add_argument("--lookup", action="store_true", help="also with copies from the text" + limits)


def check_known(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    """ValueError that names the words of a flag which are not known."""
    if unknown := set(given) - set(known):
        raise ValueError(f"{flag}: not known: {', '.join(sorted(unknown))}")


def check_sparsities(given: list[str], known: tuple[str, ...] = ("csparse", "csparse-fixed", "fsparse", "cascade")) -> None:
    """As `check_known`."""
    check_known("sparsities", given, known)


def full_of(weights: str) -> str:
    """The variant that those of the same weights are compared with."""
    return "Full" if weights == "plain" else f"{weights} Full"


def own_variants(options: argparse.Namespace, divided: bool = False) -> Iterator[tuple[str, SiriusConfig, str]]:
    """Name, settings and weights of each that is asked for: Full first, then S alone and what drafts. divided: a budget of memory
    says what "auto" reads."""
    for weights in options.weights:
        yield full_of(weights), SiriusConfig(mode="full"), weights
        if options.lookup:
            yield f"{full_of(weights)}, copies", SiriusConfig(mode="full", lookup=True), weights
    drafts = [(weights, draft) for weights in options.weights for draft in options.draft_weights]
    for (weights, draft), sparsity, density in itertools.product(drafts, options.sparsities, options.densities):
        kind, _, fixed = sparsity.partition("-")
        drafts_by = draft if divided else draft_of(weights, draft)
        base = SiriusConfig(sparsity=kind, follow=not fixed, density=density, draft_weights=drafts_by, lookup=False)
        read = "" if weights == "plain" else f"{weights} "
        read += "" if draft == "auto" else f"S {draft} "
        yield f"{read}{sparsity} {density} alone", replace(base, mode="sparse"), weights
        for accept, width, period in itertools.product(options.accepts, options.widths, options.periods):
            tree = f", width {width}" if width > 1 else ""
            name = f"{read}{sparsity} {density}, {accept}, period {period}{tree}"
            yield name, replace(base, accept=accept, tree_width=width, period=period), weights
            if options.lookup and kind == "csparse" and width == 1:
                yield f"{name}, copies", replace(base, accept=accept, period=period, lookup=True), weights
