#!/usr/bin/env bash
# Stage 3: reward modeling on pairs of answers, then merge.
# Usage: bash scripts/run_rm.sh [any flag of reward_modeling.py, which overrides what stands here]
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=outputs/sft-merged}"  # folder or hub name of the base model
: "${TRAIN:=data/reward}" "${VALIDATION:=}"  # train/ and validation/ inside; else a share of TRAIN is held out
: "${OUTPUT:=outputs/rm}"         # adapter with score head, metrics, curves
: "${MERGED:=}"                   # the whole reward model, which stage 4 does not need; empty: OUTPUT-merged

source scripts/env.sh  # PYTHON, LAUNCH, supervise, read_flags, merge_stage
read_flags "$@"

supervise "${LAUNCH[@]}" reward_modeling.py \
  --model_name_or_path "$MODEL" \
  --train_file_dir "$TRAIN" \
  --validation_file_dir "$VALIDATION" \
  --output_dir "$OUTPUT" \
  --max_source_length 256 \
  --max_target_length 256 \
  --num_train_epochs 1 \
  --per_device_train_batch_size 4 \
  --gradient_accumulation_steps 2 \
  --learning_rate 5e-4 \
  --warmup_steps 0.1 \
  --lr_scheduler_type cosine \
  --eval_on_start \
  --logging_steps 5 \
  --save_steps 20 \
  "$@"

merge_stage "$MODEL" "$OUTPUT" "$MERGED" "$@"
