#!/usr/bin/env bash
# TinyStories → the base of the topic-ending system, its vocabulary trimmed → that system: bash recipes/tinystories_30m/run.sh
# The same commands in minutes, on text that the repository ships: bash recipes/tinystories_30m/run.sh smoke
set -euxo pipefail
recipe=recipes/tinystories_30m${1:+_$1}

python pretrain.py --config "$recipe/pretrain.yaml"
python trim_vocabulary.py --config "$recipe/trim.yaml"
python prepare_dataset.py --config "$recipe/prepare.yaml"
python train_sft.py --config "$recipe/train.yaml"
python evaluate_model.py --config "$recipe/evaluate.yaml"
python generate.py --config "$recipe/generate.yaml"
python publish.py --config "$recipe/publish.yaml"
