#!/usr/bin/env bash
# Everything that needs CUDA, in one command of under nine minutes on one H100 with 80 GB: see benchmarks/gpu.py, which takes
# the arguments. Weights and data are random, nothing is downloaded.
#     bash benchmarks/gpu.sh                        # where llava_train is installed
#     WHEELS=.whl bash benchmarks/gpu.sh            # where torch, transformers and peft are, and wheels of what else is needed
#     WHEELS=.whl bash benchmarks/gpu.sh tests      # the tests that need CUDA in its place, where pytest and hypothesis are too
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${WHEELS:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
site=$PWD
if [ -n "${WHEELS:-}" ]; then
    target=$(mktemp -d)
    trap 'rm -rf "$target"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$target" "$WHEELS"/*.whl
    site=$site:$target
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ -z "${LLAVA_COMMIT:-}" ]; then
    LLAVA_COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
    export LLAVA_COMMIT
fi
if [ "${1:-}" = tests ]; then
    mapfile -t files < <(grep -rlE 'mark\.cuda' tests/model tests/train --include='test_*.py')
    "$python" -m pytest -o addopts= -q -rs -m cuda "${files[@]}" "${@:2}"
else
    "$python" benchmarks/gpu.py "$@"
fi
