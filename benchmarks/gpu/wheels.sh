#!/usr/bin/env bash
# Collects the wheels that a GPU image with torch, transformers, accelerate and peft lacks, into benchmarks/gpu/wheels,
# from which all.sh installs them: bash benchmarks/gpu/wheels.sh [bitsandbytes==0.50.2 ...]
# On a machine with a network. PYTHON_VERSION is that of the GPU machine (default 3.12, x86-64).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check)
version=${PYTHON_VERSION:-3.12}
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
pinned() { sed -n "s/^\($1==[^ ]*\).*/\1/p" "$here/../../requirements/cpu.txt"; }
packages=("$@")
for name in soundfile cffi pycparser soxr datasets dill multiprocess math-verify latex2sympy2_extended \
    antlr4-python3-runtime hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions; do
    packages+=("$(pinned "$name")")
done
rm -rf "$here/wheels"
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$here/wheels" "${packages[@]}"
# DeepSpeed comes as source; its operators, which this project does not use, stay uncompiled
DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --wheel-dir "$here/wheels" "$(pinned deepspeed)"
du -ch "$here"/wheels/*.whl
