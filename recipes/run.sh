#!/usr/bin/env bash
# All six stages of one recipe: bash recipes/run.sh quickstart
set -euo pipefail
name=${1:?which recipe? a folder in recipes/, for example quickstart}
recipe=recipes/$name
stage() { printf '\n\033[1m%s\033[0m\n' "$*"; }

stage "1/6 convert: the hand-written checkpoint becomes a proven Hugging Face model"
python convert_checkpoint.py --config "$recipe/convert.yaml"

stage "2/6 prepare: records become instructions and responses"
python prepare_dataset.py --config "$recipe/prepare.yaml"

stage "3/6 train: TRL, on the responses only"
accelerate launch --config_file recipes/accelerate/cpu.yaml train_sft.py --config "$recipe/train.yaml"

stage "4/6 evaluate: base against instruct on topics neither has seen"
python evaluate_model.py --config "$recipe/evaluate.yaml"

for ending in happy sad; do
    stage "5/6 generate: the same topic, a $ending ending"
    python generate.py --config "$recipe/generate.yaml" --ending $ending | tee "runs/$name/$ending.txt"
done

stage "6/6 publish: the folder that the Hub would get"
python publish.py --config "$recipe/publish.yaml"

python recipes/show.py "$name"
