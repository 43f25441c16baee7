"""What a build makes of a user's flags."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent


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
