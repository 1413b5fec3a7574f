#!/usr/bin/env bash
# All that is to be known of mllama_gguf on a machine with a GPU, in at most 8 minutes: scripts/gpu_check.sh [FOLDER]
# Each step has a time limit and leaves a log in the folder ($OUT, or "gpu-check"); the table summary.txt grows as they
# end. No network is needed. docs/gpu.md tells how to prepare a run.
#
#   MLLAMA_CARRY  what scripts/gpu/pack.sh made: packages, and perhaps backends of ggml. Without it the mllama_gguf that is
#                 installed is checked, with the GPUs of its ggml and of GGML_BACKEND_PATH.
#   MLLAMA_STEPS  names of steps, to run these alone
#   MLLAMA_TORCH_PYTHON  the Python that has torch and transformers, if it is another one
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-gpu-check}}" && cd "${1:-${OUT:-gpu-check}}" && pwd)
failed=0 width=14 total=480
python=python3 torch_python=${MLLAMA_TORCH_PYTHON:-python3}
# shellcheck source=scripts/steps.sh
. scripts/steps.sh

if [ -n "${MLLAMA_CARRY:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    "$MLLAMA_CARRY" "$site" || exit 1
  ln -s "$PWD/mllama_gguf/data/demo.gguf" "$site/mllama_gguf/data/demo.gguf"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  backend=$(find "$site" -maxdepth 1 -name 'libggml-*.so' | head -1)
  [ -z "$backend" ] || export GGML_BACKEND_PATH=$backend
fi
# A backend's libraries, as cuBLAS, may be those of the machine's torch.
if [ -n "${GGML_BACKEND_PATH:-}" ]; then
  for name in $(ldd "$GGML_BACKEND_PATH" | awk '/not found/ && !/libggml/ { print $1 }'); do
    found=$(find /usr/local /opt "$("$python" -c 'import sys; print(sys.prefix)')" -name "$name" 2> /dev/null | head -1)
    [ -n "$found" ] || { say "$GGML_BACKEND_PATH needs $name, which is not here"; exit 1; }
    export LD_LIBRARY_PATH="$(dirname "$found")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  done
fi

step machine 20 bash -c 'nvidia-smi 2> /dev/null; nproc; "$0" -m mllama_gguf devices' "$python"
"$python" -c '
from mllama_gguf.backend.local import devices
raise SystemExit(not any(device.type in ("gpu", "igpu") for device in devices()))' 2> /dev/null ||
  { say "no GPU is seen, so nothing else is run"; exit 1; }
step doctor 40 "$python" -m mllama_gguf doctor
step caption 40 "$python" -m mllama_gguf caption examples/apple.png
export MLLAMA_GPU_FIGURES=$out/figures.json
tests() { step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider tests/gpu -k "$3"; }
tests golden 90 "golden"
step full_shape 150 "$python" scripts/gpu/full_shape.py
step transformers 60 "$torch_python" scripts/gpu/against_transformers.py
tests splits 40 "left_to_the_cpu"
MLLAMA_GPU_PRECISION=exact MLLAMA_GPU_FIGURES=$out/figures-exact.json tests exact 60 "golden"
MLLAMA_GPU_FIGURES=$out/figures-types.json tests types 40 "types"
MLLAMA_GPU_FIGURES=$out/figures-layers.json tests layers 90 "number_of_layers or every_count or two_devices"
tests plan 90 "plan"
tests life 60 "taps or abort or cache or child or default"
step no_memory 60 "$torch_python" scripts/gpu/no_memory.py "$python"
# Where the processor has AMX: see there
step amx 120 env MLLAMA_STEPS="kernels caption trial" PYTHON="$python" scripts/amx_check.sh "$out/amx"
sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer"; return 77; }
  compute-sanitizer --error-exitcode 9 "$0" -m mllama_gguf caption examples/apple.png
}
export -f sanitize
step sanitizer 60 bash -c sanitize "$python"
say "$(printf 'all in %d s' "$(($(date +%s) - began))")"
exit "$failed"
