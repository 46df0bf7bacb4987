#!/usr/bin/env bash
# make-llama-cpp.sh: .venv-llama-cpp/bin/llama-quantize, built from the llama.cpp that llama-cpp-python's source package
# brings (a C++ compiler is needed; some eight minutes on one core). Does nothing when that is already there.
# PYTHON picks the interpreter, JOBS how many compilers run at once.
set -euo pipefail
cd "$(dirname "$0")"

pin=llama-cpp-python==0.3.36
venv=$PWD/.venv-llama-cpp
marker=$venv/.done
[[ -f $marker && $(<"$marker") == "$pin" ]] && exit 0

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q scikit-build-core pathspec cmake ninja
"$venv/bin/pip" download -q --no-deps --no-binary llama-cpp-python --no-build-isolation -d "$venv/source" "$pin"
tar -xzf "$venv"/source/*.tar.gz -C "$venv/source" --strip-components 1
PATH=$venv/bin:$PATH
# Optimized little: the models here are small. No server, no tests, nothing from the network.
cmake -S "$venv/source/vendor/llama.cpp" -B "$venv/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > "$venv/cmake.log"
cmake --build "$venv/build" --target llama-quantize -j "${JOBS:-2}" > "$venv/build.log"
mv "$venv/build/bin/llama-quantize" "$venv/bin/"
rm -rf "$venv/source" "$venv/build"
echo "$pin" > "$marker"
