"""Where an op runs: the compiled functions for a device, and what they need beyond their arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType

import torch

from .. import _C

# The CUDA kernels run on the CPU: a module with the functions of `_C.cuda` (tests only).
_emulator: ModuleType | None = None


def has_cuda_kernels() -> bool:
    """Whether this build has them."""
    return hasattr(_C, "cuda")


def check_device(name: str, device: torch.device) -> None:
    """ValueError that names the argument unless this build has kernels for the device."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a tensor on the CPU or on a CUDA device, got one on {device}")
    if device.type == "cuda" and not has_cuda_kernels():
        raise ValueError(f"{name}: it is on {device}, but this build of sirius_ext has no CUDA kernels (no nvcc was found)")


def is_cuda(device: torch.device) -> bool:
    """Whether ops on this device's tensors are the CUDA backend's."""
    return device.type == "cuda" or _emulator is not None


def cuda_functions(device: torch.device) -> ModuleType:
    return _C.cuda if device.type == "cuda" else _emulator


def run(device: torch.device, name: str, *arguments, workspace: tuple[int, ...] = ()) -> None:
    """Call the op `name` of the backend for `device`. workspace: the sizes that the CUDA op's workspace depends on."""
    if not is_cuda(device):
        getattr(_C, name)(*arguments, torch.get_num_threads())
        return
    functions = cuda_functions(device)
    floats = getattr(functions, f"{name}_workspace")(*workspace) if workspace else 0
    memory = torch.empty(floats, device=device)
    with guard(device):
        getattr(functions, name)(*arguments, memory.data_ptr(), counters(device).data_ptr(), stream(device))


def stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def counters(device: torch.device) -> torch.Tensor:
    """int32 zeros, by which the blocks of a kernel agree on the last one. Kernels leave zeros behind. One set a stream."""
    return _counters(device, stream(device))


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(cuda_functions(device).counters, dtype=torch.int32, device=device)


@contextlib.contextmanager
def emulated(functions: ModuleType | None) -> Iterator[None]:
    """Within it, tensors on the CPU are computed on by the CUDA kernels of a module built with csrc/simt; with None, by the
    CPU's."""
    global _emulator
    before, _emulator = _emulator, functions
    try:
        yield
    finally:
        _emulator = before
