"""Where an op runs: the compiled functions for a device, and what they need beyond their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Protocol

import torch

from .. import _C
from .threads import cpu_threads


class Backend(Protocol):
    """The ops of one kind of device.

    functions: the compiled module. Its ops take the fields of csrc/params.h by their names; addresses are integers.
    """

    functions: ModuleType

    def run(self, device: torch.device, name: str, workspace: tuple[int, ...], fields: dict[str, object]) -> None:
        """Call the op `name` with the fields of its arguments. workspace: the sizes that the size of its workspace depends on."""


class CpuBackend:
    def __init__(self, functions: ModuleType) -> None:
        self.functions = functions

    def run(self, device: torch.device, name: str, workspace: tuple[int, ...], fields: dict[str, object]) -> None:
        """As `Backend.run`. The ops make their workspace themselves."""
        getattr(self.functions, name)(**fields, threads=cpu_threads())


class CudaBackend:
    def __init__(self, functions: ModuleType) -> None:
        self.functions = functions
        self._counters: dict[tuple[torch.device, int], torch.Tensor] = {}

    def run(self, device: torch.device, name: str, workspace: tuple[int, ...], fields: dict[str, object]) -> None:
        """As `Backend.run`."""
        floats = getattr(self.functions, f"{name}_workspace")(*workspace) if workspace else 0
        memory = torch.empty(floats, dtype=torch.float32, device=device)
        with guard(device):
            getattr(self.functions, name)(
                **fields,
                workspace=memory.data_ptr(),
                counters=self.counters(device).data_ptr(),
                stream=stream(device),
            )

    def counters(self, device: torch.device) -> torch.Tensor:
        """int32 zeros, by which the blocks of a kernel agree on the last one. Kernels leave zeros behind. One set a stream."""
        key = device, stream(device)
        if key not in self._counters:
            self._counters[key] = torch.zeros(self.functions.counters, dtype=torch.int32, device=device)
        return self._counters[key]


# By the type of a device.
_backends: dict[str, Backend] = {"cpu": CpuBackend(_C)}
if hasattr(_C, "cuda"):
    _backends["cuda"] = CudaBackend(_C.cuda)


@contextlib.contextmanager
def registered(device_type: str, backend: Backend) -> Iterator[None]:
    """Within it, tensors on devices of this type are computed on by another backend."""
    before = _backends.get(device_type)
    _backends[device_type] = backend
    try:
        yield
    finally:
        if before is None:
            del _backends[device_type]
        else:
            _backends[device_type] = before


def backend_of(device: torch.device) -> Backend:
    """The backend for tensors on a device that `check_device` lets pass."""
    return _backends[device.type]


def has_cuda_kernels() -> bool:
    """Whether this build has them."""
    return hasattr(_C, "cuda")


def check_device(name: str, device: torch.device) -> None:
    """ValueError that names the argument unless this build has kernels for the device."""
    if device.type not in ("cpu", "cuda"):
        hint = ", where nothing is stored (accelerate's offloading puts weights there)" if device.type == "meta" else ""
        raise ValueError(f"{name}: expected a tensor on the CPU or on a CUDA device, got one on {device}{hint}")
    if device.type not in _backends:
        raise ValueError(f"{name}: it is on {device}, but this build of sirius_ext has no CUDA kernels (no nvcc was found)")


def is_cuda(device: torch.device) -> bool:
    """Whether ops on this device's tensors are the CUDA backend's."""
    return isinstance(_backends.get(device.type), CudaBackend)


def cuda_functions(device: torch.device) -> ModuleType:
    """The compiled functions for a device whose ops are the CUDA backend's."""
    return backend_of(device).functions


def run(device: torch.device, name: str, *, workspace: tuple[int, ...] = (), **fields: object) -> None:
    """Call the op `name` of the backend for `device`. fields: those of its arguments, as csrc/params.h names them.

    workspace: the sizes that the size of the CUDA op's workspace depends on.
    """
    backend_of(device).run(device, name, workspace, fields)


def stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes `device` the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def counters(device: torch.device) -> torch.Tensor:
    """As `CudaBackend.counters`, of the backend for `device`."""
    backend = backend_of(device)
    assert isinstance(backend, CudaBackend)
    return backend.counters(device)
