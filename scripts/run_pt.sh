#!/usr/bin/env bash
# Stage 1: continue pretraining on documents, then merge.
# Usage: bash scripts/run_pt.sh [any flag of pretraining.py, which overrides what stands here]
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=models/SmolLM2-135M-Instruct}"  # folder or hub name of the base model
: "${TRAIN:=data/pretrain}" "${VALIDATION:=}"  # train/ and validation/ inside; else a share of TRAIN is held out
: "${OUTPUT:=outputs/pt}"         # adapter, metrics, curves
: "${MERGED:=}"                   # the whole model, for the next stage; empty: OUTPUT-merged

source scripts/env.sh  # PYTHON, LAUNCH, supervise, read_flags, merge_stage
read_flags "$@"

supervise "${LAUNCH[@]}" pretraining.py \
  --model_name_or_path "$MODEL" \
  --train_file_dir "$TRAIN" \
  --validation_file_dir "$VALIDATION" \
  --output_dir "$OUTPUT" \
  --block_size 512 \
  --num_train_epochs 1 \
  --per_device_train_batch_size 4 \
  --learning_rate 5e-4 \
  --warmup_steps 0.1 \
  --lr_scheduler_type cosine \
  --eval_on_start \
  --logging_steps 2 \
  --save_steps 10 \
  "$@"

merge_stage "$MODEL" "$OUTPUT" "$MERGED" "$@"
