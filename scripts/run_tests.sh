#!/usr/bin/env bash
# Lint and tests, on a fresh clone too: bash scripts/run_tests.sh [pytest arguments]; -m "not slow" for the fast part.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${PYTHON:=}"  # an existing environment's python: nothing is installed then
source scripts/venv.sh -r requirements.txt -r tests/requirements.txt  # PYTHON
bin=$(dirname "$PYTHON")
"$bin/ruff" check .
"$bin/shellcheck" scripts/*.sh benchmarks/*.sh .ci/run
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # one thread each, tests/conftest.py
