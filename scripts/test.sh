#!/usr/bin/env bash
# Passes the tests on a fresh machine: makes .venv, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv dev

ruff check .
ruff format --check .
mypy
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"  # in the order of tests/conftest.py
