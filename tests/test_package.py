"""What a build makes of flags and of an earlier build's files, and what is in a wheel and a source distribution."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent


FOLDERS = "csrc", "python", "sirius_ext"
FILES = "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"


@pytest.fixture
def clone(tmp_path):
    """A copy of the sources, since setuptools writes among them."""
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(clone, *arguments):
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=clone, check=True, capture_output=True)


def files_in(folder, below):
    """By their paths from another folder."""
    return {str(file.relative_to(below)) for file in folder.rglob("*") if file.is_file()}


def test_a_module_that_was_removed_is_in_no_wheel(clone):
    there = files_in(clone / "sirius_ext", clone)
    (clone / "sirius_ext/removed.py").touch()
    setup(clone, "build_py", "--build-lib", "built")
    (clone / "sirius_ext/removed.py").unlink()
    setup(clone, "build_py", "--build-lib", "built")
    assert files_in(clone / "built", clone / "built") == there


def test_a_source_distribution_has_what_builds_it(clone):
    """And no tests: setuptools would take some of the files that they are made of."""
    there = set.union(*(files_in(clone / folder, clone) for folder in FOLDERS))
    setup(clone, "sdist", "--formats=tar", "-d", "made")
    (archive,) = (clone / "made").glob("*.tar")
    with tarfile.open(archive) as opened:
        got = {each.name.partition("/")[2] for each in opened if each.isfile()}
    assert {name for name in got if ".egg-info/" not in name} == there | {*FILES, "PKG-INFO", "setup.cfg"}


def test_numbers_that_are_not_finite_are_seen_whatever_flags_a_user_has(tmp_path):
    """With -ffast-math compilers leave the checks out."""
    options = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", "-DSIRIUS_CUDA=OFF")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options]
    flags = {**os.environ, "CXXFLAGS": "-ffast-math -ffinite-math-only"}
    subprocess.run(command, check=True, capture_output=True, env=flags)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert len(commands) > 10
    for words in {tuple(shlex.split(each["command"].partition(" -o ")[0])) for each in commands}:
        assert "-ffast-math" in words
        asked = subprocess.run([*words, "-dM", "-E", "-x", "c++", "/dev/null"], check=True, capture_output=True, text=True)
        assert not re.search("__FAST_MATH__|__FINITE_MATH_ONLY__ 1", asked.stdout), words
