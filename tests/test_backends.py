"""What stands between the cases and a GPU, without one."""

import backends
import torch
from backends import SENTINEL, Guarded, OnDevice, poisoned, randn, walled

from sirius_ext.kernels import ops


def test_tensors_travel_with_what_surrounds_them():
    away = OnDevice(ops, torch.device("cpu"))
    x, weight, residual = (walled(randn(3, 8, dtype=torch.float32)) for _ in range(3))
    weight = weight[0].clone()
    out = poisoned(3, 8, dtype=torch.float32)
    assert away.rms_norm(x, weight, 1e-5, out=out.tensor) is out.tensor
    assert torch.equal(out.check(), ops.rms_norm(x, weight, 1e-5))

    # In place, as the residual may be, and as the statistic is.
    same, expected = Guarded(residual), ops.rms_norm(x, weight, 1e-5, residual)
    assert away.rms_norm(x, weight, 1e-5, same.tensor, out=same.tensor) is same.tensor
    assert torch.equal(same.check(), expected)

    z, rows, squares = randn(3, 1, 8, dtype=torch.float32), torch.zeros(1, dtype=torch.int32), torch.ones(3, 8)
    same, statistic = Guarded(residual), residual.clone()
    neurons = away.follow(z, rows, squares, same.tensor, 2, 0.5)
    assert torch.equal(neurons, ops.follow(z, rows, squares, statistic, 2, 0.5))
    assert torch.equal(same.check(), statistic)

    class Overrun:
        """An op that writes after the end of what it is given."""

        @staticmethod
        def touch(tensor):
            tensor.as_strided((tensor.numel() + 1,), (1,), tensor.storage_offset())[-1] = 0

    guarded = Guarded(torch.ones(4))
    OnDevice(Overrun, torch.device("cpu")).touch(guarded.tensor)
    assert guarded.buffer[-backends.MARGIN] != SENTINEL
