#!/usr/bin/env bash
# All that wants a GPU, on a bare machine with PyTorch for CUDA and nvcc: bench/gpu.sh [PART...], by default all of
#   first     the build for this card, the tests of the ops and of decoding, a first table of milliseconds per token, and where
#             they go kernel by kernel
#   bench     milliseconds per token of Llama-3-8B's shape in 16 bits, eight and four, then the ops
#   tiers     models that are not all in the card's memory: the tests, then milliseconds per token of Llama-3-8B's shape in 8 GB and
#             of Llama-3-70B's in 24, as far as the host's memory holds the rest
#   sanitize  the ops' tests on aligned tensors under compute-sanitizer: memcheck, then racecheck
#   soak      many prompts of mixed length: memory stays constant; then what Nsight Compute says of the largest kernels
# Each ends within four minutes on sixteen cores (an H100 took 40 s for 800 tests, 40 for a table, 25 for the kernels), tiers within
# six (there 70, 85 and 130 s for its models), and begins with what is worth most. What is known is written at once, so that a time
# limit is no failure. A part that fails does not keep the next one from running; the exit status then is 1.
#   wheels    lists the Python packages that the parts lack here, to be brought along where there is no network
# Logs and results go to OUT.
#   OUT      folder (bench/results)           PYTHON  interpreter (python3)
#   LIMIT    seconds a part may take (240; tiers half as many more)    SHAPE   of the model (llama-3-8b)
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-bench/results}")
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-240}
SHAPE=${SHAPE:-llama-3-8b}
PARTS=(first bench tiers sanitize soak)
OP_TESTS=(tests/test_{linear,gate_up,down,q8,q4,fsparse_ops,cascade,follow,rms_norm,rope_kv_write}.py
  tests/test_tree_{mask,attention,expand}.py tests/test_{accept,kv_rewrite}.py)
RUNTIME=(transformers safetensors numpy rich gguf accelerate)
TESTS=(pytest hypothesis)
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
started=$SECONDS
left() { echo $((LIMIT - (SECONDS - started))); } # seconds of the part

has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }
card() { nvidia-smi -i 0 --query-gpu="$1" --format=csv,noheader 2>/dev/null; }
# The card's name as a file's: h100, a100, ...
card_name() { card name | tr ' -' '\n\n' | grep -m1 -E '^[A-Z]+[0-9]+' | tr '[:upper:]' '[:lower:]'; }

lacking() { # of these packages
  local module
  for module in "$@"; do has "$module" || echo "$module"; done
}

need() { # what a part cannot do without
  local missing
  mapfile -t missing < <(lacking "$@")
  if [ ${#missing[@]} -gt 0 ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 5 "${missing[@]}" || {
      echo "missing here, and pip cannot install it: ${missing[*]}"
      return 1
    }
  fi
}

part_wheels() { lacking "${RUNTIME[@]}" "${TESTS[@]}" xdist pybind11; }

# Runs what is left of the part's time at most; being stopped by it is no failure.
within() {
  local code seconds
  seconds=$(left)
  [ "$seconds" -gt 5 ] || { echo "no time left for: $*"; return 0; }
  timeout -k 10 "$seconds" "$@"
  code=$?
  case $code in
  124 | 137) echo "stopped after $seconds s: $*" ;;
  *) return $code ;;
  esac
}

built() { "$PYTHON" -c 'import torch; from sirius_ext import _C, _simt; _C.cuda' 2>/dev/null; }
ready() {
  need "${RUNTIME[@]}" || return
  built || build || return
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

# setup.py wants a setuptools that knows the licence's form, CMake, pybind11 and Python's headers; the compilers alone do too.
by_setup() {
  command -v cmake >/dev/null && has pybind11 &&
    "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null &&
    [ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

build() {
  export SIRIUS_CUDA=ON SIRIUS_SIMT=ON SIRIUS_CUDA_ARCHITECTURES=${SIRIUS_CUDA_ARCHITECTURES:-$(architecture)}
  echo "architectures: $SIRIUS_CUDA_ARCHITECTURES"
  if by_setup; then
    "$PYTHON" setup.py build_ext --inplace || return
  else
    echo "no cmake, pybind11, Python.h or setuptools 77: compiling without them"
    by_hand || return
  fi
  "$PYTHON" -m sirius_ext info
}

# The same sources as CMakeLists.txt's, with scalar kernels alone on the CPU. pybind11's headers come with torch.
by_hand() {
  local objects=build/by-hand suffix includes torch_includes flags file numbers nvcc jobs
  nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  includes="-I$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  # Without Python's own headers, those of another interpreter of the same version.
  file=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  for file in /usr/include/$file /usr/local/include/$file /opt/*/include/$file; do
    [ ! -e "$file/Python.h" ] || includes+=" -I$file"
  done
  torch_includes=$("$PYTHON" -c 'import torch.utils.cpp_extension as c; print(*("-I" + path for path in c.include_paths()))')
  includes+=" $("$PYTHON" -m pybind11 --includes 2>/dev/null || echo "$torch_includes")"
  flags="-std=c++20 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-strict-aliasing"
  numbers=${SIRIUS_CUDA_ARCHITECTURES//-real/}
  jobs=$(nproc)
  rm -rf $objects
  mkdir -p $objects/{cpu,cuda,simt}
  {
    for file in csrc/cpu/*.cpp; do
      case $file in *_avx2.cpp | *_avx512.cpp | *_amx*.cpp) continue ;; esac
      echo "g++ $flags -fopenmp -c $file -o $objects/cpu/$(basename "$file").o"
    done
    echo "g++ $flags -fopenmp -DSIRIUS_HAVE_CUDA $includes -c python/bindings.cpp -o $objects/cpu/bindings.o"
    for file in csrc/cuda/*.cu; do
      echo "$nvcc -std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -lineinfo -Xcompiler -fPIC,-fvisibility=hidden" \
        "$(for number in ${numbers//;/ }; do echo "-gencode arch=compute_$number,code=sm_$number"; done)" -DSIRIUS_HAVE_CUDA \
        "-c $file -o $objects/cuda/$(basename "$file").o"
      echo "g++ $flags -O2 -Wno-unknown-pragmas -x c++ -c $file -o $objects/simt/$(basename "$file").o"
    done
    for file in csrc/cuda/*.cpp python/bindings_cuda.cpp; do
      echo "g++ $flags $includes -DSIRIUS_HAVE_CUDA -c $file -o $objects/cuda/$(basename "$file").o"
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

# The tests that run on the card; not all cases of all files, so that there is time for what comes after them.
part_first() {
  ready && need "${TESTS[@]}" || return
  local status=0 name parallel=()
  name=$(card_name)
  has xdist && parallel=(-n "$(nproc)" --dist worksteal)
  # Drafts that stop early are the only tests of a graph's conditional nodes.
  LIMIT=$((LIMIT / 2)) within "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" -k "cuda and not simt" \
    tests/test_cuda_model.py tests/test_early_stop.py "${OP_TESTS[@]}" || status=1
  within "$PYTHON" bench/decode.py --device cuda --shape "$SHAPE" --context 1024 --rounds 3 --skip transformers,dense \
    --out "$OUT/latency-$SHAPE-$name.json" || status=1
  within "$PYTHON" bench/breakdown.py --shape "$SHAPE" --out "$OUT/breakdown-$SHAPE-$name.json" || status=1
  within "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda_build.py || status=1
  return $status
}

# What matters most comes first.
part_bench() {
  ready || return
  local name status=0 decode weights
  name=$(card_name)
  decode=("$PYTHON" bench/decode.py --device cuda --shape "$SHAPE")
  within "${decode[@]}" --context 1024 --skip transformers --out "$OUT/latency-$SHAPE-$name.json" || status=1
  for weights in q8 q4; do
    within "${decode[@]}" --context 1024 --weights $weights --sparsities csparse --widths 1 --rounds 2 \
      --out "$OUT/latency-$SHAPE-$weights-$name.json" || status=1
  done
  within "$PYTHON" bench/bench_ops.py --backend cuda --shapes "$SHAPE" --rows 1,16 --rounds 7 --out "$OUT/ops-$name.json" ||
    status=1
  within "${decode[@]}" --context 512,4096 --rounds 2 --skip transformers,dense --out "$OUT/latency-$SHAPE-$name-contexts.json" ||
    status=1
  return $status
}

# What a period is said to commit is what recorded texts of another model did, at the densities that fit (bench/traces.py).
part_tiers() {
  ready && need "${TESTS[@]}" || return
  local name status=0 decode
  name=$(card_name)
  LIMIT=$((LIMIT / 4)) within "$PYTHON" -m pytest -q -p no:cacheprovider -k "cuda and from_the_host" tests/test_cuda_model.py || status=1
  decode=("$PYTHON" bench/decode.py --device cuda --context 1024 --densities auto --sparsities csparse --widths 1 --rounds 1)
  within "${decode[@]}" --shape llama-3-8b --memory 8 --periods 16,32 --advance 16=15.4,32=29.4 --max-new-tokens 66 \
    --out "$OUT/tiers-llama-3-8b-$name.json" || status=1
  within "${decode[@]}" --shape llama-3-70b --weights q4 --memory 24 --periods 8,16 --advance 8=5,16=6.9 --max-new-tokens 34 \
    --out "$OUT/tiers-llama-3-70b-q4-$name.json" || status=1
  within "${decode[@]}" --shape llama-3-70b --weights q8 --memory 24 --periods 8 --advance 8=4.8 --max-new-tokens 18 \
    --out "$OUT/tiers-llama-3-70b-q8-$name.json" || status=1
  return $status
}

part_sanitize() {
  ready && need "${TESTS[@]}" || return
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on PATH"; return 1; }
  local tool status=0 half
  half=$(($(left) / 2))
  for tool in memcheck racecheck; do
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    LIMIT=$((SECONDS - started + half)) PYTORCH_NO_CUDA_MEMORY_CACHING=1 within \
      compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" \
      -m pytest -q -x -p no:cacheprovider -k "cuda-aligned and bfloat16 and against_reference" "${OP_TESTS[@]}"
    local code=$?
    echo "$tool: exit status $code"
    [ $code = 0 ] || status=1
  done
  return $status
}

part_soak() {
  ready || return
  local status=0
  within "$PYTHON" bench/soak.py --seconds $(($(left) / 2)) || status=1
  command -v ncu >/dev/null || { echo "no ncu on PATH"; return $status; }
  # The kernels of one pass of Full and one of S after the warm-up; all but the launches' own times come from these sections.
  within ncu --profile-from-start off --launch-count 400 --section SpeedOfLight --section Occupancy --section LaunchStats \
    --kernel-name 'regex:linear|gate_up|down|qkv|attention' --csv --log-file "$OUT/kernels-$(card_name).csv" \
    env SIRIUS_GRAPHS=off "$PYTHON" bench/decode.py --device cuda --shape "$SHAPE" --context 1024 --rounds 1 --widths 1 \
    --sparsities csparse --skip transformers,dense --profile || status=1
  return $status
}

# ------------------------------------------------------------------------------------------------------------------------------

if [ "${1:-}" = --run ]; then # one part, in a process of its own: so a time limit ends all of it
  "part_$2"
  exit
fi
[ $# -gt 0 ] || set -- "${PARTS[@]}"
[ "$*" != wheels ] || { part_wheels; exit; }
for part in "$@"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "gpu.sh: expected parts of ${PARTS[*]}, got $part" >&2; exit 2; }
done
summary=() failed=0
for part in "$@"; do
  echo "== $part"
  SECONDS=0
  # It ends in time by itself, unless something hangs that does not listen.
  limit=$LIMIT
  [ "$part" != tiers ] || limit=$((LIMIT * 3 / 2))
  LIMIT=$limit timeout -k 10 $((limit + 20)) "$0" --run "$part" 2>&1 | tee "$OUT/$part.log"
  code=${PIPESTATUS[0]}
  case $code in
  0) result=passed ;;
  124 | 137) result=HUNG ;;
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
