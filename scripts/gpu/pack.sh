#!/usr/bin/env bash
# Packs what scripts/gpu_check.sh needs on a machine without network: pack.sh FILE.tar.xz PYTHON [LIBRARY...]
#
#   PYTHON          the other machine's version, as in 3.12 (x86-64, glibc 2.39 or later)
#   LIBRARY         backends of ggml that scripts/gpu/backend.sh made
#   MLLAMA_WHEELS   a folder with the wheel of llama-cpp-python, else it is built
#   MLLAMA_THERE    packages that the other machine has and that are left out, as in "numpy pillow"
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7p' "$0"; exit 2; }
file=$(realpath "$1") python=$2
shift 2
libraries=()
for library in "$@"; do libraries+=("$(realpath "$library")"); done
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels" "$work/site"

requirement=$(grep -o 'llama-cpp-python==[0-9.]*' pyproject.toml | head -1)
if [ -n "${MLLAMA_WHEELS:-}" ]; then
  cp "$MLLAMA_WHEELS"/llama_cpp_python-*.whl "$work/wheels/"
else
  CMAKE_ARGS="-DGGML_RPC=ON -DGGML_NATIVE=OFF" python3 -m pip wheel -q --no-deps --no-cache-dir \
    --no-binary llama-cpp-python -w "$work/wheels" "$requirement"
fi
PIP_FIND_LINKS="$work/wheels" python3 -m pip wheel -q --no-deps -w "$work/wheels" .
platforms=(--platform linux_x86_64 --platform manylinux2014_x86_64)
for minor in $(seq 17 39); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
python3 -m pip install -q --no-compile --disable-pip-version-check --target "$work/site" --find-links "$work/wheels" --only-binary=:all: \
  --python-version "$python" --implementation cp "${platforms[@]}" \
  "$(find "$work/wheels" -name 'mllama_gguf-*.whl')" 'pytest>=8,<10' 'hypothesis>=6.100,<6.170'

# not needed there: programs, what is in the clone, and the copies of libraries in the wheel of llama-cpp-python
cd "$work/site"
rm -rf bin lib lib64 include share mllama_gguf/data/demo.gguf llama_cpp/lib/libmtmd* llama_cpp/lib/libllama-common*
for package in ${MLLAMA_THERE:-}; do
  record=$(find . -maxdepth 2 -ipath "./${package//-/[-_.]}-*.dist-info/RECORD" | head -1)
  [ -n "$record" ] || { echo "MLLAMA_THERE: nothing needs $package"; continue; }
  cut -d, -f1 "$record" | grep -v '^\.\.' | xargs -d '\n' rm -f
done
find . -type d -empty -delete
find . -name '*.so*' -type f -exec strip --strip-unneeded {} + 2> /dev/null || true
for library in llama_cpp/lib/*.so; do # one file with three names
  for name in "$library".*; do
    [ -e "$name" ] || continue
    cmp -s "$library" "$name" && ln -sf "$(basename "$library")" "$name"
  done
done
for library in "${libraries[@]}"; do cp "$library" .; done
tar -cf - . | xz -T0 -6 > "$file"
ls -l "$file"
