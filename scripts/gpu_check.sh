#!/usr/bin/env bash
# All that is to be known of mllama_gguf on a machine with a GPU, in at most 8 minutes: scripts/gpu_check.sh [FOLDER]
# Each step has a time limit and leaves a log in the folder ($OUT, or "gpu-check"); the table summary.txt grows as they
# end. No network is needed. docs/gpu.md tells how to prepare a run.
#
#   MLLAMA_CARRY  a folder with wheels, and perhaps a backend of ggml as a library (scripts/gpu/backend.sh). Without it the
#                 mllama_gguf that is installed is checked, with the GPUs of its ggml and of GGML_BACKEND_PATH.
#   MLLAMA_STEPS  names of steps, to run these alone
#   MLLAMA_TORCH_PYTHON  the Python that has torch and transformers, if it is another one
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-gpu-check}}" && cd "${1:-${OUT:-gpu-check}}" && pwd)
began=$(date +%s) total=480 failed=0
python=python3 torch_python=${MLLAMA_TORCH_PYTHON:-python3}
: > "$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: never longer than what is left of the whole
step() {
  local name=$1 limit=$2 start code left
  shift 2
  [[ -z "${MLLAMA_STEPS:-}" || " $MLLAMA_STEPS " == *" $name "* ]] || return 0
  left=$((total - ($(date +%s) - began)))
  if [ "$left" -lt 5 ]; then say "$(printf '%-14s not run: the time is up' "$name")"; failed=1; return 0; fi
  start=$(date +%s)
  timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1
  code=$?
  case $code in
    0) word=ok ;;
    77) word="not possible here" ;;
    124 | 137) word="STOPPED after its time limit" failed=1 ;;
    *) word="FAILED ($code)" failed=1 ;;
  esac
  say "$(printf '%-14s %4d s  %-28s %s' "$name" "$(($(date +%s) - start))" "$word" "$(tail -1 "$out/$name.log" | cut -c1-110)")"
}

install() {
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$MLLAMA_CARRY"/*.whl
}
if [ -n "${MLLAMA_CARRY:-}" ]; then
  export -f install; export out MLLAMA_CARRY
  step install 60 bash -c install
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
  backend=$(find "$MLLAMA_CARRY" -name 'libggml-*.so' | head -1)
  [ -z "$backend" ] || export GGML_BACKEND_PATH=$backend
fi

step machine 20 bash -c 'nvidia-smi 2> /dev/null; nproc; "$0" -m mllama_gguf devices' "$python"
step doctor 40 "$python" -m mllama_gguf doctor
step caption 40 "$python" -m mllama_gguf caption examples/apple.png
export MLLAMA_GPU_FIGURES=$out/figures.json
tests() { step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider tests/gpu -k "$3"; }
tests splits 40 "left_to_the_cpu"
tests golden 90 "golden"
MLLAMA_GPU_PRECISION=exact MLLAMA_GPU_FIGURES=$out/figures-exact.json tests exact 60 "golden"
tests types 40 "types"
tests layers 90 "number_of_layers or every_count or two_devices"
tests plan 90 "plan"
tests life 60 "taps or abort or cache or child or default"
step full_shape 150 "$python" scripts/gpu/full_shape.py
step transformers 60 "$torch_python" scripts/gpu/against_transformers.py
step no_memory 60 "$torch_python" scripts/gpu/no_memory.py "$python"
sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer"; return 77; }
  compute-sanitizer --error-exitcode 9 "$0" -m mllama_gguf caption examples/apple.png
}
export -f sanitize
step sanitizer 60 bash -c sanitize "$python"
say "$(printf 'all in %d s' "$(($(date +%s) - began))")"
exit "$failed"
