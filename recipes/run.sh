#!/usr/bin/env bash
# All stages of one recipe, in order, those that its folder has a file for: bash recipes/run.sh quickstart
# A recipe is a folder in recipes/, or any other by its path; what its files name is looked for from here.
# What an interrupted run has finished stays, unless the stage's file says `overwrite: true`; the rest goes on.
set -euo pipefail
refuse() { echo "run.sh: $1" >&2; exit 2; }
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# = 1 ] || refuse "name one recipe, a folder in recipes/, for example quickstart."
recipe=recipes/$1
[[ $1 != */* ]] || recipe=$(cd "$1" 2>/dev/null && pwd) || refuse "there is no folder $1."
cd "$repository"
known=$(dirname recipes/*/evaluate.yaml | xargs -n1 basename | xargs)
[ -d "$recipe" ] || refuse "there is no $recipe; choose one of $known."
for needed in evaluate generate; do
    [ -f "$recipe/$needed.yaml" ] || refuse "$recipe has no $needed.yaml, which says what is shown at the end."
done
command -v accelerate >/dev/null || refuse "accelerate is not found; source .venv/bin/activate after make quickstart."

value() { # of a key, in the recipe's file of a stage
    sed -n "s/^$2: *//p" "$recipe/$1.yaml" | sed "s/ *#.*//; s/^['\"]//; s/['\"]$//"
}

is_remade= # a stage ran, so what came of earlier results is not taken for finished
stage() { # its file's name, what happens, the command
    local output more=()
    [ -f "$recipe/$1.yaml" ] || return 0
    printf '\n\033[1m%s: %s\033[0m\n' "$1" "$2" >&2
    output=$(value "$1" output_dir)
    if [ -n "$output" ] && [ "$(value "$1" overwrite)" != true ]; then
        if [ -z "$is_remade" ] && [ -e "$output/.fledge.json" ]; then
            echo "$output is finished and stays; move it away to have it made again." >&2
            return 0
        fi
        [ ! -d "$output/checkpoints" ] || more=(--resume auto)
        [ ! -d "$output/unfinished" ] || more=(--resume)
    fi
    [ -z "$output" ] || is_remade=yes
    "${@:3}" --config "$recipe/$1.yaml" ${more[@]+"${more[@]}"}
}

stage tokenizer "the text gets a vocabulary of its own" python train_tokenizer.py
stage pretrain "a base from raw text" python pretrain.py
stage trim "the vocabulary loses what the text never uses" python trim_vocabulary.py
stage convert "the hand-written checkpoint becomes a proven Hugging Face model" python convert_checkpoint.py
stage answers "the model answers its training prompts" python evaluate_model.py
stage prepare "records become instructions and responses" python prepare_dataset.py
launch=(accelerate launch --config_file recipes/accelerate/cpu.yaml)
stage train "TRL, on the responses only" "${launch[@]}" train_sft.py
stage dpo "better answers against worse ones" "${launch[@]}" train_dpo.py
# Beside a train.yaml it makes another model, which nothing here evaluates.
[ -f "$recipe/train.yaml" ] ||
    stage grpo "the model learns from its own answers" "${launch[@]}" train_grpo.py
stage evaluate "base against instruct on prompts that neither has seen" python evaluate_model.py
texts=$(dirname "$(value evaluate output_dir)")
if grep -qs '^topic:' "$recipe/generate.yaml"; then
    stage generate "the topic with a happy ending" python generate.py --ending happy | tee "$texts/happy.txt"
    stage generate "the same topic with a sad ending" python generate.py --ending sad | tee "$texts/sad.txt"
else
    stage generate "an answer" python generate.py | tee "$texts/answer.txt"
fi
stage publish "what the Hub would get" python publish.py
python recipes/show.py "$recipe"
