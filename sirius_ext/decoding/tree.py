"""What the sparse model drafts: a tree of tokens after the last committed one (SPEC sections 3 and 4). A chain is one of width
1."""

from __future__ import annotations

import torch

from ..kernels import ops


class Tree:
    """Up to `depth` tokens ahead in up to `width` branches. Node 0 is x0; the nodes of a depth stand side by side, after those
    of the depth before. Node i's cache slot is the root's position + i.

    tokens, parents: int32 [nodes].
    scores: float32 [nodes], cumulative log-likelihoods under S.
    mask: int64 [nodes, words], the tree attention mask.
    """

    def __init__(self, depth: int, width: int) -> None:
        self.width, self.capacity = width, 1 + depth * width
        self.tokens = torch.zeros(self.capacity, dtype=torch.int32, device="cpu")
        self.scores = torch.zeros(self.capacity, dtype=torch.float32, device="cpu")
        self._depths = torch.zeros_like(self.tokens)
        self.parents = torch.full_like(self.tokens, -1)
        if width == 1:  # the shape of a chain never changes
            self.parents = torch.arange(-1, depth, dtype=torch.int32, device="cpu")
            self._depths = self.parents + 1
        self.mask = ops.tree_mask(self.parents)
        self.plant(0, 0)

    def plant(self, token: int, position: int) -> None:
        """Begin anew from x0 at a position."""
        self.tokens[0] = token
        self.position, self.depth = position, 0
        self._starts = [0, 1]  # where each depth's nodes begin, and where they end
        self._positions = self._depths + position

    @property
    def size(self) -> int:
        return self._starts[-1]

    @property
    def leaves(self) -> slice:
        """The nodes of the last depth."""
        return slice(self._starts[-2], self._starts[-1])

    def positions(self, nodes: slice) -> torch.Tensor:
        """Their places in the text, int32."""
        return self._positions[nodes]

    def grow_chain(self) -> None:
        """One more node, whose token stands in `tokens` already."""
        self.depth += 1
        self._starts.append(self.size + 1)

    def grow(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        """One more depth: tokens, their parents among the leaves int32 [c], scores float32 [c]; c <= width. None: no depth."""
        if len(tokens) == 0:
            return
        leaves, new = self.leaves, slice(self.size, self.size + len(tokens))
        self.depth += 1
        self._starts.append(new.stop)
        self.tokens[new], self.scores[new] = tokens, scores
        if self.width > 1:
            self.parents[new] = parents + leaves.start
            self.parents[new.stop :] = -1
            self._depths[new] = self.depth
            self._positions[new] = self.position + self.depth
            ops.tree_mask(self.parents, out=self.mask)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Tokens, parents and scores of the tree so far, in a device's memory. A chain has no need of the last two."""
        tokens = self.tokens[: self.size].to(device)
        if self.width == 1:
            return tokens, None, None
        return tokens, self.parents[: self.size].to(device), self.scores[: self.size].to(device)

    def path(self, node: int) -> list[int]:
        """The nodes on the way from the root, which is left out, to this one."""
        path = []
        while node > 0:
            path.append(node)
            node = int(self.parents[node])
        return path[::-1]

    def first_child(self, node: int) -> int | None:
        """The node that was proposed first after this one; None if there is none."""
        if self.width == 1:
            return node + 1 if node + 1 < self.size else None
        children = (self.parents[: self.size] == node).nonzero()
        return int(children[0]) if len(children) else None

    def branch(self, path: list[int]) -> int | None:
        """Which of its depth the last node of a path is, likeliest first; None for the empty path."""
        return path[-1] - self._starts[len(path)] if path else None
