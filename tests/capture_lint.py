"""What the body of a capture may ask torch for."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They wait for the device, since the host looks at a value; or bring a value from the host.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
    "lift_fresh", "pin_memory",
}  # fmt: skip


class CaptureLint(TorchDispatchMode):
    """Around a body. faults: the calls that wait for the device or copy from or to the host, and, once the body has ended, what
    it has allocated and somebody still holds: a replay would write to memory that has been given to others."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self._made: list[tuple[str, weakref.ref]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self._known |= {each.untyped_storage().data_ptr() for each in given}
        if name in WAITING or (name == "index" and any(each.dtype == torch.bool for each in given[1:])):
            self.faults.append(f"{name} waits for the device")
        out = func(*args, **kwargs)
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if len({each.device for each in (*given, *made)}) > 1:
            self.faults.append(f"{name} copies between devices")
        for each in made:
            storage = each.untyped_storage()
            if storage.data_ptr() not in self._known and storage.nbytes():
                self._made.append((name, weakref.ref(each)))
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.faults += [f"{name} made memory that is still held" for name, made in self._made if made() is not None]
