import gc
import os

# Before torch starts OpenMP. The work in these tests is tiny: on a busy machine, threads that spin for it take three times as
# long as threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Another build of the kernels over simt, in place of the usual one: see simt_builds.py.
if path := os.environ.get("SIRIUS_SIMT_MODULE"):
    import sys

    import simt_builds

    sys.modules["sirius_ext._simt"] = simt_builds.load(path)

import backends
import hypothesis
import pytest
import torch
from model_files import tiny_llama

# A fixture chooses the instruction set for all examples of a test alike. The same examples every time, and no files left behind.
hypothesis.settings.register_profile(
    "sirius",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("sirius")


def pytest_collection_modifyitems(config, items):
    """amx-soft is avx512 but for products of bf16 and of packed weights: of cases by element type it takes those of bf16, and the
    other ops' cases are avx512's alone. Its instructions take microseconds each: of whole texts it has those of one family and of
    chains."""

    def needed(item):
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not any(isinstance(value, str) and value.removeprefix("cpu-") == "amx-soft" for value in values):
            return True
        if item.path.name in ("test_families.py", "test_trees.py"):
            return False
        if item.path.name == "test_generate.py" and item.callspec.params.get("name", "llama3") != "llama3":
            return False
        dtypes = [value for value in values if isinstance(value, torch.dtype)]
        return torch.bfloat16 in dtypes if dtypes else "isa" in item.callspec.params

    config.hook.pytest_deselected(items=[item for item in items if not needed(item)])
    items[:] = filter(needed, items)


def pytest_collection_finish():
    """What is there by now, modules and thousands of tests, stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


# Of fixtures and parameters: the kernels of a backend, or of an instruction set.
BY_KERNELS = {"backend", "kernels", "cpu_kernels", "isa"}


@pytest.fixture(autouse=True)
def _same_everywhere(request):
    """The same random numbers in every test. Two threads where a test is of kernels; one elsewhere: tests run side by side, and
    threads that wake for microseconds of work cost a sixth of the time of whole texts."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(2 if BY_KERNELS & set(request.fixturenames) else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    """The module under test: the reference, `ops` with one of the instruction sets that this CPU has, or `ops` with the CUDA
    kernels run by simt."""
    with backends.using(request.param) as module:
        yield module


@pytest.fixture(params=backends.KERNELS)
def kernels(request):
    """Like `backend` without the reference: for what only the kernels promise."""
    with backends.using(request.param) as module:
        yield module


@pytest.fixture(params=backends.CPU_BACKENDS)
def cpu_kernels(request):
    """Like `kernels` without CUDA's: what depends on the number of threads, say."""
    with backends.using(request.param) as module:
        yield module


@pytest.fixture(params=backends.SIMT_BACKENDS)
def cuda_functions(request):
    """The CUDA backend's compiled functions, run by simt: for arguments that the ops do not have."""
    with backends.using(request.param):
        yield backends._simt


@pytest.fixture(params=backends.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def one_thread(_same_everywhere):
    """For tests of models that are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture(params=backends.ops.available_isas())
def isa(request):
    """An instruction set that this CPU has, in use by every engine."""
    with backends.using(f"cpu-{request.param}"):
        yield request.param


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of its own."""
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A model's folder, as save_pretrained writes it."""
    path = tmp_path / "tiny"
    tiny_llama().save_pretrained(path)
    return path
