"""As many threads as the process may use CPUs, unless somebody has chosen."""

import os

import pytest
import torch
from machines import fake_machine

from sirius_ext import _C
from sirius_ext.control_groups import cpu_limit
from sirius_ext.kernels import threads
from sirius_ext.kernels.threads import choose_threads, cpu_threads

V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/y\n0::/z\n"}


def v2(path, text):
    return {f"sys/fs/cgroup/{path}cpu.max": text + "\n"}


def v1(path, quota, period=100000):
    folder = f"sys/fs/cgroup/cpu/{path}"
    return {f"{folder}cpu.cfs_quota_us": f"{quota}\n", f"{folder}cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    "files, limit",
    [
        ({}, None),
        ({"proc/self/cgroup": "of no use"}, None),
        (V2, None),
        ({**V2, **v2("a/b/", "max 100000")}, None),
        ({**V2, **v2("a/b/", "400000 100000")}, 4),
        ({**V2, **v2("a/b/", "150000 100000")}, 2),
        ({**V2, **v2("a/b/", "1000 100000")}, 1),
        ({**V2, **v2("a/b/", "max 100000"), **v2("a/", "300000 100000")}, 3),  # of a group above
        ({**V2, **v2("a/b/", "200000 100000"), **v2("", "100000 50000")}, 2),
        ({**V2, **v2("other/", "100000 100000")}, None),
        ({**V2, **v2("a/b/", "nothing of use")}, None),
        ({**V1, **v1("x/", 250000)}, 3),
        ({**V1, **v1("x/", -1)}, None),
        ({**V1, **v1("x/", -1), **v1("", 50000, 50000)}, 1),  # a container sees its own group as the root
        ({**V1, **v1("y/", 100000)}, None),
        ({**V1, **v1("x/", 100000, 0)}, None),
    ],
    ids=str,
)
def test_the_limit_of_control_groups(monkeypatch, tmp_path, files, limit):
    fake_machine(monkeypatch, tmp_path, files)
    assert cpu_limit() == limit


@pytest.fixture
def fresh(monkeypatch):
    """A process that has computed nothing so far, on a machine with 64 CPUs, of which torch takes all."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_chosen", False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(64)
    yield monkeypatch
    torch.set_num_threads(before)


def limited(monkeypatch, limit):
    monkeypatch.setattr(threads, "cpu_limit", lambda: limit)


@pytest.mark.parametrize("seen", [64, 32])  # CPUs, or cores
def test_no_more_than_may_be_used(seen, fresh):
    torch.set_num_threads(seen)
    limited(fresh, 4)
    assert cpu_threads() == torch.get_num_threads() == 4


@pytest.mark.parametrize("limit", [None, 64, 100])
def test_without_a_limit_they_stay(limit, fresh):
    limited(fresh, limit)
    assert cpu_threads() == 64


def test_a_choice_stays(fresh):
    limited(fresh, 4)
    torch.set_num_threads(7)
    assert cpu_threads() == 7
    torch.set_num_threads(64)  # later than the first call
    assert cpu_threads() == 64


def test_a_choice_by_a_setting_stays(fresh):
    limited(fresh, 2)
    choose_threads(3)
    assert cpu_threads() == 3
    with pytest.raises(ValueError, match="threads: expected 1 to "):
        choose_threads(0)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_choice_by_the_environment_stays(name, fresh):
    limited(fresh, 4)
    fresh.setenv(name, "64")
    assert cpu_threads() == 64


def test_ops_take_that_many(fresh):
    """The first call of any op."""
    limited(fresh, 2)
    from sirius_ext.kernels import ops

    ops.linear(torch.ones(1, 4), torch.ones(3, 4))
    assert torch.get_num_threads() == 2


# ----------------------------------------------------------------------------------------------- a machine that others use, too


class Machine:
    """Passes of a crew on as many cores, of which others use some for half of the time."""

    def __init__(self, cores):
        self.cores, self.crew, self.used = cores, _C.Crew(), []

    def run(self, seconds, others):
        """For so long. Returns the tokens that were decoded, a second of one thread's work each, and how many threads did it."""
        tokens, sizes = 0.0, []
        while seconds > 0:
            size = self.crew.size(self.cores)
            stands = size > self.cores - others  # a thread has no core of its own
            took = 0.01 * (2 if stands else 1)
            self.crew.passed(size, took, 0.01 * (size - 1) if stands else 0.0)
            tokens += 0.01 * size
            seconds -= took
            sizes.append(size)
        return tokens, sizes


@pytest.mark.parametrize("cores, others", [(8, 1), (8, 3), (3, 1), (16, 2)])
def test_fewer_threads_where_others_use_some_cores(cores, others):
    machine = Machine(cores)
    quiet, sizes = machine.run(30, 0)
    assert quiet == pytest.approx(30 * cores, rel=0.01) and set(sizes) == {cores}
    tokens, sizes = machine.run(60, others)
    assert set(sizes[len(sizes) // 4 :]) <= {cores - others, cores - others + 1}  # one more is tried now and then
    assert tokens > 0.95 * 60 * (cores - others) and tokens > 1.2 * 60 * cores / 2
    machine.run(20, 0)
    assert machine.run(1, 0)[1][-1] == cores  # they all come back


def test_a_thread_is_not_left_out_for_little():
    """Seven threads do what eight do while one of them stands for an eighth of the time."""
    crew = _C.Crew()
    for _ in range(1000):
        assert crew.size(8) == 8
        crew.passed(8, 0.01, 7 * 0.01 / 8)


def test_the_last_thread_stays():
    crew = _C.Crew()
    for _ in range(1000):
        size = crew.size(2)
        assert size in (1, 2)
        crew.passed(size, 0.05, 0.04 * (size - 1))
    assert crew.size(2) == 1
    assert crew.size(1) == 1 and crew.size(4) == 4  # other passes


def test_a_pass_of_other_times_does_not_count():
    crew = _C.Crew()
    assert crew.size(4) == 4
    for _ in range(100):
        crew.passed(3, 1.0, 2.0)
    assert crew.size(4) == 4
