#!/usr/bin/env bash
# A corpus → a tokenizer → a base → an instruct model: bash recipes/wikitext_dolly/run.sh
# The same commands in minutes, on text that the repository ships: bash recipes/wikitext_dolly/run.sh smoke
set -euxo pipefail
recipe=recipes/wikitext_dolly${1:+_$1}

python train_tokenizer.py --config "$recipe/tokenizer.yaml"
python pretrain.py --config "$recipe/pretrain.yaml"
python prepare_dataset.py --config "$recipe/prepare.yaml"
python train_sft.py --config "$recipe/train.yaml"
python evaluate_model.py --config "$recipe/evaluate.yaml"
python generate.py --config "$recipe/generate.yaml"
python publish.py --config "$recipe/publish.yaml"
