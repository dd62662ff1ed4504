#!/usr/bin/env bash
# Stage 2: supervised fine-tuning on conversations, then merge.
# Usage: bash scripts/run_sft.sh [any flag of supervised_finetuning.py, which overrides what stands here]
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=outputs/pt-merged}"   # folder or hub name of the base model
: "${TRAIN:=data/finetune}" "${VALIDATION:=}"  # train/ and validation/ inside; else a share of TRAIN is held out
: "${OUTPUT:=outputs/sft}"         # adapter, metrics, curves
: "${MERGED:=}"                    # the whole model, for the next stages; empty: OUTPUT-merged

source scripts/env.sh  # PYTHON, LAUNCH, supervise, read_flags, merge_stage
read_flags "$@"

supervise "${LAUNCH[@]}" supervised_finetuning.py \
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
