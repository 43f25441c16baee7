"""What nvcc made of the CUDA kernels: that they were built where they should be, and have not lost what their speed rests on."""

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess

import pytest

from sirius_ext import _C
from sirius_ext.kernels import dispatch

needs_build = pytest.mark.skipif(
    not dispatch.has_cuda_kernels(), reason="built without the CUDA kernels (no nvcc, or neither a GPU nor SIRIUS_CUDA=ON)"
)
# Products of rows of weights, of every format, in bf16, from 16-byte aligned rows, for up to 8 and for more rows of input.
PRODUCTS = {
    f"{op}_kernelINS_6bf16_tENS0_{weights}ELb1ELi{columns}E"
    for op in ("linear", "gate_up", "gate", "up", "qkv", "down")
    for weights in ("5Plain", "2Q8ILb0EE", "2Q8ILb1EE")
    for columns in (8, 16)
}
OTHERS = {f"attention_kernelINS0_9RowReaderINS_6bf16_tELb1ELi{lanes}E" for lanes in (8, 16, 32)} | {"accept_kernelILb1E"}


def test_built_when_asked_for():
    """`make test` asks for it where there is an nvcc: elsewhere the tests below are skipped."""
    assert dispatch.has_cuda_kernels() or os.environ.get("SIRIUS_CUDA") != "ON"


def cuobjdump(*arguments):
    """The CUDA toolkit's, or that of the development requirements."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    for name in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [str(file.locate().parent) for file in files if file.parent.name == "bin"]
    path = os.pathsep.join(folders)
    program = shutil.which("cuobjdump", path=path)
    assert program, "no cuobjdump: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or a whole CUDA toolkit"
    command = [program, *arguments, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


@functools.cache
def stacks():
    """Bytes of stack, which also holds spilled registers, by architecture and kernel."""
    out, architecture, kernel = {}, None, None
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\w+):", line):
            kernel = found[1]
        elif found := re.search(r"\bREG:\d+ STACK:(\d+)", line):
            out.setdefault(architecture, {})[kernel] = int(found[1])
    return out


@functools.cache
def instructions(architecture):
    """The instructions of PRODUCTS."""
    kernels = [name for name in stacks()[architecture] if any(product in name for product in PRODUCTS)]
    out, kernel = {}, None
    for line in cuobjdump("-sass", "-arch", architecture, "-fun", ",".join(kernels)).splitlines():
        if found := re.match(r"\s*Function : (\w+)", line):
            kernel = found[1]
        elif found := re.match(r"\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", line):
            out.setdefault(kernel, []).append(found[1])
    return out


@needs_build
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_body_for_speed_spills(architecture):
    kernels = stacks()[architecture]
    for wanted in PRODUCTS | OTHERS:
        assert any(wanted in name for name in kernels), f"no kernel is {wanted}"
    spilling = {name: size for name, size in kernels.items() if size > 0 and not re.search(r"_kernelI(NS0_9RowReaderI)?f", name)}
    assert not spilling, "bytes of stack in kernels of 16-bit types"


@needs_build
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_weights_are_read_by_16_bytes_and_multiplied_on_tensor_cores(architecture):
    kernels = instructions(architecture)
    assert len(kernels) == len(PRODUCTS)
    for name, codes in kernels.items():
        # Past L1, in 16 bytes: at least four in flight in every lane.
        assert sum(code.startswith("LDG") and ".NA" in code and ".128" in code for code in codes) >= 4, name
        assert not any(code.startswith("LDG") and ".NA" in code and ".128" not in code for code in codes), name
        assert any(code.startswith("HMMA") for code in codes), name
