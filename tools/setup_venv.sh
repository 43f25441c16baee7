#!/usr/bin/env bash
# Makes .venv with torch, everything that pyproject.toml names, and the extension built in place. Safe to run again.
# usage: tools/setup_venv.sh [EXTRA,...]     PYTHON=python3.12 chooses the interpreter of a new .venv
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
EXTRAS=${1:-dev}
TORCH=torch==2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' on PATH; install Python 3.11 or newer, or name one: make PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, '$PYTHON' is $("$PYTHON" -V)"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler; on Debian: apt install g++"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "this Python lacks the venv module; on Debian: apt install python3-venv"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "this Python lacks its C headers (Python.h); on Debian: apt install python3-dev"

if [ ! -x .venv/bin/pip ]; then
  say "creating .venv with $("$PYTHON" -V)"
  "$PYTHON" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! python -c 'import torch' 2>/dev/null; then
  if nvidia-smi >/dev/null 2>&1; then
    say "installing $TORCH with CUDA"
  # The probe ends within seconds on a closed network, where pip would retry for minutes; it asks that index and no other source.
  elif PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= \
    pip index versions torch --index-url "$CPU_INDEX" --retries 0 --timeout 5 >/dev/null 2>&1; then
    say "installing $TORCH for the CPU (about 200 MB)"
    pip install -q "$TORCH" --index-url "$CPU_INDEX" || say "the PyTorch CPU index failed; trying the default package index"
  else
    say "installing $TORCH from the default package index (the PyTorch CPU index cannot be reached)"
  fi
  python -c 'import torch' 2>/dev/null || pip install -q "$TORCH"
fi

# The build runs inside .venv, without pip's isolation: that keeps cmake's folder valid, so a later make recompiles only what changed.
say "installing the build tools"
python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' |
  pip install -q -r /dev/stdin
say "building sirius_ext and installing it with its requirements ($EXTRAS)"
pip install -q --no-build-isolation -e ".[$EXTRAS]"
say "done: $(python -c 'import torch, sys; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")')"
