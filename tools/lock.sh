#!/usr/bin/env bash
# Writes the locks, requirements/*.txt: the newest releases that pyproject.toml and requirements/torch.in allow.
#   demo.txt                 what `make demo` installs, on every platform
#   dev.txt bench.txt serve.txt    what `make test`, `make bench` and the server install beside it
#   torch.txt                torch and what only its CUDA build needs: constraints, so that a CPU build may be chosen
#   oldest.txt torch-oldest.txt    for `make test-oldest`: the lower bounds of pyproject.toml
# usage: tools/lock.sh     uv's own variables (UV_DEFAULT_INDEX, ...) choose the index; no file names it
set -euo pipefail
cd "$(dirname "$0")/.."

UV=uv==0.13.9
PYTHON=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "$UV"

resolve() { "$work/venv/bin/uv" pip compile -q --no-config --python-version 3.11 --no-header --no-annotate "$@"; }
names() { sed -n 's/^\([A-Za-z0-9][A-Za-z0-9._-]*\)==.*/\1/p' "$@" | sort -u; }
except() { sed 's/^/--no-emit-package=/' "$@"; }

# write FILE: standard input, once it is whole, under a line that says where it comes from.
write() {
  { echo "# Made by \`make lock\`."; cat; } >"$work/out"
  mv "$work/out" "requirements/$1"
  echo "lock: requirements/$1"
}

# lock_torch FILE INPUT OPTION...: torch and what it needs on Linux but not on Windows, where the index has a CPU build alone.
# Their names stay in $work/cuda. The build's tools are among the inputs because we need them everywhere.
lock_torch() {
  local file=$1
  shift
  resolve --python-platform x86_64-manylinux_2_28 "$@" "$work/build.in" >"$work/linux"
  resolve --python-platform windows "$@" "$work/build.in" >"$work/windows"
  { echo torch; comm -23 <(names "$work/linux") <(names "$work/windows"); } >"$work/cuda"
  grep -E "^($(paste -sd '|' "$work/cuda"))==" "$work/linux" | write "$file"
}

"$PYTHON" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >"$work/build.in"
inputs=(pyproject.toml "$work/build.in")

lock_torch torch.txt requirements/torch.in
# One resolution of everything first, so that no package has two versions.
resolve --universal -c requirements/torch.txt "${inputs[@]}" --all-extras >"$work/all"
lock() { resolve --universal -c "$work/all" "${inputs[@]}" $(except "$work/cuda") "$@"; }
lock >"$work/demo"
lock --generate-hashes | write demo.txt
for part in dev bench serve; do
  lock --extra $part >"$work/$part"
  # What demo.txt has under the same conditions is left out.
  comm -23 <(names "$work/demo") <(comm -13 <(sort "$work/demo") <(sort "$work/$part") | names) >"$work/had"
  lock --generate-hashes --extra $part $(except "$work/had") | write $part.txt
done

# For Python 3.11 on Linux alone: the oldest releases have no wheels for the newest Pythons.
sed -n 's/^ *"\(torch>=.*\)",$/\1/p' pyproject.toml >"$work/torch.in"
lock_torch torch-oldest.txt "$work/torch.in" --resolution lowest-direct
# What is not named in pyproject.toml has the version of the other locks, if it can: uv keeps what it finds in its output.
resolve --universal --no-deps "${inputs[@]}" --extra dev >"$work/direct"
grep -vE "^($(names "$work/direct" | paste -sd '|'))==" "$work/all" >"$work/oldest"
resolve --python-platform x86_64-manylinux_2_28 --resolution lowest-direct "${inputs[@]}" --extra dev $(except "$work/cuda") \
  -o "$work/oldest"
write oldest.txt <"$work/oldest"
