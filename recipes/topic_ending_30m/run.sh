#!/usr/bin/env bash
# Your checkpoint lies at checkpoints/topic_ending_30m.pt and TinyStories-Instruct-train.txt in this folder.
set -euo pipefail
recipe=recipes/topic_ending_30m
python convert_checkpoint.py --config $recipe/convert.yaml
python prepare_dataset.py --config $recipe/prepare.yaml
accelerate launch --config_file recipes/accelerate/one_process.yaml train_sft.py --config $recipe/train.yaml
python evaluate_model.py --config $recipe/evaluate.yaml
python generate.py --model runs/topic_ending_30m/model --topic "A small boat that was afraid of the sea." --ending sad
python publish.py --config $recipe/publish.yaml
