"""`period="auto"`: the choice by made-up costs, and that it changes nothing but the time."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, engine, prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.config import MAX_AUTO_PERIOD
from sirius_ext.decoding import reference
from sirius_ext.decoding.period import AdaptivePeriod, Costs
from sirius_ext.decoding.sequence import Sequence

KIND = ("csparse", 0.5)

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed(Costs):
    """A pass of F costs so many passes of S at one row, and so many more for each further one."""

    def __init__(self, one, more=0.0):
        super().__init__()
        self.one, self.more = one, more

    def full(self, kind, rows):
        return self.one + self.more * (rows - 1)


def periods(adaptive, count, accepts):
    """`count` periods; accepts: how many of the drafts are right, by their number."""
    chosen = []
    for _ in range(count):
        chosen.append(adaptive.next())
        adaptive.observe(chosen[-1] - 1, accepts(chosen[-1] - 1))
    return chosen


# ---------------------------------------------------------------------------------------------------------------------- costs


def line(made, kind=KIND):
    return [made.full(kind, rows) for rows in (1, 16, 31)]


ASSUMED = pytest.approx([1.3, 1.6, 1.9])


def test_what_is_assumed_at_first():
    assert line(Costs()) == ASSUMED


@given(one=st.floats(0.8, 3), more=st.floats(0, 0.2), rows=st.lists(st.integers(1, 40), min_size=20, max_size=60))
def test_the_line_is_found(one, more, rows):
    """Up to what was assumed, which weighs less and less, by at least two different numbers of rows."""
    made = Costs()
    for m in [1, 40, *rows] * 5:
        made.observe(KIND, m, one + more * (m - 1))
    assert line(made) == pytest.approx([one + more * (m - 1) for m in (1, 16, 31)], abs=0.25)


def test_the_line_follows_and_forgets():
    made = Costs()
    for ratio in (2.0, 1.2):
        for rows in [1, 8] * 200:
            made.observe(KIND, rows, ratio)
        assert line(made)[:2] == pytest.approx([ratio, ratio], abs=0.1)


def test_the_line_never_falls():
    """Measurements that say that more rows are cheaper are noise."""
    made = Costs()
    for _ in range(50):
        made.observe(KIND, 1, 2.0)
        made.observe(KIND, 20, 1.0)
    low, middle, high = line(made)
    assert low == middle == high == pytest.approx(1.5, abs=0.1)


def test_one_disturbed_pass_changes_little():
    made = Costs()
    for _ in range(20):
        made.observe(KIND, 4, 1.3)
    before = line(made)
    made.observe(KIND, 4, 1000.0)
    made.observe(KIND, 4, 0.0)
    assert line(made) == pytest.approx(before, rel=0.15)


def test_kinds_are_told_apart():
    made = Costs()
    made.observe("another kind", 1, 2.0)
    assert line(made) == ASSUMED and line(made, "another kind") != ASSUMED


def test_only_neighbours_are_compared(monkeypatch):
    """F with S's passes of its own period or the one before, and F alone with the S that follows it at once."""
    seen = []
    monkeypatch.setattr(Costs, "observe", lambda self, kind, rows, ratio: seen.append((rows, round(ratio, 3))))
    adaptive = AdaptivePeriod(Costs(), KIND)

    def period(sparse, rows, full):
        seen.clear()
        for seconds in sparse:
            adaptive.saw_sparse(seconds)
        adaptive.saw_full(rows, full)
        return list(seen)

    assert period([], 1, 9.0) == []
    assert period([1.0, 2.0, 50.0], 4, 3.0) == [(1, 4.5), (4, 1.5)]
    assert period([4.0], 2, 6.0) == [(2, 1.5)]
    assert period([], 1, 5.0) == [(1, 1.25)]
    assert period([], 1, 7.0) == []
    assert period([2.0], 2, 3.0) == [(1, 3.5), (2, 1.5)]


# ----------------------------------------------------------------------------------------------------------------- the choice


def cost_per_token(made, n, width, alpha):
    """By the definition: a period's expected cost over its expected tokens."""
    return (n - 1 + made.full(KIND, 1 + (n - 1) * width)) / sum(alpha**i for i in range(n))


@given(
    one=st.floats(0.7, 30),
    more=st.floats(0, 2),
    width=st.sampled_from([1, 2, 4, 16]),
    history=st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), max_size=30),
)
def test_the_choice_is_the_cheapest_per_token(one, more, width, history):
    """Among 1 to 32, and at most twice the last one, but 4 at least."""
    made = Fixed(one, more)
    adaptive, last = AdaptivePeriod(made, KIND, width), 4
    for drafted, accepted in [(0, 0), *history]:
        adaptive.observe(drafted, min(accepted, drafted))
        assert 0 <= adaptive.alpha <= 1
        each = {n: cost_per_token(made, n, width, adaptive.alpha) for n in range(1, MAX_AUTO_PERIOD + 1)}
        chosen, limit = adaptive.next(), max(2 * last, 4)
        best = min(each.values())
        if chosen < limit or chosen == 1:
            assert each[chosen] == pytest.approx(best, rel=1e-9)
        else:
            assert chosen == limit <= min(n for n in each if each[n] <= best * (1 + 1e-9))
        last = chosen
        if chosen == 1:
            return  # what comes then is told below


@pytest.mark.parametrize("longest", [32, 20, 9])
def test_long_periods_where_drafts_are_right_and_cheap(longest):
    adaptive = AdaptivePeriod(Fixed(20), KIND, longest=longest)
    chosen = periods(adaptive, 12, lambda drafted: drafted)
    assert chosen[0] == 8 and all(after <= 2 * before for before, after in itertools.pairwise(chosen))
    assert chosen[-1] == longest and adaptive.alpha > 0.99


def test_short_periods_where_drafts_are_often_wrong():
    adaptive = AdaptivePeriod(Fixed(10), KIND)
    chosen = periods(adaptive, 60, lambda drafted: min(1, drafted))
    assert set(chosen[20:]) <= {2, 3, 4} and 0.4 < adaptive.alpha < 0.7


def test_the_period_follows_the_text():
    """What was true of its beginning is forgotten."""
    adaptive = AdaptivePeriod(Fixed(10), KIND)
    easy = periods(adaptive, 20, lambda drafted: drafted)
    hard = periods(adaptive, 60, lambda drafted: min(1, drafted))
    again = periods(adaptive, 60, lambda drafted: drafted)
    assert easy[-1] > 16 and hard[-1] < 5 and again[-1] > 16


def test_dear_verification_makes_short_periods():
    """Where a full pass costs as much per row as a chain of them, only one thing is cheap."""
    linear = Fixed(10, 10)
    assert periods(AdaptivePeriod(linear, KIND), 20, lambda drafted: drafted)[-1] == 1
    wide, narrow = (periods(AdaptivePeriod(Fixed(10, 0.5), KIND, width), 30, lambda drafted: drafted)[-1] for width in (16, 1))
    assert 1 <= wide < narrow


def test_without_a_gain_drafting_is_tried_again_from_time_to_time():
    """After 32 tokens by F alone, then 64, ..., 512 at most."""
    adaptive = AdaptivePeriod(Fixed(0.5), KIND)
    chosen = periods(adaptive, 3000, lambda drafted: 0)
    alone = [len(list(run)) for period, run in itertools.groupby(chosen) if period == 1]
    assert set(chosen) == {1, 4}
    assert alone[:-1] == [32, 64, 128, 256, 512, 512, 512, 512][: len(alone) - 1] and len(alone) >= 7
    assert [len(list(run)) for period, run in itertools.groupby(chosen) if period == 4] == [1] * (len(alone) - 1)


def test_a_probe_that_pays_ends_the_waiting():
    made = Fixed(10)
    adaptive = AdaptivePeriod(made, KIND)
    periods(adaptive, 300, lambda drafted: 0)
    assert adaptive.alpha < 0.2
    chosen = periods(adaptive, 600, lambda drafted: drafted)
    assert chosen[-1] > 16
    # And the next time it waits 32 tokens again.
    chosen = periods(adaptive, 300, lambda drafted: 0)
    alone = [len(list(run)) for period, run in itertools.groupby(chosen) if period == 1]
    assert alone[:2] == [32, 64]


def test_a_text_begins_where_the_last_one_ended():
    made = Fixed(3.3)
    assert AdaptivePeriod(made, KIND, assumed=0.99).next() > AdaptivePeriod(made, KIND, assumed=0.6).next() > 1
    assert AdaptivePeriod(made, KIND, assumed=0.05).next() == 1


# ------------------------------------------------------------------------------------------------------------------- the text


def decode(name, config, length, count, **settings):
    out = engine(name).generate(prompt(length), config=config, max_new_tokens=count, **settings)
    return out.sequences[0, length:].tolist(), out.stats.prompts[0]


@pytest.fixture
def forced(monkeypatch):
    """Periods that change, as the clock of a tiny model would not have them: a list of those chosen."""
    chosen = []
    order = itertools.cycle((4, 8, 1, 2, 16, 1, 1, 5, 32, 3))

    def next_period(self):
        chosen.append(min(next(order), self.longest))
        return chosen[-1]

    monkeypatch.setattr(AdaptivePeriod, "next", next_period)
    return chosen


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
@pytest.mark.parametrize("name", NAMES)
def test_match_is_the_full_text(name, sparsity, width):
    config = SiriusConfig(period="auto", accept="match", sparsity=sparsity, tree_width=width, density=0.4)
    for length in (1, 8, 33):
        tokens, stats = decode(name, config, length, 60)
        assert tokens == decode(name, SiriusConfig(mode="full"), length, 60)[0]
        assert stats.period == "auto" and sum(period.committed for period in stats.periods) == 59
        assert all(period.drafted < MAX_AUTO_PERIOD for period in stats.periods)


def planned(stats):
    """The periods that were chosen, as far as the stats tell: a period that was cut had at least so many."""
    return [period.drafted + 1 + period.cut for period in stats.periods]


@pytest.mark.parametrize("accept", ["threshold", "match", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_its_periods(forced, name, accept):
    for sparsity, width in (("csparse", 1), ("fsparse", 3)):
        config = SiriusConfig(period="auto", accept=accept, sparsity=sparsity, tree_width=width, density=0.3, threshold=0.05)
        asked, sampling = {}, None
        if accept == "sample":
            asked = {"do_sample": True, "top_k": 0, "generator": torch.Generator().manual_seed(1)}
            sampling = reference.Sampling(torch.Generator().manual_seed(1))
        before = len(forced)
        tokens, stats = decode(name, config, 8, 40, **asked)
        expected, records = reference.generate(
            reference.Decoder(tiny(name)), prompt(8)[0].tolist(), config, 40, sampling=sampling, periods=iter(planned(stats))
        )
        assert tokens == expected
        columns = ("drafted", "nodes", "accepted", "branch", "committed", "cut")
        assert [[getattr(period, column) for column in columns] for period in stats.periods] == [
            [getattr(period, column) for column in columns] for period in records
        ]
        # The stats tell the truth about what was chosen.
        for period, wanted in zip(stats.periods, forced[before:], strict=True):
            assert period.drafted == wanted - 1 or period.cut and period.drafted < wanted - 1


def test_under_threshold_the_text_is_that_of_the_periods_measured():
    """Nothing forced: whatever the clock said."""
    config = SiriusConfig(period="auto", density=0.4, threshold=0.05)
    for length in (5, 9):
        tokens, stats = decode("llama3", config, length, 60)
        expected, _ = reference.generate(
            reference.Decoder(tiny("llama3")), prompt(length)[0].tolist(), config, 60, periods=iter(planned(stats))
        )
        assert tokens == expected


def test_metrics_of_changing_periods(forced):
    _, stats = decode("llama3", SiriusConfig(period="auto", density=0.5, threshold=0), 8, 60)
    whole = [period for period in stats.periods if not period.cut]
    assert len({period.drafted for period in whole}) > 4
    committed = sum(period.committed for period in whole)
    assert stats.average_advance_length == committed / len(whole)
    assert stats.effective_density == pytest.approx(sum(period.drafted * stats.density + 1 for period in whole) / committed)


def test_costs_are_kept_with_the_model(monkeypatch):
    """A second text knows what the first one measured; kinds of passes are told apart."""
    fresh, seen = Engine(tiny("llama3")), []
    first = AdaptivePeriod.next
    monkeypatch.setattr(AdaptivePeriod, "next", lambda self: seen.append(self) or first(self))
    for config in (
        SiriusConfig(period="auto", density=0.4),
        SiriusConfig(period="auto", density=0.4),
        SiriusConfig(period="auto", density=0.4, sparsity="fsparse"),
        SiriusConfig(period="auto", density=0.2),
        SiriusConfig(period="auto", density=0.4, tree_width=2),
    ):
        fresh.generate(prompt(8), config=config, max_new_tokens=30)
    assert len({id(each.costs) for each in seen}) == 1
    assert len({each.kind for each in seen}) == 4
    assert all(seen[0].costs.full(each.kind, 1) != Costs().full(each.kind, 1) for each in seen)


def test_a_period_of_one_is_a_plain_step(monkeypatch):
    """Drafting nothing costs no pass of S."""
    monkeypatch.setattr(AdaptivePeriod, "next", lambda self: 1)
    passes, run = [], Sequence._pass

    def watched(self, nodes, sparsity=None, argmax=None, keep_z=False):
        passes.append(sparsity)
        return run(self, nodes, sparsity, argmax, keep_z)

    monkeypatch.setattr(Sequence, "_pass", watched)
    tokens, stats = decode("qwen2", SiriusConfig(period="auto"), 8, 20)
    assert tokens == decode("qwen2", SiriusConfig(mode="full"), 8, 20)[0]
    assert passes == [None] * 38 and all(period.drafted == 0 for period in stats.periods)
