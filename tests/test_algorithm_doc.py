"""The example drawn in docs/algorithm.md is what the ops compute."""

from pathlib import Path

import torch

from sirius_ext.decoding.tree import Tree

DOC = Path(__file__).parents[1] / "docs" / "algorithm.md"
WORDS = ["the", "cat", "dog", "sat", "ran", ".", "Then"]
# What follows a word, by the sparse and by the full model.
S = {"the": {"cat": 0.6, "dog": 0.4}, "cat": {"sat": 0.55, "ran": 0.45}, "dog": {"ran": 0.9, "sat": 0.1}}
S |= {"sat": {".": 0.9, "ran": 0.1}, "ran": {".": 0.6, "sat": 0.4}}
F = {"the": {"dog": 0.85, "sat": 0.1, "cat": 0.05}, "cat": {"ran": 0.8, "sat": 0.2}, "dog": {"ran": 0.7, "sat": 0.3}}
F |= {"sat": {".": 1.0}, "ran": {"sat": 0.8, ".": 0.2}, ".": {"Then": 1.0}}


def logits(model, words):
    """Rows whose softmax at temperature 1 is the model's."""
    return torch.tensor([[model[word].get(next_word, 0.0) for next_word in WORDS] for word in words]).log()


def drafted(backend, width, period):
    tree = Tree(period - 1, width)
    tree.plant(WORDS.index("the"), 0)
    for _ in range(period - 1):
        leaves = [WORDS[token] for token in tree.tokens[tree.leaves]]
        tree.grow(*backend.tree_expand(logits(S, leaves), tree.scores[tree.leaves], width, 1.0))
    return tree


def drawn(backend, width, period):
    """The tree as a table, and what becomes of it."""
    tree = drafted(backend, width, period)
    words = [WORDS[token] for token in tree.tokens[: tree.size]]
    parents = tree.parents[: tree.size]
    likelihoods, argmax, path = backend.accept(
        logits(F, words), tree.tokens[1 : tree.size], 0.1, 1.0, parents=parents, scores=tree.scores[: tree.size]
    )
    lines = ["node  token  parent  score   sees                F gives it"]
    for node, word in enumerate(words):
        sees = " ".join(words[seen] for seen in [*([0] if node else []), *tree.path(node)]) or word
        given = "" if node == 0 else f"{likelihoods[node - 1]:.2f}"
        verdict = "" if node == 0 else "  rejected" if likelihoods[node - 1] < 0.1 else ""
        parent = "" if node == 0 else int(parents[node])
        lines.append(f"{node:>4}  {word:<5}  {parent:>6}  {tree.scores[node].exp():5.3f}   {sees:<18}  {given}{verdict}".rstrip())
    own = WORDS[argmax[path[-1] if len(path) else 0]]
    lines.append(f"accepted: {[words[node] for node in path]}, then the bonus token: {own!r}")
    moves = [f"{node} -> {place}" for place, node in enumerate(path.tolist(), start=1) if node != place]
    lines.append(f"cache entries moved: {', '.join(moves) or 'none'}")
    return "\n".join(lines)


def test_the_example(backend):
    text = DOC.read_text()
    for width in (1, 2):
        assert drawn(backend, width, 4) in text, drawn(backend, width, 4)


def followed(backend):
    """The set that follows the text, as a table."""
    statistic, lines = torch.tensor([[0.5, 0.3, 0.18, 0.02]]), ["            neuron 0  neuron 1  neuron 2  neuron 3   kept"]

    def line(name, values, kept=()):
        cells = "".join(f"{value:>10.2f}" for value in values)
        lines.append(f"{name:<10}{cells}   {' '.join(map(str, kept))}".rstrip())

    def choose(z, rows):
        rows = torch.tensor(rows, dtype=torch.int32)
        return backend.follow(z, rows, torch.ones(1, 4), statistic, 2, 0.5)[0].tolist()

    line("prompt", statistic[0].tolist(), choose(torch.zeros(1, 1, 4), []))
    for shares in ([0.1, 0.1, 0.7, 0.1], [0.0, 0.6, 0.2, 0.2]):
        line("token", shares)
        kept = choose(torch.tensor(shares).sqrt().view(1, 1, 4), [0])
        line("  then s", statistic[0].tolist(), kept)
    return "\n".join(lines)


def test_the_set_that_follows(backend):
    assert followed(backend) in DOC.read_text(), followed(backend)
