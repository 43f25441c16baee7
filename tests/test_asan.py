"""The CUDA kernels under AddressSanitizer: no thread reads or writes beyond an array, be it in global or in shared memory."""

import pytest
import simt_builds
from test_simt import MUTATIONS, SANITIZER

OPS = ["linear", "gate_up", "fsparse_ops", "down", "rms_norm", "rope_kv_write", "tree_attention", "tree_mask", "tree_expand"]
OPS += ["accept", "kv_rewrite", "decode_step", "cascade", "q8", "q4"]
FILES = [f"tests/test_{op}.py" for op in OPS]
# Aligned rows and others; of the element types one that tensor cores multiply. In what order threads run does not change what
# they touch.
CASES = (
    "simt-random and not float32 and not (float16 and not bfloat16) and "
    "(against_reference or test_cases or test_trees or test_shapes or select_by_threshold or at_every_size or from_memory or "
    "(norms_and_partial_rotation and 0.5) or edge_of_a_window or side_by_side or gate_and_up_of_a_list or select_from_a_list or "
    "(cuda_is_its_ops and gemma3))"
)


@pytest.fixture(scope="module")
def module():
    return simt_builds.sanitized()


def pytest_under(module, *arguments):
    return simt_builds.run_sanitized(module, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments)


def test_ops(module):
    run = pytest_under(module, *FILES, "-k", CASES)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


SMALL = """
import sys
sys.path.insert(0, "tests")
import simt_builds
simt_builds.load(sys.argv[1]).run_fault(sys.argv[2], sys.argv[3] == "broken")
"""


@pytest.mark.parametrize("kernel", SANITIZER)
def test_an_access_beyond_the_end_is_found(module, kernel):
    right, broken = (simt_builds.run_sanitized(module, "-c", SMALL, module, kernel, form) for form in ("right", "broken"))
    assert right.returncode == 0, right.stderr
    assert broken.returncode != 0 and "heap-buffer-overflow" in broken.stderr


def test_a_fault_in_a_kernel_is_found():
    mutation, _ = MUTATIONS["down writes a column too many"]
    module = mutation.build(simt_builds.SANITIZED, simt_builds.SANITIZER)
    run = pytest_under(module, "tests/test_down.py", "-k", "simt-forward and bfloat16 and against_reference and dense")
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr
