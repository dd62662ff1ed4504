#!/usr/bin/env bash
# Every benchmark, one after another, each alone on the machine: bash benchmarks/run.sh > figures.md (hours)
# Reads the models of run_pipeline.sh; makes environments for TRL 1.12, LLaMA-Factory and, where MEDICALGPT names a
# checkout of it, MedicalGPT in benchmarks/.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=models/SmolLM2-135M-Instruct}"
: "${SFT_MODEL:=outputs/sft-merged}" "${REWARD_MODEL:=outputs/rm}"
: "${PYTHON:=.venv/bin/python}"

run() { echo "## $*"; echo; "$PYTHON" "benchmarks/$1.py" "${@:2}"; }
run speed --model "$MODEL" ${MEDICALGPT:+--medicalgpt "$MEDICALGPT"}
run attention
run compile --model "$MODEL"
run ppo --model "$SFT_MODEL" --reward_model "$REWARD_MODEL"
run rule --model "$SFT_MODEL"
run data --model "$MODEL"
run scaling --model "$MODEL"
run merge --tokenizer "$MODEL"
run faults
