#!/usr/bin/env bash
# Runs native/tests/kernels: every CPU kernel against a reference in double precision. On this processor built with GCC,
# with Clang, and with GCC's sanitizers; on ARM built with Debian's cross compiler, emulated by qemu with all
# instructions and with those of a Cortex-A72. About a minute.
#
#   --host   only on this processor
#
# Needs llama-cpp-python for ggml's headers, and for ARM Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and
# qemu-user.
set -euo pipefail
cd "$(dirname "$0")/.."

host=
case ${1:-} in
  '') ;;
  --host) host=1 ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
tools=(gcc clang cmake)
[ -n "$host" ] || tools+=(aarch64-linux-gnu-gcc qemu-aarch64)
for tool in "${tools[@]}"; do
  command -v "$tool" > /dev/null && continue
  echo "$0: there is no $tool here; apt-get install gcc clang cmake gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
  exit 1
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # NAME COMPILER OPTION...
  CC=$2 CFLAGS='' cmake -S native/tests -B "$work/$1" -DPython3_EXECUTABLE="$(command -v python)" "${@:3}" > "$work/$1.log" &&
    cmake --build "$work/$1" -j "$(nproc)" >> "$work/$1.log" || { cat "$work/$1.log"; exit 1; }
}
build gcc gcc
"$work/gcc/kernels_test"
build clang clang
"$work/clang/kernels_test"
build sanitize gcc -DMLLAMA_SANITIZE=ON
"$work/sanitize/kernels_test"
[ -z "$host" ] || exit 0
build aarch64 aarch64-linux-gnu-gcc -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_EXE_LINKER_FLAGS=-static
for cpu in max cortex-a72; do
  echo "-- ARM: $cpu"
  qemu-aarch64 -cpu "$cpu" "$work/aarch64/kernels_test"
done
