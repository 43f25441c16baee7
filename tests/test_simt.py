"""That simt finds what it is there to find: in small kernels, and in the backend's own with a fault put in."""

import os
import signal

import backends
import pytest
import simt_builds
import test_accept
import test_cascade
import test_decode_step
import test_down
import test_early_stop
import test_fsparse_ops
import test_linear
import test_q4
import test_q8
import test_rms_norm
import test_tree_attention
import test_tree_expand
import torch
from backends import SIMT_BACKENDS, using
from simt_builds import Mutation

from sirius_ext import _simt
from sirius_ext.kernels import ops
from sirius_ext.kernels.matrix import Format
from sirius_ext.runtime.passes import Kind

NUMBERS = torch.arange(1.0, 257.0).view(4, 2, 32)  # what the small kernels are given: [blocks, warps, lanes]
ONES = torch.ones(256)
RIGHT = {
    "missing_barrier": NUMBERS.flatten(1).flip(1),
    "missing_second_barrier": 2 * NUMBERS.flip(1) + 1,
    "missing_warp_barrier": NUMBERS.flip(2),
    "divergent_barrier": ONES,
    "early_return": ONES,
    "shuffle_from_outside": torch.cat([NUMBERS[..., 15:16].expand(-1, -1, 16), NUMBERS[..., 16:]], 2),
    "lane_outside_its_mask": NUMBERS[..., 3:4].expand(-1, -1, 32),
    "different_operations": NUMBERS.unflatten(2, (16, 2)).flip(3),
    "missing_lane": NUMBERS.sum(2, keepdim=True).expand(-1, -1, 32),
    "misaligned_load": NUMBERS * (torch.arange(64) == 0).view(2, 32),
    "misaligned_store": NUMBERS[:1, :1].expand(4, 2, 32) * (torch.arange(64) < 4).view(2, 32),
    "uninitialised_memory": NUMBERS.flatten(1).flip(1),
    "early_read": NUMBERS + 1,
    "missing_wait": ONES,
    "not_the_last_block": torch.tensor([10.0] + [0.0] * 255),
    "beyond_shared_memory": ONES,
    "read_beyond_the_end": NUMBERS,
    "write_beyond_the_end": NUMBERS,
}
MESSAGES = {
    "divergent_barrier": "threads wait for each other .* 32 threads at __syncthreads .* 32 threads at __syncthreads",
    "early_return": "threads wait for each other .* 63 threads at __syncthreads .* 1 threads at the end",
    "shuffle_from_outside": "shuffle from lane 16, which is outside the mask",
    "lane_outside_its_mask": "a lane outside the mask of __shfl_sync",
    "different_operations": "lanes of a warp meet at __shfl_xor_sync .* and __shfl_xor_sync",
    "missing_lane": "threads wait for each other",
    "misaligned_load": "no multiple of 16",
    "misaligned_store": "no multiple of 16",
    "missing_wait": "a thread ended that has not waited for the kernel before",
}
WRONG = [
    "early_read",
    "missing_barrier",
    "missing_second_barrier",
    "missing_warp_barrier",
    "uninitialised_memory",
    "not_the_last_block",
]
SANITIZER = ["beyond_shared_memory", "read_beyond_the_end", "write_beyond_the_end"]


def result(kernel, broken):
    return torch.tensor(_simt.run_fault(kernel, broken))


@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("order", SIMT_BACKENDS)
def test_a_right_kernel_passes(kernel, order):
    with using(order):
        assert torch.equal(result(kernel, False), RIGHT[kernel].flatten())


@pytest.mark.parametrize("kernel", MESSAGES)
@pytest.mark.parametrize("order", SIMT_BACKENDS)
def test_an_error_is_thrown(kernel, order):
    with using(order), pytest.raises(RuntimeError, match=MESSAGES[kernel]):
        result(kernel, True)


@pytest.mark.parametrize("kernel", WRONG)
def test_a_result_is_wrong_in_some_order(kernel):
    wrong = []
    for order in SIMT_BACKENDS:
        with using(order):
            wrong.append(not torch.equal(result(kernel, True), RIGHT[kernel].flatten()))
    assert any(wrong)


# Which element of an operand the lanes of a warp hold, as CuTe's MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN> has it: the place of
# lane (t, g) and value (v0, v1, ...) in a matrix that is stored column by column, from the strides of each.
LANES = {"a": (32, 1), "b": (16, 1), "c": (32, 1)}
VALUES = {"a": (16, 8, 128), "b": (8, 64), "c": (16, 8)}
ROWS = {"a": 16, "b": 8, "c": 16}


def fragments(name):
    """[(row, column)] of each lane's values, in order: rows are those of the weights, for b of the input; columns are k, for c
    the rows of the input."""
    (of_t, of_g), strides, out = LANES[name], VALUES[name], []
    for lane in range(32):
        places = [lane % 4 * of_t + lane // 4 * of_g]
        for stride in strides:
            places = places + [place + stride for place in places]
        out.append([(place % ROWS[name], place // ROWS[name]) for place in places])
    return out


def test_the_emulated_tensor_core_has_the_layout_of_the_real_one():
    """Against CUTLASS's table, which is not made from this code."""
    a, b = torch.randint(-9, 10, (16, 16)).float(), torch.randint(-9, 10, (8, 16)).float()
    held = {name: [matrix[place].item() for lane in fragments(name) for place in lane] for name, matrix in (("a", a), ("b", b))}
    sums = _simt.run_mma(held["a"], held["b"])
    expected = a @ b.T
    assert sums == [expected[place].item() for lane in fragments("c") for place in lane]


def test_every_small_kernel_is_tested():
    assert sorted(RIGHT) == sorted([*MESSAGES, *WRONG, *SANITIZER])


def without_barrier(file, after, unit, indent=2, barrier="__syncthreads"):
    """The barrier behind `after` is gone."""
    return Mutation(file, f"{after}\n{' ' * indent}{barrier}();", after, unit)


def a_pass(kind):
    """All kernels of a pass, one after the other."""
    test_decode_step.check_on_cuda(backends._simt, test_decode_step.Pass("llama", "a chain", BF16, kind, fused=True))


BF16 = torch.bfloat16
# A fault in a kernel, and a case of the op's tests that must find it.
MUTATIONS = {
    "linear adds up the warps' sums before they are there": (
        without_barrier("dot.cuh", "sums[m].put(shared.warps[warp].parts[m]);", "linear.cu", indent=4),
        lambda: test_linear.test_against_reference(ops, BF16, (5, 100, 129), "plain"),
    ),
    "down adds up the warps' sums before they are there": (
        without_barrier("down.cu", "sums.put(warp.sums);", "down.cu"),
        lambda: test_down.test_against_reference(ops, BF16, (3, 151, 129), "dense"),
    ),
    "linear multiplies codes before they are there": (
        without_barrier("dot.cuh", "lane_part(), loaded[m][half]);", "linear.cu", 4, "__syncwarp"),
        lambda: test_q8.test_linear_against_reference(ops, BF16, Format.Q8, (3, 160, 17), "plain"),
    ),
    "down multiplies codes before they are there": (
        without_barrier("down.cu", "lane_part(), loaded[i][half]);", "down.cu", 4, "__syncwarp"),
        lambda: test_q8.test_down_against_reference(ops, BF16, Format.Q8, (3, 151, 129), "dense"),
    ),
    "linear multiplies one row with nibbles before they are there": (
        without_barrier("dot.cuh", "headers[m][half] = loaded[m][half].header;\n    }", "linear.cu", 4, "__syncwarp"),
        lambda: test_q4.test_linear_against_reference(ops, BF16, True, (1, 1600, 16), "plain"),
    ),
    "gate_up has codes of a tile where sums of the one before are read": (
        Mutation("dot.cuh", "tile = next;\n    __syncthreads();", "tile = next;", "gate_up.cu"),
        lambda: test_q8.test_blocks_with_several_tiles(ops, Format.Q8, 2600),
    ),
    "gate_up multiplies the rows of the tile before": (
        Mutation("dot.cuh", "point_to_lines();\n            step = begin;", "step = begin;", "gate_up.cu"),
        lambda: test_q8.test_blocks_with_several_tiles(ops, Format.Q8_UPPER, 264),
    ),
    "down adds up neurons of two groups with the scales of one": (
        Mutation("down.cu", "row >= 0 && neuron / q4::kGroup == group", "row >= 0", "down.cu"),
        lambda: test_q4.test_down_against_reference(ops, BF16, True, (3, 151, 129), "odd"),
    ),
    "down writes a column too many": (
        Mutation("down.cu", "c >= columns", "c > columns", "down.cu"),
        lambda: test_down.test_against_reference(ops, BF16, (2, 33, 100), "dense"),
    ),
    "rms_norm adds up the warps' sums before they are there": (
        without_barrier("norm.cu", "squares[0][threadIdx.x / kWarp] = sum;", "norm.cu"),
        lambda: test_rms_norm.test_against_reference(ops, BF16, (5, 576), 1.0),
    ),
    "linear does not wait for the kernel before": (
        Mutation("dot.cuh", "wait_for_kernel_before();\n  InputRows", "InputRows", "linear.cu"),
        lambda: test_linear.test_against_reference(ops, BF16, (5, 100, 129), "plain"),
    ),
    "down reads which neurons while they are chosen": (
        Mutation("down.cu", "if ((p.neurons || p.num_neurons_at) && !p.settled) wait_for_kernel_before();", "", "down.cu"),
        lambda: a_pass(Kind.CASCADE),
    ),
    "attention uses slots before they are listed": (
        without_barrier("attention.cu", "slots[position - begin] = slot;\n  }", "attention.cu"),
        lambda: test_tree_attention.test_against_reference(ops, BF16, (5, 8, 2, 64, 100, 129), test_tree_attention.tree),
    ),
    "attention merges its warps' results before they are there": (
        without_barrier("attention.cu", "attend<A>(p, unit.served, unit.kv_head, slots, memory);", "attention.cu", indent=4),
        lambda: test_tree_attention.test_against_reference(ops, BF16, (5, 8, 2, 64, 100, 129), test_tree_attention.chain),
    ),
    "attention joins the chunks of its warps before they are there": (
        without_barrier("attention.cu", "memory.sum[warp] = joined.sum;\n    }\n  }", "attention.cu"),
        lambda: test_tree_attention.test_against_reference(ops, BF16, (5, 8, 2, 64, 100, 129), test_tree_attention.chain),
    ),
    "down begins before its neurons are chosen": (
        Mutation("gate_up.cu", "wait_for_kernel_before();  // it", "wait_for_kernel_before<true>();  // it", "gate_up.cu"),
        lambda: a_pass(Kind.LARGEST),
    ),
    "a block asks whether it is the last before it knows": (
        without_barrier("common.cuh", "*counter = 0;\n  }", "accept.cu"),
        lambda: test_accept.test_first_of_equals(ops, 9001),
    ),
    "select counts before the bins are empty": (
        without_barrier("select.cu", "shared.bins[i] = 0;", "select.cu", indent=4),
        lambda: test_fsparse_ops.test_select_at_every_size(ops, 1, 1134),
    ),
    "select takes values before the neurons are listed": (
        without_barrier("select.cu", "if (!p.among && !p.taken) return;", "select.cu"),
        lambda: test_cascade.test_select_from_a_long_list(ops, 16, 9000, 8193),
    ),
    "a draft does not stop": (
        Mutation("stop.cu", "goes_on && reach * p.rule[0] >= worth[p.depth]", "goes_on", "stop.cu"),
        lambda: test_early_stop.check_a_stop(backends._simt),
    ),
    "what was not drafted may be accepted": (
        Mutation("stop.cu", "p.scores[1 + i] = -INFINITY", "p.scores[1 + i] = 0.0f", "stop.cu"),
        lambda: test_early_stop.check_a_stop(backends._simt),
    ),
    "tree_expand chooses before all leaves have proposed": (
        without_barrier("tree_expand.cu", "keys, tokens);", "tree_expand.cu"),
        lambda: test_tree_expand.test_against_reference(ops, (16, 1134, 16)),
    ),
}  # fmt: skip


def fails(module, case):
    """Whether the case fails with this build of the kernels in some order. In a process of its own, which a fault may end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    try:
        signal.alarm(120)
        torch.set_num_threads(1)
        if module:
            backends._simt = simt_builds.load(module)
        for order in SIMT_BACKENDS:
            with using(order):
                case()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_a_kernel_is_found(name):
    mutation, case = MUTATIONS[name]
    assert not fails(None, case)
    assert fails(mutation.build(), case)
