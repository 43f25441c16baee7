"""Hands the C++ build to CMake. Everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class FreshPackage(build_py):
    """Setuptools leaves what an earlier build has put there: a module that was removed since would be in the next wheel, too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "sirius_ext"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per Python for every kind of install, so that a rebuild compiles only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # pip's isolated builds leave paths to tools here that are gone by the next build. (--fresh would delete the objects too.)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "--log-level=NOTICE",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        # CMakeLists.txt says what they mean.
        options = ("SIRIUS_CUDA", "SIRIUS_CUDA_ARCHITECTURES", "SIRIUS_SIMT")
        configure += [f"-D{option}={os.environ[option]}" for option in options if option in os.environ]
        ninja = shutil.which("ninja")
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        self.run_cmake("-S", str(ROOT), "-B", str(build), *configure)
        self.run_cmake("--build", str(build), "--parallel", str(self.parallel or os.cpu_count() or 1))

    def run_cmake(self, *arguments: str) -> None:
        try:
            subprocess.run(["cmake", *arguments], check=True)
        except FileNotFoundError:
            raise SystemExit("setup.py: cmake is not on PATH; `pip install cmake ninja`, or build with pip's isolation") from None
        except subprocess.CalledProcessError:
            raise SystemExit("setup.py: cmake failed, see above (with pip: -v)") from None


setup(ext_modules=[Extension("sirius_ext._C", sources=[])], cmdclass={"build_py": FreshPackage, "build_ext": CMakeBuild})
