#!/usr/bin/env bash
# The whole way on what the repository ships: minutes on two cores, nothing fetched.
set -euo pipefail
export HF_HUB_OFFLINE=1
here=recipes/quickstart
stage() { printf '\n\033[1m%s\033[0m\n' "$*"; }

stage "1/6 convert: the hand-written checkpoint becomes a proven Hugging Face model"
python convert_checkpoint.py --config $here/convert.yaml

stage "2/6 prepare: records become instructions and responses"
python prepare_dataset.py --config $here/prepare.yaml

stage "3/6 train: TRL, on the responses only"
accelerate launch --config_file recipes/accelerate/one_process.yaml train_sft.py --config $here/train.yaml

stage "4/6 evaluate: base against instruct on topics neither has seen"
python evaluate_model.py --config $here/evaluate.yaml

topic="A little girl named Lily. One day, she found a big red ball in the park."
for ending in happy sad; do
    stage "5/6 generate: the same topic, a $ending ending"
    python generate.py --model runs/quickstart/model --topic "$topic" --ending $ending | tee runs/quickstart/$ending.txt
done

stage "6/6 publish: the folder that the Hub would get"
python publish.py --config $here/publish.yaml

python $here/show.py
