#!/usr/bin/env bash
# All stages of one recipe, in order, those that its folder has a file for: bash recipes/run.sh quickstart
set -euo pipefail
name=${1:?which recipe? a folder in recipes/, for example quickstart}
recipe=recipes/$name
[ -d "$recipe" ] || { echo "There is no $recipe; choose one of $(dirname recipes/*/evaluate.yaml | xargs -n1 basename | xargs)." >&2; exit 2; }

stage() { # its file's name, what happens, the command
    [ -f "$recipe/$1.yaml" ] || return 0
    printf '\n\033[1m%s: %s\033[0m\n' "$1" "$2" >&2
    "${@:3}" --config "$recipe/$1.yaml"
}

stage tokenizer "the text gets a vocabulary of its own" python train_tokenizer.py
stage pretrain "a base from raw text" python pretrain.py
stage trim "the vocabulary loses what the text never uses" python trim_vocabulary.py
stage convert "the hand-written checkpoint becomes a proven Hugging Face model" python convert_checkpoint.py
stage answers "the model answers its training prompts" python evaluate_model.py
stage prepare "records become instructions and responses" python prepare_dataset.py
stage train "TRL, on the responses only" accelerate launch --config_file recipes/accelerate/cpu.yaml train_sft.py
stage dpo "better answers against worse ones" accelerate launch --config_file recipes/accelerate/cpu.yaml train_dpo.py
# Beside a train.yaml it makes another model, which nothing here evaluates.
[ -f "$recipe/train.yaml" ] ||
    stage grpo "the model learns from its own answers" accelerate launch --config_file recipes/accelerate/cpu.yaml train_grpo.py
stage evaluate "base against instruct on prompts that neither has seen" python evaluate_model.py
if grep -qs '^topic:' "$recipe/generate.yaml"; then
    stage generate "the topic with a happy ending" python generate.py --ending happy | tee "runs/$name/happy.txt"
    stage generate "the same topic with a sad ending" python generate.py --ending sad | tee "runs/$name/sad.txt"
else
    stage generate "an answer" python generate.py | tee "runs/$name/answer.txt"
fi
stage publish "what the Hub would get" python publish.py
python recipes/show.py "$name"
