"""Which neurons the sparse model keeps (SPEC section 2)."""

from __future__ import annotations

import torch


def kept_neurons(density: float, intermediate: int) -> int:
    """round(density * I), at least one."""
    return max(1, round(density * intermediate))


class CSparse:
    """GRIFFIN's statistic, gathered layer by layer during a prompt's full prefill: `stat_i = || zbar[:, i] ||_2`."""

    def __init__(self, num_layers: int, intermediate: int) -> None:
        self._squares = torch.zeros(num_layers, intermediate)

    def observe(self, layer: int, z: torch.Tensor) -> None:
        """Add the prompt tokens z = silu(gate x) * (up x), T [tokens, I]. A token whose z is all zero adds nothing."""
        squares = z.float().square()
        norms = squares.sum(-1, keepdim=True)
        self._squares[layer] += (squares / norms.where(norms > 0, 1.0)).sum(0)

    def select(self, density: float) -> torch.Tensor:
        """The `kept_neurons` largest of each layer, in rising order (sorted rows read faster). Returns int32 [layers, K]."""
        kept = kept_neurons(density, self._squares.shape[1])
        # A stable sort lets the lower index win a tie.
        order = self._squares.sqrt().argsort(dim=-1, descending=True, stable=True)
        return order[:, :kept].sort(-1).values.to(torch.int32)


def csparse_density(density: float, num_mlp_parameters: int, num_parameters: int) -> float:
    """Parameters that CSparse touches for a token, over all parameters: `1 - (1 - d) * M / P` (SPEC section 2)."""
    return 1 - (1 - density) * num_mlp_parameters / num_parameters
