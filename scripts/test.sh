#!/usr/bin/env bash
# Passes the tests on a fresh machine: makes .venv, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv dev

ruff check .
ruff format --check .
mypy
# One process more than CI has cores, for some tests wait, in the order of tests/conftest.py.
pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
