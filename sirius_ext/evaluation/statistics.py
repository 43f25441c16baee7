"""How sure a measured accuracy is, and whether two on the same items differ."""

from __future__ import annotations

import math


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion, 95 % with z = 1.96 (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    width = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, middle - width), min(1.0, middle + width)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: the probability that as uneven a split, or a more uneven one, of the items which only one
    of the two answered right is chance."""
    total = gained + lost
    tail: float = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)
