#!/usr/bin/env bash
# Stage 4: PPO against the reward model, then merge.
# Usage: bash scripts/run_rl.sh [any flag of rl_training.py, which overrides what stands here]
set -euo pipefail
cd "$(dirname "$0")/.."

: "${MODEL:=outputs/sft-merged}"      # folder or hub name of the SFT model
: "${REWARD_MODEL:=outputs/rm}"       # an adapter on MODEL shares its memory; any other reward model is loaded beside
: "${TRAIN:=data/prompts}" "${VALIDATION:=}"  # train/ and validation/ inside; else a share of TRAIN is held out
: "${OUTPUT:=outputs/rl}"             # adapter, metrics, curves, sampled answers
: "${MERGED:=}"                       # the whole model; empty: OUTPUT-merged

source scripts/env.sh  # PYTHON, LAUNCH, supervise, read_flags, merge_stage
read_flags "$@"

supervise "${LAUNCH[@]}" rl_training.py \
  --model_name_or_path "$MODEL" \
  --reward_model_name_or_path "$REWARD_MODEL" \
  --train_file_dir "$TRAIN" \
  --validation_file_dir "$VALIDATION" \
  --output_dir "$OUTPUT" \
  --max_source_length 256 \
  --max_target_length 64 \
  --max_steps 12 \
  --batch_size 32 \
  --mini_batch_size 8 \
  --ppo_epochs 1 \
  --learning_rate 1.2e-3 \
  --init_kl_coef 0.05 \
  --use_score_scaling \
  --gae_lambda 1 \
  --missing_eos_penalty 0.3 \
  --lr_scheduler_type constant_with_warmup \
  --warmup_steps 4 \
  --eval_on_start \
  --save_steps 1 \
  "$@"

merge_stage "$MODEL" "$OUTPUT" "$MERGED" "$@"
