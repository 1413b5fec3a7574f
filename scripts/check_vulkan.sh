#!/usr/bin/env bash
# Runs tests/gpu on a Vulkan device in software (Mesa's llvmpipe), in a Debian 13 root, because the drivers of Debian 12
# crash. One command does all: scripts/check_vulkan.sh
#
#   --status   only say whether native/, the pins or these tests differ from what .ci/vulkan-checked names
#   --record   write what was checked to .ci/vulkan-checked
#   MLLAMA_VULKAN_WORK   a folder that keeps the root and the builds (default: a temporary one)
#   MLLAMA_WHEELS        a folder with the wheel of llama-cpp-python, else it is built
#
# Needs root, Debian or Ubuntu, and its package registry. Exit code 77: not run, for a reason of the machine, which the
# last line tells.
set -euo pipefail
cd "$(dirname "$0")/.."

not_run() { echo "Vulkan: NOT CHECKED: $*"; exit 77; }
said() { echo "== Vulkan, $(($(date +%s) - began)) s: $*"; }
began=$(date +%s) status= record=
for word in "$@"; do
  case $word in
    --status) status=1 ;;
    --record) record=1 ;;
    *) sed -n '2,13p' "$0"; exit 2 ;;
  esac
done

state() {
  { git ls-files native tests/gpu scripts/gpu/backend.sh scripts/gpu/CMakeLists.txt scripts/check_vulkan.sh | LC_ALL=C sort | xargs sha256sum
    grep -o 'llama-cpp-python==[0-9.]*' pyproject.toml; } | sha256sum | cut -d' ' -f1
}
if [ -n "$status" ]; then
  if [ "$(state)" = "$(cut -d' ' -f1 .ci/vulkan-checked 2> /dev/null)" ]; then
    echo "Vulkan: checked on $(cut -d' ' -f2- .ci/vulkan-checked), and native/, the pins and tests/gpu are the same since"
  else
    echo "Vulkan: NOT CHECKED since native/, the pins or tests/gpu changed; run scripts/check_vulkan.sh --record"
  fi
  exit 0
fi

# ---- what the machine has -------------------------------------------------------------------------------------------

[ "$(id -u)" = 0 ] || not_run "only root can make a Debian root"
command -v apt-get > /dev/null || not_run "no apt-get here"
missing=()
for tool in debootstrap glslc cmake g++ unshare; do command -v "$tool" > /dev/null || missing+=("${tool/unshare/util-linux}"); done
[ -f /usr/include/vulkan/vulkan.h ] || missing+=(libvulkan-dev)
[ -d /usr/share/cmake/SPIRV-Headers ] || missing+=(spirv-headers)
if [ ${#missing[@]} -gt 0 ]; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    > /dev/null 2>&1 || not_run "apt-get cannot install ${missing[*]}"
fi
if [ -z "${MLLAMA_VULKAN_WORK:-}" ]; then
  MLLAMA_VULKAN_WORK=$(mktemp -d)
  trap 'rm -rf "$MLLAMA_VULKAN_WORK"' EXIT
fi
work=$MLLAMA_VULKAN_WORK root=$MLLAMA_VULKAN_WORK/root
mkdir -p "$work/wheels"

said "a Debian 13 root"
if [ ! -f "$root/complete" ]; then
  rm -rf "$root"
  debootstrap --variant=minbase \
    --include=python3,python3-venv,mesa-vulkan-drivers,libvulkan1,libvulkan-dev,libgomp1,g++ trixie "$root" \
    > "$work/debootstrap.log" 2>&1 || not_run "debootstrap: $(tail -1 "$work/debootstrap.log")"
  touch "$root/complete"
fi

# ---- builds ---------------------------------------------------------------------------------------------------------

said "ggml's Vulkan backend"
if [ ! -f "$work/libggml-vulkan.so" ]; then
  mkdir -p "$work/include" # those of Debian 12 are too old
  cp -r "$root/usr/include/vulkan" "$root/usr/include/vk_video" "$work/include/"
  scripts/gpu/backend.sh vulkan "$work" "-DVulkan_INCLUDE_DIR=$work/include"
fi

said "wheels"
requirement=$(grep -o 'llama-cpp-python==[0-9.]*' pyproject.toml | head -1)
found=$(find "${MLLAMA_WHEELS:-$work/wheels}" -name 'llama_cpp_python-*.whl' | head -1)
if [ -z "$found" ]; then
  CMAKE_ARGS="-DGGML_RPC=ON" python3 -m pip wheel -q --no-deps --no-cache-dir --no-binary llama-cpp-python -w "$work/wheels" "$requirement"
elif [ ! "$(dirname "$found")" -ef "$work/wheels" ]; then
  cp "$found" "$work/wheels/"
fi
rm -f "$work"/wheels/mllama_gguf-*.whl
PIP_FIND_LINKS="$work/wheels" python3 -m pip wheel -q --no-deps -w "$work/wheels" .
inside=$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
platforms=(--platform linux_x86_64 --platform manylinux2014_x86_64)
for minor in $(seq 17 41); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done # Debian 13 has glibc 2.41
python3 -m pip download -q -d "$work/wheels" --find-links "$work/wheels" --only-binary=:all: --python-version "$inside" \
  "${platforms[@]}" "$(find "$work/wheels" -name 'mllama_gguf-*.whl')" 'pytest>=8,<10' 'hypothesis>=6.100,<6.170'

# ---- the tests ------------------------------------------------------------------------------------------------------

said "into the root"
rm -rf "$root/check" && mkdir -p "$root/check"
cp -r "$work/wheels" "$work/libggml-vulkan.so" tests examples pyproject.toml native "$root/check/"
if [ ! -x "$root/venv/bin/python" ]; then chroot "$root" python3 -m venv /venv; fi
chroot "$root" /venv/bin/pip install -q --no-index --find-links /check/wheels llama-cpp-python pytest hypothesis 2> /dev/null
chroot "$root" /venv/bin/pip install -q --no-index --find-links /check/wheels --force-reinstall --no-deps mllama_gguf 2> /dev/null
chroot "$root" /venv/bin/pip install -q --no-index --find-links /check/wheels mllama_gguf 2> /dev/null

# words: environment, then arguments of pytest
run() {
  unshare -m bash -c '
    mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev/shm" && root=$0 && shift 0 &&
    exec chroot "$root" /usr/bin/env -i PATH=/venv/bin:/usr/bin:/bin HOME=/root LANG=C.UTF-8 \
      GGML_BACKEND_PATH=/check/libggml-vulkan.so "$@"' "$root" "$@"
}
said "one device, fast (ggml rounds the factors of products to F16)"
run GGML_VK_VISIBLE_DEVICES=0 MLLAMA_GPU_FIGURES=/check/fast.json \
  sh -c 'cd /check && timeout 3000 python -m pytest -q -p no:cacheprovider tests/gpu'
said "two devices, exact"
run GGML_VK_VISIBLE_DEVICES=0,0 MLLAMA_GPU_PRECISION=exact MLLAMA_GPU_FIGURES=/check/exact.json \
  sh -c 'cd /check && timeout 3000 python -m pytest -q -p no:cacheprovider tests/gpu -k "golden or number_of_layers or two_devices"'
for kind in fast exact; do echo "-- largest relative errors, $kind:"; cat "$root/check/$kind.json"; done
said "done"
if [ -n "$record" ]; then
  echo "$(state) $(date -u +%Y-%m-%d)" > .ci/vulkan-checked
fi
