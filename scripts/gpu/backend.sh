#!/usr/bin/env bash
# Builds one backend of ggml as a library: backend.sh vulkan|cuda FOLDER [CMake options]
# It downloads the sources of the llama-cpp-python that pyproject.toml pins, and puts libggml-NAME.so into FOLDER.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name=$1 folder=$2
shift 2
mkdir -p "$folder"
requirement=$(grep -o 'llama-cpp-python==[0-9.]*' "$here/../../pyproject.toml" | head -1)
if [ ! -d "$folder/source" ]; then
  # pip prepares what it downloads, and for that takes CMake and scikit-build-core from the registry, or builds them.
  python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$folder" "$requirement" 2> "$folder/download.log" ||
    [ -n "$(find "$folder" -maxdepth 1 -name 'llama_cpp_python-*.tar.gz')" ] || { cat "$folder/download.log"; exit 1; }
  mkdir -p "$folder/unpacked"
  tar -xzf "$folder"/llama_cpp_python-*.tar.gz -C "$folder/unpacked"
  mv "$folder"/unpacked/llama_cpp_python-* "$folder/source"
fi
cmake -S "$here" -B "$folder/$name" -DCMAKE_BUILD_TYPE=Release -DGGML_SOURCE="$folder/source/vendor/llama.cpp/ggml" \
  "-DGGML_${name^^}=ON" "$@" > "$folder/$name.log"
cmake --build "$folder/$name" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" --target "ggml-$name" >> "$folder/$name.log"
library=$(find "$folder/$name" -name "libggml-$name.so" | head -1)
strip -o "$folder/libggml-$name.so" "$library"
ls -l "$folder/libggml-$name.so"
