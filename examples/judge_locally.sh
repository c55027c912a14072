#!/usr/bin/env bash
# A language model judges an evaluation, all on this machine: transformers serve speaks OpenAI's protocol.
#
#   bash examples/judge_locally.sh JUDGE CONFIG [KEY VALUE ...]
#   bash examples/judge_locally.sh Qwen/Qwen2.5-0.5B-Instruct recipes/quickstart/evaluate.yaml --num_prompts 50
#
# JUDGE is a model folder or a name on the Hub. The answers of an evaluation that is there already are used again.
set -euo pipefail
judge=${1:?which judge? a model folder or a name on the Hub}
config=${2:?which evaluation? its recipe, for example recipes/quickstart/evaluate.yaml}
shift 2
port=${PORT:-8000}

transformers serve "$judge" --port "$port" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until curl --silent --fail "http://localhost:$port/health" >/dev/null; do
    kill -0 $server 2>/dev/null || { echo "The server has stopped; pip install 'transformers[serving]' brings what it needs." >&2; exit 1; }
    sleep 1
done

python evaluate_model.py --config "$config" --resume \
    --judge_url "http://localhost:$port/v1" --judge_model "$judge" --judge_samples 2 --judge_pairs "$@"
