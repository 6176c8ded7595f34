#!/usr/bin/env bash
# Makes a folder of wheels, 5 MB, for a machine without internet that has Python 3.12 and torch, transformers, peft, triton,
# pyarrow and pandas, and what they need: what llava_train imports beside. Versions are those of constraints.txt.
#     bash benchmarks/fetch_wheels.sh [FOLDER]      # .whl; then there: WHEELS=.whl bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
python=${PYTHON:-python3}
mkdir -p "$folder"

platforms=()
for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
export PIP_CONSTRAINT=constraints.txt
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" \
    pydantic pydantic_core annotated-types typing-inspection typing_extensions \
    datasets dill multiprocess hjson msgpack anls liger-kernel==0.8.5

# DeepSpeed is published as source. Without its operators, none of which llava_train uses, its wheel fits every machine.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-binary deepspeed --wheel-dir "$folder" deepspeed
du -sh "$folder"
