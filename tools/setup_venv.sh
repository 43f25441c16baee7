#!/usr/bin/env bash
# Makes a virtual environment with torch and everything else that a part of this project needs. Safe to run again.
# usage: tools/setup_venv.sh demo|dev|bench|serve|oldest|newest     PYTHON=python3.12 chooses the interpreter of a new one
# demo, dev, bench and serve add up in .venv, as the locks say; oldest and newest have .venv-oldest and .venv-newest to themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PART=${1:-demo}
CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

case $PART in
  demo | dev | bench | serve) VENV=.venv TORCH=requirements/torch.txt ;;
  oldest) VENV=.venv-oldest TORCH=requirements/torch-oldest.txt ;;
  newest) VENV=.venv-newest TORCH=/dev/null ;;
  *) fail "expected demo, dev, bench, serve, oldest or newest, got '$PART'" ;;
esac

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' on PATH; install Python 3.11 or newer, or name one: make PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, '$PYTHON' is $("$PYTHON" -V)"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler; on Debian: apt install g++"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "this Python lacks the venv module; on Debian: apt install python3-venv"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "this Python lacks its C headers (Python.h); on Debian: apt install python3-dev"

if [ ! -x "$VENV/bin/pip" ]; then
  say "creating $VENV with $("$PYTHON" -V)"
  "$PYTHON" -m venv "$VENV"
fi
export PATH="$PWD/$VENV/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Python compiles what is imported when it is: a small part, where compiling everything takes longer than fetching it.
export PIP_NO_COMPILE=no  # which is how pip's variables say --no-compile

# The newest release of each package that pyproject.toml names, whatever bounds it gives.
newest() {
  pip install -q -U packaging
  python - <<'END'
import tomllib
from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as stream:
    made = tomllib.load(stream)
project = made["project"]
extras = project["optional-dependencies"]
dev = [*extras["dev"], *extras["eval"], *extras["lm-eval"], *extras["serve"]]
named = [*made["build-system"]["requires"], *project["dependencies"], *dev]
for requirement in map(Requirement, named):
    if requirement.name != project["name"]:
        print(f"{requirement.name}; {requirement.marker}" if requirement.marker else requirement.name)
END
}

# locked PART OPTION...: a lock is complete, so pip need not ask what a package needs.
locked() { pip install -q --no-deps -r "requirements/$1.txt" "${@:2}"; }

# Some of these have no wheels: the lock's own setuptools, which is there by now, builds them.
and_locked() { locked "$1" --no-build-isolation --use-pep517; }

# By then all that torch needs is there, except for what only its CUDA build needs: that is pinned too, by $TORCH.
install_torch() {
  local wanted
  wanted=$(sed -n 's/^torch==//p' "$TORCH")
  [ -n "$wanted" ] && python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$wanted')" 2>/dev/null && return
  if nvidia-smi >/dev/null 2>&1; then
    say "installing torch $wanted with CUDA"
  # The probe ends within seconds on a closed network, where pip would retry for minutes; it asks that index and no other source.
  elif PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= \
    pip index versions torch --index-url "$CPU_INDEX" --retries 0 --timeout 5 >/dev/null 2>&1; then
    say "installing torch $wanted for the CPU (about 200 MB)"
    pip install -q -U torch -c "$TORCH" --index-url "$CPU_INDEX" && return
    say "the PyTorch CPU index failed; trying the default package index"
  else
    say "installing torch $wanted from the default package index (the PyTorch CPU index cannot be reached)"
  fi
  pip install -q -U torch -c "$TORCH"
}

say "installing what $PART needs"
case $PART in
  newest)
    install_torch
    newest | pip install -q -U --upgrade-strategy eager -r /dev/stdin
    ;;
  oldest)
    pip install -q "$(grep '^setuptools==' requirements/oldest.txt)"
    and_locked oldest
    install_torch
    ;;
  *)
    locked demo
    [ "$PART" = demo ] || and_locked "$PART"
    install_torch
    ;;
esac
say "done: $(python -c 'import torch, sys; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")')"
