"""Builds of the CUDA kernels for simt beside the usual one: with a fault put into a kernel, and with AddressSanitizer."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parent.parent
# What setup.py builds with SIRIUS_SIMT=ON, as `make test` does.
USUAL = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
SANITIZED = ROOT / "build" / f"asan-{sys.implementation.cache_tag}"
MUTANTS = ROOT / "build" / "mutants"
COMPILER = os.environ.get("CXX", "g++")
SANITIZER = ["-O1", "-g1", "-fsanitize=address", "-DSIRIUS_BF16_ALONE"]


class Mutation(NamedTuple):
    """A fault: in csrc/cuda/<file>, `old`, which stands there once, becomes `new`. csrc/cuda/<unit> is compiled with it."""

    file: str
    old: str
    new: str
    unit: str

    def build(self, objects: Path = USUAL, flags: list[str] | None = None) -> Path:
        """A module in which the unit has the fault; the rest is taken from the build in `objects`. Kept for the next run."""
        flags = ["-O1"] if flags is None else flags
        sources = {path: path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()}
        archive, module = objects / "csrc/simt/libsirius_simt.a", objects / "CMakeFiles/_simt.dir/python"
        linked = [archive, *(module / f"{name}.cpp.o" for name in ("simt_module", "bindings_cuda"))]
        assert all(path.exists() for path in linked), f"{archive} is missing: `make test` builds it"
        key = hashlib.sha256(repr(sources).encode() + b"".join(path.read_bytes() for path in linked)).hexdigest()[:16]
        folder = MUTANTS / hashlib.sha256(repr((self, flags)).encode()).hexdigest()[:16]
        tree, out = folder / key, folder / f"{key}.so"
        if out.exists():
            return out
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        changed = tree / "csrc/cuda" / self.file
        text = changed.read_text()
        assert text.count(self.old) == 1, f"{self.file}: {self.old!r} stands there {text.count(self.old)} times"
        changed.write_text(text.replace(self.old, self.new))
        command = [COMPILER, "-std=c++20", *flags, "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"]
        command += ["-Wno-unknown-pragmas", "-x", "c++", tree / "csrc/cuda" / self.unit, "-x", "none", *linked[1:], archive]
        subprocess.run([*command, "-o", out], check=True)
        shutil.rmtree(tree)
        return out


def load(path: Path) -> ModuleType:
    """A build of `_simt`, beside the one that the package has."""
    # Only the last part of the name is the compiled module's own; pybind11 loads no name twice.
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}._simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized() -> Path:
    """`_simt` with AddressSanitizer; compiles what has changed."""
    configure = ["cmake", "--log-level=NOTICE", "-S", ROOT, "-B", SANITIZED, "-DSIRIUS_SIMT=ON", "-DSIRIUS_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DSIRIUS_SIMT_FLAGS={';'.join(SANITIZER)}", f"-DSIRIUS_SIMT_FOLDER={SANITIZED}"]
    ninja = shutil.which("ninja")
    configure += ["-G", "Ninja"] if ninja else []
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    build = ["cmake", "--build", SANITIZED, "--target", "_simt", "--parallel", str(os.cpu_count())]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return SANITIZED / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"


def run_sanitized(module: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python process under AddressSanitizer, for which conftest.py makes this module `sirius_ext._simt`."""
    # libstdc++ as well: AddressSanitizer looks for it when the process starts, and Python itself does not need it.
    libraries = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves memory behind at its end
        "SIRIUS_SIMT_MODULE": str(module),
        "SIRIUS_TESTS_WALL_BEHIND": "off",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
