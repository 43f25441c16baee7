"""Copies from the text: what is found, and that they change nothing but the number of passes."""

import functools

import pytest
import torch
from backends import emulated
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, WINDOW, own_bits, prompt, tiny
from transformers import LogitsProcessorList

from sirius_ext import Engine, SiriusConfig, Stats, _simt
from sirius_ext.decoding import reference, sequence
from sirius_ext.decoding.lookup import LONGEST, MOST, PRIOR_RIGHT, Chances, Lookup
from sirius_ext.decoding.period import AdaptivePeriod, Copying, Costs
from sirius_ext.decoding.period_graph import PeriodGraph
from sirius_ext.engine import prepare
from sirius_ext.evaluation.batched import Batch
from sirius_ext.evaluation.plan import Plan

CHEAP = Costs(0.1, ((4, 1.0), (16, 1.05)))  # S drafts on for long
DEARER = Costs(0.3, ((4, 1.05), (16, 1.3)), 0.01)
FREE = [1.0] * (1 + MOST)  # rows cost nothing
FIFTHS = [1 + 0.19 * copies for copies in range(1 + MOST)]  # a row costs what a copy after one equal token is worth, at first
COLUMNS = ("drafted", "nodes", "accepted", "branch", "committed", "cut", "likelihoods")


# --------------------------------------------------------------------------------------------------------------- what is found


def searched(tokens):
    """By hand: how many last tokens stand earlier in a list, four at most, and what followed there last."""
    for length in range(min(LONGEST, len(tokens) - 1), 0, -1):
        for place in range(len(tokens) - 1, length - 1, -1):
            if tokens[place - length : place] == tokens[-length:]:
                return length, [tokens[place + index % (len(tokens) - place)] for index in range(MOST)]
    return 0, []


def eager(prompt=()):
    """A lookup that copies all it can."""
    lookup = Lookup(prompt)
    lookup._chances._right = list(lookup._chances._judged)
    return lookup


TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(TOKENS, st.lists(st.tuples(st.booleans(), TOKENS), max_size=8), st.integers(-1, MOST + 2))
def test_finds_what_a_search_finds(start, changes, most):
    """Whatever is committed, drafted and dropped on the way."""
    lookup, text, draft = eager(start), list(start), []
    for committed, tokens in changes:
        if committed:
            lookup.commit(tokens)
            text, draft = text + tokens, []
        else:
            lookup.draft(tokens)
            draft = draft + tokens
        matched, copies = searched(text + draft)
        assert lookup.find(most, FREE) == copies[: max(0, most)] and lookup._found.equal == matched


@pytest.mark.parametrize(
    ("text", "copies"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3], []),
        ([1, 2, 1], [2, 1, 2, 1, 2, 1, 2, 1]),  # goes on as it has begun
        ([7], []),
        ([7, 7], [7] * 8),
        ([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], [9, 5, 2, 3, 8, 1, 2, 3]),  # three tokens go before two of later
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2, 6, 1, 2, 6, 1]),  # the latest of equally many
    ],
    ids=str,
)
def test_examples(text, copies):
    assert eager(text).find(MOST, FREE) == copies


def test_a_draft_leaves_no_trace():
    lookup = eager([1, 2, 3])
    lookup.draft([1, 9, 1])
    assert lookup.find(2, FREE) == [9, 1]
    lookup.commit([1])
    assert lookup.find(2, FREE) == [2, 3]


def test_how_many_are_copied_is_learnt():
    """Few after one equal token, more after four; none where they are always wrong, and again where they would be right."""
    one, four = Lookup([1, 2, 3, 4, 5, 6, 1]), Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4])
    assert len(one.find(MOST, FIFTHS)) == 1 and 1 < len(four.find(MOST, FIFTHS)) < MOST
    four.learn([0])
    fewer = len(four.find(MOST, FIFTHS))
    for _ in range(30):
        four.find(MOST, FIFTHS)
        four.learn([0])
    assert fewer > 1 and four.find(MOST, FIFTHS) == []
    for _ in range(60):
        four.find(MOST, FIFTHS)
        four.learn([5])
    assert len(four.find(MOST, FIFTHS)) == MOST
    chances = four._chances
    assert all(right / judged >= 0.18 for right, judged in zip(chances._right[:-1], chances._judged)), "another class"


def test_so_many_are_copied_that_they_are_worth_most():
    """Chances of 1/5, then 1/5 of 1/3, ... by the costs of passes, whatever their steps."""
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    first, both = PRIOR_RIGHT[0], PRIOR_RIGHT[0] * PRIOR_RIGHT[1]
    for costs, count in (
        ([1, 1 + first + 1e-6], 0),
        ([1, 1 + first - 1e-6], 1),
        ([1, 1, 1 + both - 1e-6], 2),
        ([1, 1, 1 + both + 1e-6], 1),
        ([1, 1 + first + 0.1, 1 + first + 0.1], 0),
        ([1, 1 + first + 1e-6, 1 + first + 1e-6], 2),  # the second one costs nothing, if there is a first one
        ([1], 0),
        (FREE, MOST),
    ):
        assert lookup.find(MOST, costs) == [2, 3, 4, 5, 6, 7, 8, 9][:count]
    assert lookup.find(3, FREE) == [2, 3, 4]


def test_after_a_copied_token_the_match_is_longer():
    lookup = Lookup([1, 2, 3, 4, 5, 6, 1])
    before = list(lookup._chances._judged)
    lookup.find(MOST, FREE)
    lookup.learn([2, 3, 9, 5])
    assert [after > judged for after, judged in zip(lookup._chances._judged, before)] == [True, True, True, False]
    assert lookup._chances._right[0] > 0.98 * 10 * PRIOR_RIGHT[0]


@given(TOKENS, st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_what_a_model_alone_would_have_done(prompt, text):
    """By hand, pass by pass."""
    lookup, costs = Lookup(prompt), [1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4]
    copying = Copying(lookup, costs)
    chances, passes, place, match, copies = Chances(), [], 0, None, []
    for index, token in enumerate(text):
        copying.commit([token])
        place += 1
        if index and place <= len(copies) and text[index - place + 1 : index + 1] == copies[:place]:
            assert copying.copies == copies
            continue
        if index:
            chances.learn(match, text[index - place + 1 : index + 1])
            passes.append((place, costs[len(copies)]))
        rate = copying.ledger.rate
        match, place = Lookup([*prompt, *text[: index + 1]]).match(), 0
        copies = chances.copies(match, MOST, [max(1.0, rate) * cost for cost in costs])
        assert copying.copies == copies
        assert (copying.ledger.tokens, copying.ledger.spent) == pytest.approx(tuple(map(sum, zip(*passes))) or (0, 0))


# ---------------------------------------------------------------------------------------------------------------- the same text


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    """Rows are nearly free, so that there are copies. Called with others it has those hold from now on."""
    hold = lambda costs: monkeypatch.setattr(sequence, "costs_of", lambda *_: costs)  # noqa: E731
    hold(CHEAP)
    return hold


def repeating(name, dtype=torch.float32, **config):
    """A model that says the same again and again, but not always: it has few words, and looks back little."""
    model = tiny(name, **config)
    with torch.no_grad():
        model.get_output_embeddings().weight[8:] *= 0.3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.2
    return model.to(dtype)


@functools.cache
def engine(name, dtype=torch.float32):
    return Engine(repeating(name, dtype))


def repetitive(length=48):
    """So is this prompt: int64 [1, length]."""
    ids = prompt(12).repeat(1, 1 + length // 12)[:, :length].clone()
    ids[0, 17::17] = prompt(length)[0, 17::17]
    return ids


def decode(name, config, ids, count, dtype=torch.float32, **settings):
    out = engine(name, dtype).generate(ids, config=config, max_new_tokens=count, do_sample=False, **settings)
    return out.sequences[0, ids.shape[1] :].tolist(), out.stats.prompts[0]


def told(periods):
    """What is the same with copies and without: of F alone it is the tokens only, which copies join in one step."""
    return [
        [getattr(period, column) for column in COLUMNS] for period in periods if period.drafted > getattr(period, "copied", 0)
    ]


def spared(stats):
    """Passes of S that copies have spared."""
    return sum(period.copied for period in stats.periods)


def check(name, values, ids, count, dtype=torch.float32, **settings):
    """The same with copies as without, bit for bit. Returns both stats."""
    plain, before = decode(name, SiriusConfig(**values, lookup=False), ids, count, dtype, **settings)
    tokens, after = decode(name, SiriusConfig(**values, lookup=True), ids, count, dtype, **settings)
    assert tokens == plain and after.finish == before.finish
    if values.get("mode", "sirius") == "sirius":
        assert told(after.periods) == told(before.periods) and spared(before) == 0
    return before, after


@pytest.mark.parametrize("accept", ["match", "threshold"])
@pytest.mark.parametrize("name", NAMES)
def test_fixed_periods(name, accept):
    total = 0
    for period in (2, 4, 8, 16):
        for ids in (repetitive(), prompt(7)):
            values = {"period": period, "accept": accept, "density": 0.6, "threshold": 0.05}
            _, stats = check(name, values, ids, 60)
            total += spared(stats)
            assert all(each.copied == 0 for each in stats.periods) or period > 2, "nothing to copy for the last draft"
            assert all(0 <= each.copied < each.drafted or each.drafted == 0 for each in stats.periods)
    assert total >= 20
    tokens, stats = decode(name, own_bits(**values, lookup=True), repetitive(), 40)
    expected, periods = reference.generate(reference.Decoder(repeating(name)), repetitive()[0].tolist(), own_bits(**values), 40)
    assert tokens == expected and [row[:-1] for row in told(stats.periods)] == [row[:-1] for row in told(periods)]


def planned(periods):
    """The reference's periods for those of a text with copies: where F copied it decoded alone, token by token."""
    for each in periods:
        if each.drafted == each.copied:
            yield from [1] * each.committed
        else:
            yield each.drafted + 1 + each.cut


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("each", [CHEAP, DEARER], ids=["cheap", "dearer"])
@pytest.mark.parametrize("accept", ["match", "threshold"])
def test_the_adaptive_period(monkeypatch, costs, accept, each, follow):
    """The text is that of its periods, and the ledger holds what its passes cost."""
    costs(each)
    ask, spent, total, lengths, ids = sequence.Sequence._ask, [], 0, set(), repetitive()

    def watched(self, nodes, sparsity=None, argmax=None, keep_z=False):
        rows = nodes.stop - nodes.start
        full = each.over(rows) + (each.follow if argmax is None else 0)
        spent.append(each.sparse * each.sparse_with()[rows - 1] if sparsity else full)
        return ask(self, nodes, sparsity, argmax, keep_z)

    monkeypatch.setattr(sequence.Sequence, "_ask", watched)
    for name in NAMES:
        config = own_bits(accept=accept, density=0.6, threshold=0.05, follow=follow)
        spent.clear()
        text = engine(name).start(ids, config=config, max_new_tokens=80, do_sample=False)
        stats = text.run()
        assert text._adaptive.ledger.spent == pytest.approx(sum(spent))
        expected, periods = reference.generate(
            reference.Decoder(repeating(name)), ids[0].tolist(), config, 80, periods=planned(stats.periods)
        )
        assert text.tokens == expected
        assert [row[:-2] for row in told(stats.periods)] == [row[:-2] for row in told(periods) if row[0]]
        total += spared(stats)
        lengths |= {each.drafted for each in stats.periods}
    assert total >= 5 and len(lengths) >= 4


def test_no_copies_where_the_draft_would_end():
    """What the policy would not draft even if all were right is not worth a row."""
    policy = AdaptivePeriod(CHEAP, "match", longest=4)
    assert [policy.goes_on(100, ahead) for ahead in range(4)] == [True, True, True, False]
    assert [policy.goes_on(3, ahead) for ahead in range(4)] == [True, True, False, False]
    policy.drafted(0.99)
    assert [policy.goes_on(100, ahead) for ahead in range(3)] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("name", NAMES)
def test_one_model_alone(name, mode, dtype):
    """Its own text in 16 bits too, where sums are rounded."""
    ids, count = repetitive(), 80
    _, stats = check(name, {"mode": mode, "density": 0.6}, ids, count, dtype)
    text = engine(name, dtype).start(ids, config=SiriusConfig(mode=mode, density=0.6, lookup=True), max_new_tokens=count)
    steps = []
    while not text.ended:
        steps.append(len(text.step().tokens))
    assert len(steps) < 0.95 * count and max(steps) >= 2
    if mode == "sparse":
        assert stats.periods == []
        return
    assert [each.committed for each in stats.periods] == steps[1:] and stats.period == 1 + MOST
    assert stats.average_advance_length > 1 and stats.effective_density == pytest.approx(1 / stats.average_advance_length)
    assert all(each.copied == each.drafted == each.nodes >= each.accepted and each.passes == 0 for each in stats.periods)
    assert any(each.accepted < each.drafted for each in stats.periods) and stats.advice is None


def test_half_precision():
    for accept in ("match", "threshold"):
        _, stats = check("llama3", {"period": 8, "accept": accept, "density": 0.6}, repetitive(), 60, torch.bfloat16)
        assert spared(stats)


def test_windows():
    """Copies reach no further than a sliding window, and look as far back as they would alone."""
    for name in ("mistral_windows", "gemma3"):
        for values in ({"mode": "full"}, {"period": 8, "accept": "match", "density": 0.6}):
            check(name, values, repetitive(WINDOW + 9), 50)
    narrow = Engine(repeating("mistral_windows", sliding_window=3))
    texts = [
        narrow.generate(repetitive(), config=SiriusConfig(mode="full", lookup=lookup), max_new_tokens=40, do_sample=False)
        for lookup in (False, True)
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences) and texts[1].stats.period == 3
    assert 1 <= max(period.drafted for period in texts[1].stats.periods) <= 2


# ------------------------------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize(
    "values", [{"mode": "full"}, {"mode": "sparse"}, {"period": 8}, {"period": 8, "accept": "match"}], ids=str
)
def test_the_end_of_a_text_among_copies(values):
    ids, values = repetitive(), {"density": 0.6, **values}
    whole, stats = decode("llama3", SiriusConfig(**values, lookup=True), ids, 60)
    for token in sorted(set(whole))[::4]:
        expected = whole[: whole.index(token) + 1]
        _, stats = check("llama3", values, ids, 60, eos_token_id=token)
        assert stats.tokens == len(expected) and stats.finish == "eos"
    for count in (1, 2, 3, 5, 23):
        _, stats = check("llama3", values, ids, count)
        assert stats.tokens == count and stats.finish == "length"
    _, stats = check("llama3", values, repetitive(252), 60)
    assert stats.finish == "context" and stats.tokens == 4


def test_a_limit_cuts_a_pass_of_the_full_model():
    _, stats = check("llama3", {"mode": "full"}, repetitive(), 60)
    for count in range(2, 61, 7):
        _, cut = check("llama3", {"mode": "full"}, repetitive(), count)
        assert sum(each.committed for each in cut.periods) == count - 1
        assert sum(each.committed for each in cut.periods if each.cut) <= 1 + MOST
    assert stats.corrected_fraction == 0 and stats.rollback_length > 0  # there is nothing of S to correct


# ------------------------------------------------------------------------------------------------- everything else that decodes


def forbidding(ids, scores):
    """Depends on the whole text up to the row."""
    scores = scores.clone()
    scores[0, ids.sum() % scores.shape[1]] = -torch.inf
    scores[0, ids[0, -1]] -= 2.0
    return scores


@pytest.mark.parametrize("values", [{"mode": "full"}, {"mode": "sparse"}, {"period": 8}, {"accept": "match"}], ids=str)
def test_logits_processors(values):
    """Each row's see the text up to it, and are asked about no text that would not come to be without copies."""
    calls = []

    def process(ids, scores):
        calls[-1].append(ids[0].tolist())
        return forbidding(ids, scores)

    runs = []
    for lookup in (False, True):
        calls.append([])
        config = SiriusConfig(density=0.6, **values, lookup=lookup)
        runs.append(decode("qwen2", config, repetitive(), 40, logits_processor=LogitsProcessorList([process])))
    (plain, before), (tokens, after) = runs
    assert tokens == plain != decode("qwen2", SiriusConfig(density=0.6, **values), repetitive(), 40)[0]
    if "accept" not in values:  # then drafts may end elsewhere
        assert calls[0] == calls[1]
    if values.get("mode") != "sparse":
        assert spared(after)
    if "period" in values:
        assert told(before.periods) == told(after.periods)


def check_wrong_copies(monkeypatch, spoil):
    """The text is the same whatever `spoil(sequence, nodes, result, row)` makes of all from the first row on whose token is a
    wrong copy; and there is such a row."""
    ask, found = sequence.Sequence._ask, []

    def spoiled(self, nodes, sparsity=None, argmax=None, keep_z=False):
        tokens = self._tree.tokens[nodes].clone()
        result = yield from ask(self, nodes, sparsity, argmax, keep_z)
        wrong = [row for row in range(1, len(tokens)) if argmax is not None and result.argmax[row - 1] != tokens[row]]
        if wrong:
            spoil(self, nodes, result, wrong[0])
            found.append(wrong[0])
        return result

    for values in ({"mode": "full"}, {"period": 8, "density": 0.6}):
        expected, _ = decode("llama3", SiriusConfig(**values), repetitive(), 60)
        found.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sequence.Sequence, "_ask", spoiled)
            assert decode("llama3", SiriusConfig(**values, lookup=True), repetitive(), 60)[0] == expected
        assert found


def test_what_only_a_wrong_copy_gives_is_no_error(monkeypatch):
    """Logits that are not finite, after a token that is no part of the text."""

    def spoil(text, nodes, result, row):
        result.argmax[row:] = -1

    check_wrong_copies(monkeypatch, spoil)


@pytest.mark.parametrize("values", [{"mode": "full"}, {"period": 8, "accept": "match", "density": 0.6}], ids=str)
def test_kept_caches(values):
    """What copies left in a cache is what the text itself leaves there."""
    ids = repetitive()
    caches = []
    for lookup in (False, True):
        one = Engine(repeating("llama3"))
        config = SiriusConfig(**values, lookup=lookup)
        out = one.generate(ids, config=config, max_new_tokens=30, do_sample=False)
        assert out.cache.tokens == out.sequences[0, :-1].tolist()
        held = [each[:, :, : len(out.cache.tokens)].clone() for each in (out.cache.k, out.cache.v)]
        more = torch.cat((out.sequences, ids[:, :20]), 1)
        after = one.generate(more, config=config, max_new_tokens=30, do_sample=False, cache=out.cache)
        caches.append((held, after.sequences))
    (plain, plain_text), (copied, copied_text) = caches
    assert all(torch.equal(one, other) for one, other in zip(plain, copied)) and torch.equal(plain_text, copied_text)


@pytest.mark.parametrize("prefix", [0, 12])
def test_side_by_side(prefix):
    """The passes of a batch have rows of copies among them."""
    one, configs = engine("llama3"), []
    for values in ({"mode": "full"}, {"mode": "sparse"}, {"period": 8}, {"period": 4, "accept": "match"}):
        configs.append(own_bits(density=0.6, **values, lookup=True))
    texts = [repetitive(length) for length in (48, 30, 61)]
    asked = {
        (index, number): {"config": config, "max_new_tokens": 40, "do_sample": False}
        for index in range(len(texts))
        for number, config in enumerate(configs)
    }
    requests = ((key, *one.requests(texts[key[0]], **settings)) for key, settings in asked.items())
    found = list(Batch(prepare(one.model), texts[0][0, :prefix]).decode(requests, 5))
    assert len(found) == len(asked)
    for key, text, error in found:
        alone = one.start(texts[key[0]], **asked[key])
        alone.run()
        assert error is None and text.tokens == alone.tokens
        columns = (*COLUMNS[:-1], "copied")
        assert [[getattr(each, name) for name in columns] for each in text.stats.periods] == [
            [getattr(each, name) for name in columns] for each in alone.stats.periods
        ]
        assert asked[key]["config"].mode == "sparse" or spared(text.stats)


def test_the_cuda_backend(monkeypatch):
    """Pass by pass: a period's graph has no rows for copies."""
    monkeypatch.setattr(PeriodGraph, "begin", lambda *_: pytest.fail("a graph"))
    ids = repetitive(30)
    cases = [{"mode": "full"}, {"mode": "sparse"}, {"period": 8}, {"period": "auto", "accept": "match"}]
    expected = [decode("mistral", own_bits(density=0.6, **values, lookup=True), ids, 24) for values in cases]
    with emulated(_simt):
        emulator = Engine(repeating("mistral"))
        for values, (tokens, stats) in zip(cases, expected):
            config = own_bits(density=0.6, **values, lookup=True)
            out = emulator.generate(ids, config=config, max_new_tokens=24, do_sample=False)
            assert out.sequences[0, 30:].tolist() == tokens
            periods = out.stats.prompts[0].periods
            assert [row[:-1] for row in told(periods)] == [row[:-1] for row in told(stats.periods)]
            assert [each.copied for each in periods] == [each.copied for each in stats.periods]


# ------------------------------------------------------------------------------------------------------------ what is found out


def keeps_one_too_many(original):
    """A fault: the first wrong copy stays."""

    def grow(self, copies, *others):
        tokens, logits = yield from original(self, copies, *others)
        if len(tokens) <= len(copies):
            tokens[-1] = self._tree.tokens[self._tree.size - 1] = copies[len(tokens) - 1]
        return tokens, logits

    return grow


def copies_nothing(original):
    """A fault without an effect on the text."""
    return lambda self, copies, *others: original(self, [], *others)


@pytest.mark.parametrize("values", [{"mode": "full"}, {"period": 8, "accept": "match", "density": 0.6}], ids=str)
def test_a_wrong_copy_that_is_kept_would_be_found(monkeypatch, values):
    original = sequence.Sequence._grow
    monkeypatch.setattr(sequence.Sequence, "_grow", copies_nothing(original))
    _, stats = check("llama3", values, repetitive(), 60)
    assert values.get("mode") or not spared(stats)
    monkeypatch.setattr(sequence.Sequence, "_grow", keeps_one_too_many(original))
    with pytest.raises(AssertionError):
        check("llama3", values, repetitive(), 60)


def test_slots_after_the_copies_are_never_seen(monkeypatch):
    """What wrong copies left in the cache."""

    def spoil(text, nodes, result, row):
        for cache in (text.cache.k, text.cache.v):
            cache[:, :, text._length + nodes.start + row :] = torch.nan

    check_wrong_copies(monkeypatch, spoil)


# ------------------------------------------------------------------------------------------------------------ what it goes with


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": "fsparse"}, '^lookup: not with sparsity="fsparse"'),
        ({"sparsity": "fsparse", "mode": "sparse"}, '^lookup: not with sparsity="fsparse"'),
        ({"tree_width": 2}, "^lookup: it needs a chain, tree_width=1, got 2$"),
        ({"accept": "sample"}, '^lookup: not with accept="sample"'),
    ],
    ids=str,
)
def test_what_does_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        SiriusConfig(**values, lookup=True)


def test_what_the_mode_does_not_use_is_no_reason():
    assert SiriusConfig(mode="full", sparsity="fsparse", tree_width=4, accept="sample", lookup=True).lookup


@pytest.mark.parametrize("value", [1, None, "yes", 8])
def test_lookup_is_true_or_false(value):
    with pytest.raises(TypeError, match="^lookup: expected True, False or .auto."):
        SiriusConfig(lookup=value)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_drawn_tokens_are_not_copied(mode):
    with pytest.raises(ValueError, match="lookup=True with do_sample=True"):
        engine("llama3").generate(prompt(5), config=SiriusConfig(mode=mode, lookup=True), max_new_tokens=4, do_sample=True)


def test_effective_density_counts_passes():
    _, stats = check("llama3", {"period": 8, "accept": "match", "density": 0.6}, repetitive(), 60)
    whole = [each for each in stats.periods if not each.cut]
    read = sum((each.drafted - each.copied) * stats.density + 1 for each in whole)
    assert stats.effective_density == pytest.approx(read / sum(each.committed for each in whole))
    assert Stats([stats]).effective_density == stats.effective_density
    assert stats.to_dict()["periods"][0].keys() >= {"copied"}


def test_an_evaluation_is_about_texts():
    with pytest.raises(ValueError, match="^lookup: expected False"):
        Plan("none", "float32", "cpu", None, "csqa", None, ("full",), SiriusConfig(lookup=True))
    assert "lookup" not in Plan("none", "float32", "cpu", None, "csqa", None, ("full",), SiriusConfig()).record()


def test_what_auto_comes_to():
    """Copies where S drafts chains that may end anywhere."""
    assert SiriusConfig().copies and SiriusConfig(accept="match", follow=False).copies
    others = ({"lookup": False}, {"period": 8}, {"mode": "full"}, {"mode": "sparse"}, {"sparsity": "fsparse"})
    others += ({"sparsity": "cascade"}, {"tree_width": 2}, {"accept": "sample"})
    assert not any(SiriusConfig(**values).copies for values in others)
    assert SiriusConfig(lookup=True, period=8).copies and SiriusConfig(lookup=True, mode="full").copies


def test_a_row_that_costs_a_pass_is_not_copied(costs):
    """And where rows cost nothing more are copied than by default."""
    found = []
    for cost in (0.0, 0.2, 1.0):
        costs(Costs(0.1, ((4, 1.0), (16, 1.05)), copies=((1 + MOST, 1 + MOST * cost),)))
        for values in ({"period": 8, "accept": "match"}, {"mode": "sparse"}):
            _, stats = check("llama3", {**values, "density": 0.6}, repetitive(), 80)
            found.append(spared(stats))
    assert found[0] >= found[2] > found[4] == 0 == found[1] == found[3] == found[5]


DEAR = Costs(0.95, ((4, 1.0), (16, 1.05)))  # of S; rows of F cost next to nothing
SOMETIMES = Costs(0.6, ((4, 1.0), (16, 1.1)), copies=((1 + MOST, 1.4),))  # S drafts here and there


@pytest.mark.parametrize("each", [DEAR, SOMETIMES], ids=["never", "sometimes"])
def test_where_s_does_not_draft_the_full_model_copies(costs, each):
    """In fewer passes of its own; and where it never does, as F alone would, step by step."""
    costs(each)
    fewer = drafts = 0
    for name in NAMES:
        values = {"period": "auto", "accept": "match", "density": 0.4}
        plain, before = decode(name, SiriusConfig(**values, lookup=False), repetitive(), 80)
        tokens, after = decode(name, SiriusConfig(**values, lookup=True), repetitive(), 80)
        alone = [period for period in after.periods if period.passes == 0]
        assert tokens == plain and all(
            period.copied == period.nodes >= period.accepted and period.committed == 1 + period.accepted for period in alone
        )
        fewer += len(before.periods) - len(after.periods)
        drafts += len(after.periods) - len(alone)
        assert after.alone == len(alone) / len(after.periods)
        if each is DEAR:
            _, full = decode(name, SiriusConfig(mode="full", lookup=True), repetitive(), 80)
            assert [(period.copied, period.committed) for period in after.periods] == [
                (period.copied, period.committed) for period in full.periods
            ]
    assert fewer >= 20 and (drafts > 0) == (each is SOMETIMES)


@pytest.mark.parametrize("values", [{"mode": "full"}, {"period": "auto"}], ids=str)
def test_rows_that_cost_a_pass_of_the_full_model_are_not_copied(costs, values):
    costs(Costs(0.95, ((4, 4.0), (16, 16.0))))
    _, after = decode("llama3", SiriusConfig(**values, lookup=True), repetitive(), 80)
    assert after.alone == (1 if values.get("period") else after.alone) and all(period.copied == 0 for period in after.periods)
