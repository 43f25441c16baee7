#!/usr/bin/env bash
# Everything that wants a GPU, on a bare machine with PyTorch for CUDA and nvcc: bench/gpu.sh [PART...], by default all of
#   build     the extension with the CUDA kernels for this card, and the tests' emulator
#   test      pytest -k cuda
#   sanitize  the tests of the ops under compute-sanitizer: memcheck, then racecheck
#   soak      200 prompts of mixed length: memory stays constant
#   bench     the ops, then milliseconds per token of Llama-3-8B's shape
# A part that fails does not keep the next one from running; the exit status then is 1. Logs and results go to OUT.
#   OUT      folder (bench/results)           PYTHON  interpreter (python3)
#   LIMIT    seconds a part may take (570)    SHAPE   of bench (llama-3-8b)
# Without a network pip fetches nothing: then what is there has to do, and what cannot run says what it lacks.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-bench/results}")
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
SHAPE=${SHAPE:-llama-3-8b}
PARTS=(build test sanitize soak bench)
OP_TESTS=(tests/test_{linear,gate_up,down,q8,fsparse_ops,cascade,follow,rms_norm,rope_kv_write}.py
  tests/test_tree_{mask,attention,expand}.py tests/test_{accept,kv_rewrite}.py)
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

has() { "$PYTHON" -c "import $1" 2>/dev/null; }
card() { nvidia-smi -i 0 --query-gpu="$1" --format=csv,noheader 2>/dev/null; }
# The card's name as a file's: h100, a100, ...
card_name() { card name | tr ' -' '\n\n' | grep -m1 -E '^[A-Z]+[0-9]+' | tr '[:upper:]' '[:lower:]'; }

need() { # what a part cannot do without
  local module missing=()
  for module in "$@"; do has "$module" || missing+=("$module"); done
  if [ ${#missing[@]} -gt 0 ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${missing[@]}" || {
      echo "missing here, and pip cannot install it: ${missing[*]}"
      return 1
    }
  fi
}

built() { "$PYTHON" -c 'import torch; from sirius_ext import _C, _simt; _C.cuda' 2>/dev/null; }
ready() {
  need transformers safetensors numpy rich || return
  built || part_build || return
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no CUDA device that torch can use"
    return 1
  }
}

architecture() { # code for this card alone: a build of minutes becomes one of less
  local capability
  capability=$(card compute_cap | tr -d .)
  case $capability in
  '') echo "80;90a-real" ;;
  90) echo 90a-real ;;
  *) echo "$capability-real" ;;
  esac
}

part_build() {
  export SIRIUS_CUDA=ON SIRIUS_SIMT=ON SIRIUS_CUDA_ARCHITECTURES=${SIRIUS_CUDA_ARCHITECTURES:-$(architecture)}
  echo "architectures: $SIRIUS_CUDA_ARCHITECTURES"
  if need pybind11 setuptools && command -v cmake >/dev/null; then
    "$PYTHON" setup.py build_ext --inplace || return
  else
    echo "no cmake or no pybind11: compiling without them"
    by_hand || return
  fi
  need transformers safetensors numpy rich || return
  "$PYTHON" -m sirius_ext info
}

# The same sources as CMakeLists.txt's, with scalar kernels alone on the CPU. pybind11's headers come with torch.
by_hand() {
  local objects=build/by-hand suffix includes torch_includes flags file numbers nvcc jobs
  nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  includes="-I$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  torch_includes=$("$PYTHON" -c 'import torch.utils.cpp_extension as c; print(*("-I" + path for path in c.include_paths()))')
  includes+=" $("$PYTHON" -m pybind11 --includes 2>/dev/null || echo "$torch_includes")"
  flags="-std=c++20 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-strict-aliasing"
  numbers=${SIRIUS_CUDA_ARCHITECTURES//-real/}
  jobs=$(nproc)
  rm -rf $objects
  mkdir -p $objects/{cpu,cuda,simt}
  {
    for file in csrc/cpu/*.cpp; do
      case $file in *_avx2.cpp | *_avx512.cpp | *_amx.cpp) continue ;; esac
      echo "g++ $flags -fopenmp -c $file -o $objects/cpu/$(basename "$file").o"
    done
    echo "g++ $flags -fopenmp -DSIRIUS_HAVE_CUDA $includes -c python/bindings.cpp -o $objects/cpu/bindings.o"
    for file in csrc/cuda/*.cu; do
      echo "$nvcc -std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -lineinfo -Xcompiler -fPIC,-fvisibility=hidden" \
        "$(for number in ${numbers//;/ }; do echo "-gencode arch=compute_$number,code=sm_$number"; done)" \
        "-c $file -o $objects/cuda/$(basename "$file").o"
      echo "g++ $flags -O2 -Wno-unknown-pragmas -x c++ -c $file -o $objects/simt/$(basename "$file").o"
    done
    for file in csrc/cuda/*.cpp python/bindings_cuda.cpp; do
      echo "g++ $flags $includes -c $file -o $objects/cuda/$(basename "$file").o"
      echo "g++ $flags -O2 $includes -c $file -o $objects/simt/$(basename "$file").o"
    done
    for file in csrc/simt/*.cpp python/simt_module.cpp; do
      echo "g++ $flags -O2 $includes -c $file -o $objects/simt/$(basename "$file").o"
    done
  } >$objects/commands
  tr '\n' '\0' <$objects/commands | xargs -0 -P "$jobs" -I{} sh -c '{}' || return
  "$nvcc" -shared -Xcompiler -fopenmp $objects/cpu/*.o $objects/cuda/*.o -o "sirius_ext/_C$suffix" &&
    g++ -shared $objects/simt/*.o -o "sirius_ext/_simt$suffix"
}

part_test() {
  ready && need pytest hypothesis || return
  local -a files
  # Files that hold no test of the kernels may import what is not here.
  mapfile -t files < <(grep -lE 'cuda|backend|[(, ]kernels[,)]' tests/test_*.py)
  "$PYTHON" -m pytest -q -p no:cacheprovider -k "cuda and not simt" "${files[@]}"
}

part_sanitize() {
  ready && need pytest hypothesis || return
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on PATH"; return 1; }
  local tool status=0
  for tool in memcheck racecheck; do
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 $((LIMIT / 2 - 15)) compute-sanitizer --tool $tool --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider -k "cuda and not simt" "${OP_TESTS[@]}"
    local code=$?
    echo "$tool: exit status $code (124: stopped for time)"
    [ $code = 0 ] || status=1
  done
  return $status
}

part_soak() { ready && "$PYTHON" bench/soak.py; }

# What matters most comes first: a run writes its file when it ends, and the limit may end one before.
part_bench() {
  ready || return
  local name status=0 decode
  name=$(card_name)
  decode=("$PYTHON" bench/decode.py --device cuda --shape "$SHAPE")
  "${decode[@]}" --context 1024 --skip transformers --out "$OUT/latency-$SHAPE-$name.json" || status=1
  "$PYTHON" bench/bench_ops.py --backend cuda --shapes "$SHAPE" --out "$OUT/ops-$name.json" || status=1
  "${decode[@]}" --context 512,4096 --rounds 2 --skip transformers,dense --out "$OUT/latency-$SHAPE-$name-contexts.json" || status=1
  # transformers compiles its forward for minutes.
  "${decode[@]}" --context 1024 --rounds 2 --skip dense --sparsities csparse --widths "" \
    --out "$OUT/latency-$SHAPE-$name-transformers.json" || status=1
  return $status
}

# ------------------------------------------------------------------------------------------------------------------------------

if [ "${1:-}" = --run ]; then # one part, in a process of its own: so a time limit ends all of it
  "part_$2"
  exit
fi
[ $# -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "gpu.sh: expected parts of ${PARTS[*]}, got $part" >&2; exit 2; }
done
summary=() failed=0
for part in "$@"; do
  echo "== $part"
  SECONDS=0
  timeout -k 10 "$LIMIT" "$0" --run "$part" 2>&1 | tee "$OUT/$part.log"
  code=${PIPESTATUS[0]}
  case $code in
  0) result=passed ;;
  124 | 137) result="stopped after $LIMIT s" ;;
  *) result=FAILED ;;
  esac
  [ "$code" = 0 ] || failed=1
  last=$(grep -v '^[[:space:]]*$' "$OUT/$part.log" | tail -n 1 | cut -c1-80)
  summary+=("$(printf '%-9s %-20s %4d s  %s' "$part" "$result" "$SECONDS" "$last")")
done
echo
echo "$(card name,clocks.max.sm,power.limit,driver_version || true)"
printf '%s\n' "${summary[@]}"
exit $failed
