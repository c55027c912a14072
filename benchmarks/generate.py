"""Tokens a second of Fledge's generation, of transformers' `generate`, and of a hand-written loop without a cache.

    python benchmarks/generate.py            the 49.5M topic-ending shape with random weights, 1 prompt and 64
    python benchmarks/generate.py MODEL      128 prompts to a trained model, whose answers end where they end

The ways take turns, round by round, greedy, on the same prompts. Prints the median rate, the ratio to the loop and to
`generate`, and for one prompt the share of this machine's memory bandwidth: each token reads every weight once, but for
the embeddings.
"""

import statistics
import sys
import time
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from fledge.cpu import describe, multiplies_bf16
from fledge.generation.answers import answer_each
from fledge.models import load_model
from fledge.sampling import Sampling

SHAPE = GPT2Config(
    n_positions=512, n_embd=384, n_layer=6, n_head=6, activation_function="gelu_pytorch_tanh", tie_word_embeddings=False
)
PROMPT, ANSWER, ROUNDS = 54, 223, 3  # tokens of a TinyStories-Instruct prompt and story on average
TOLD = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))


def with_fledge(model, tokenizer, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(temperature=0, max_new_tokens=tokens)
    for _ in answer_each(
        model, tokenizer, prompts, sampling, 64, told=lambda number, token: made[number].append(token)
    ):
        pass
    return made


def with_generate(model, tokenizer, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    end, made = tokenizer.eos_token_id, []
    for begin in range(0, len(prompts), 64):
        batch = prompts[begin : begin + 64]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end or 0)
        output = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
        made += [row[: row.index(end) + 1] if end in row else row for row in output]
    return made


@torch.no_grad()
def with_a_loop(model, tokenizer, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, len(prompts[0]) :].tolist()


def bandwidth() -> float:
    """Bytes a second of reading a matrix far larger than the caches, as a matrix-vector product does."""
    matrix, vector = torch.ones(2**14, 2**14), torch.ones(2**14)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best


def compare(name: str, ways: dict, model, tokenizer, prompts: list[list[int]], tokens: int) -> float:
    """Prints the ways' median rates; returns Fledge's."""
    rates = {way: [] for way in ways}
    answers = {}
    for _ in range(ROUNDS):
        for way, answer in ways.items():
            start = time.perf_counter()
            made = answer(model, tokenizer, prompts, tokens)
            rates[way].append(sum(map(len, made)) / (time.perf_counter() - start))
            answers[way] = made
    shown = ", ".join(f"{way} {statistics.median(of_way):,.0f}" for way, of_way in rates.items())
    for way in list(ways)[1:]:
        ratios = sorted(a / b for a, b in zip(rates["Fledge"], rates[way], strict=True))
        shown += f"; {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times the {way}'s"
        same = sum(a == b for a, b in zip(answers["Fledge"], answers[way], strict=True))
        shown += f", {same} of {len(prompts)} answers equal"
    print(f"{name}: tokens/s {shown}", flush=True)
    return statistics.median(rates["Fledge"])


def main():
    torch.manual_seed(0)
    print(describe(), flush=True)
    if len(sys.argv) > 1:
        model, tokenizer = load_model(sys.argv[1])
        who, what, where = ("Lily", "Tim", "A dog", "A cat"), ("ball", "kite", "boat", "hat"), ("park", "shop")
        topics = [f"{a} found {n} of the {b}s in the {c}." for a in who for b in what for c in where for n in range(4)]
        prompts = tokenizer([f"Write a story about: {topic}\nWith: happy ending\n\n### Story:\n" for topic in topics])
        ways = {"Fledge": with_fledge, "generate": with_generate}
        compare(f"{len(topics)} prompts, batches of 64", ways, model, tokenizer, prompts["input_ids"], 400)
        return
    model = GPT2LMHeadModel(SHAPE).eval()
    prompts = torch.randint(SHAPE.vocab_size, (64, PROMPT)).tolist()
    every = {"Fledge": with_fledge, "generate": with_generate, "loop": with_a_loop}
    two = {"Fledge": with_fledge, "generate": with_generate}
    rate = compare("1 prompt", every, model, TOLD, prompts[:1], ANSWER)
    read = sum(p.nbytes for p in model.parameters()) - model.transformer.wte.weight.nbytes
    print(
        f"1 prompt: {rate * read / bandwidth():.0%} of the memory bandwidth of {bandwidth() / 1e9:.1f} GB/s", flush=True
    )
    half = GPT2LMHeadModel(SHAPE).eval().bfloat16()
    units = "" if multiplies_bf16() else ", which this CPU does not multiply in hardware"
    compare(f"1 prompt in bfloat16{units}", two, half, TOLD, prompts[:1], ANSWER)
    compare("64 prompts, the first 6 tokens", every, model, TOLD, prompts, 6)
    compare("64 prompts", two, model, TOLD, prompts, ANSWER)


if __name__ == "__main__":
    main()
