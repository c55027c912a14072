"""Answers a second in an evaluation, beside bare `generate` at the same batch size on the same prompts.

    python benchmarks/evaluate.py --model runs/quickstart/model --dataset runs/quickstart/data

Both get the prompts sorted by length. Bare `generate` gets a batch at a time, padded on the left, and nothing else to
do; the evaluation's way writes each answer to its journal. They take turns, so that what else the machine does falls on
both.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import GenerationConfig

from fledge.cpu import describe
from fledge.encoding import open_prepared, prompt_length
from fledge.evaluation.measuring import Answering
from fledge.journal import Journal
from fledge.models import load_model
from fledge.sampling import Sampling
from fledge.terminal import quiet


def bare(model, tokenizer, prompts, sampling, batch_size) -> int:
    """Tokens made by `generate`, up to each answer's end-of-text."""
    made = 0
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(sampling.seed)
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:]
        for row in output.tolist():
            made += row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
    return made


def evaluation(model, tokenizer, prompts, sampling, batch_size) -> int:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "answers.jsonl", {})
        answering = Answering(tokenizer, prompts, 1, sampling, batch_size, journal)
        answers = answering.answers(model, "model", lambda done: None)
    return sum(answer.tokens for answer in answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(describe(), flush=True)
    quiet()
    model, tokenizer = load_model(args.model)
    rows = open_prepared(Path(args.dataset))[2]["test"].to_list()[: args.num_prompts]
    prompts = sorted((row["input_ids"][: prompt_length(row["labels"])] for row in rows), key=len)
    context = model.config.max_position_embeddings
    sampling = Sampling(max_new_tokens=min(200, context - len(prompts[-1])))
    speeds = {"generate": [], "evaluation": []}
    for seed in range(args.rounds):
        sampling.seed = seed
        for name, answer in (("generate", bare), ("evaluation", evaluation)):
            begun = time.monotonic()
            made = answer(model, tokenizer, prompts, sampling, args.batch_size)
            speeds[name].append(made / (time.monotonic() - begun))
            print(f"round {seed + 1}  {name:<10} {speeds[name][-1]:8.0f} tokens/s", flush=True)
    ratio = max(speeds["evaluation"]) / max(speeds["generate"])
    print(
        f"{len(prompts)} prompts, batches of {args.batch_size}, up to {sampling.max_new_tokens} tokens, "
        f"{torch.get_num_threads()} threads: {ratio:.2f} times the tokens a second, best round against best"
    )


if __name__ == "__main__":
    main()
