#!/usr/bin/env bash
# Whether the AMX kernels are right and faster, on an Intel processor that has AMX (Sapphire Rapids and later):
# scripts/amx_check.sh [FOLDER]
# Each step has a time limit and leaves a log in the folder ($OUT, or "amx-check"); summary.txt grows as they end. On
# other processors it says so and ends well.
#
#   MLLAMA_KERNELS_TEST  native/tests' program, built elsewhere; else it is built here with CC, cmake and ggml's headers
#   MLLAMA_LAYERS        of the benchmarks; default 4
#   MLLAMA_STEPS         names of steps, to run these alone
#
# The benchmarks need the extra "bench"; without it they are left out.
set -uo pipefail
cd "$(dirname "$0")/.."
grep -qw amx_int8 /proc/cpuinfo 2> /dev/null && grep -qw amx_bf16 /proc/cpuinfo ||
  { echo "this processor has no AMX, so there is nothing to check"; exit 0; }
out=$(mkdir -p "${1:-${OUT:-amx-check}}" && cd "${1:-${OUT:-amx-check}}" && pwd)
python=${PYTHON:-python3} layers=${MLLAMA_LAYERS:-4}
failed=0 width=18 total=0
# shellcheck source=scripts/steps.sh
. scripts/steps.sh

kernels() { # every kernel against double precision: here with real tiles
  local program=${MLLAMA_KERNELS_TEST:-}
  if [ -z "$program" ]; then
    command -v cmake > /dev/null && command -v "${CC:-cc}" > /dev/null || { echo "no cmake or no compiler"; return 77; }
    cmake -S native/tests -B "$out/build" -DPython3_EXECUTABLE="$(command -v "$0")" &&
      cmake --build "$out/build" -j "$(nproc)" || return 1
    program=$out/build/kernels_test
  fi
  "$program" | tee "$out/kernels.txt"
  [ "${PIPESTATUS[0]}" = 0 ] || return 1
  if grep -x 'amx: not on this processor' "$out/kernels.txt"; then return 77; fi # the system may refuse tiles
}
caption() { # the same words with either kernel
  local words
  words=$(MLLAMA_CPU_KERNEL=avx512bf16 "$0" -m mllama_gguf caption examples/apple.png) || return 1
  echo "$words"
  [ "$(MLLAMA_CPU_KERNEL=amx "$0" -m mllama_gguf caption examples/apple.png)" = "$words" ]
}
trial() { # what a first use finds, with the speeds of all tables
  export XDG_CACHE_HOME=$out/cache
  env -u MLLAMA_CPU_KERNEL "$0" -m mllama_gguf caption examples/apple.png && "$0" -m mllama_gguf devices | grep kernel
}
bench() { # NAME KERNEL OPTION...: a benchmark's figures in a file
  "$0" -c 'import torch, transformers' 2> /dev/null || { echo "the extra bench is not installed"; return 77; }
  MLLAMA_CPU_KERNEL=$2 "$0" "scripts/bench_$1.py" "${@:3}"
}
export -f kernels caption trial bench
export out

step machine 20 bash -c 'lscpu; nproc; "$0" -m mllama_gguf devices' "$python"
step kernels 180 bash -c kernels "$python"
step caption 60 bash -c caption "$python"
step trial 60 bash -c trial "$python"
step doctor 60 env MLLAMA_CPU_KERNEL=amx "$python" -m mllama_gguf doctor
for round in 1 2; do # in turns
  for kernel in avx512bf16 amx; do
    step "encode-$kernel-$round" 300 bash -c 'bench encode "$@"' "$python" "$kernel" --layers "$layers" --rounds 1 \
      --json "$out/encode-$kernel-$round.json"
    step "decode-$kernel-$round" 300 bash -c 'bench decode "$@"' "$python" "$kernel" --layers "$layers" --rounds 1 \
      --json "$out/decode-$kernel-$round.json"
  done
done
exit "$failed"
