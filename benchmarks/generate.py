"""Tokens a second of Fledge's generation beside transformers, llama.cpp, onnxruntime and CTranslate2.

    python benchmarks/generate.py                 the 49.5M topic-ending shape, random weights, prompts of 54 tokens
    python benchmarks/generate.py --model MODEL   a trained one; then 128 prompts whose answers end where they end

The ways take turns, round by round, greedy, on the same prompts and with the same number of tokens, as many threads as
torch has; `--only llama f32` takes those whose names have one of these words. Printed for 1 prompt and for 64: the
median rate; how many times as fast Fledge in float32 is (with the range of the rounds); the share of what this machine
allows; and how many answers equal Fledge's. A program that is not installed (`pip install llama-cpp-python onnx
onnxscript onnxruntime ctranslate2`) is left out with a sentence.

The machine allows a token no sooner than its weights and its cache are read from memory, or its products are computed:
see `fastest`. Bandwidth and products a second are measured first. Weights that fit into a processor's cache can exceed
100%.
"""

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from engines import ENGINES, Engine, dynamic, in_int8, weights_only
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from fledge.cpu import describe, multiplies_bf16
from fledge.errors import UserError
from fledge.generation.answers import continue_each
from fledge.generation.onednn import by_onednn
from fledge.models import context_of, load_model
from fledge.sampling import Sampling

SHAPE = GPT2Config(
    n_positions=512, n_embd=384, n_layer=6, n_head=6, activation_function="gelu_pytorch_tanh", tie_word_embeddings=False
)
PROMPT, ANSWER, ROWS, ROUNDS = 54, 223, 64, 3  # tokens of a TinyStories-Instruct prompt and story on average
# Bytes of a weight and of a number in the cache, by how an engine stores its weights.
WEIGHT = {"f32": 4, "bf16": 2, "f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "int8": 1}
CACHED = {"f16": 2, "q8_0": 2, "q4_0": 2}  # 4 elsewhere
PRODUCTS = {"bf16": "bfloat16", "q8_0": "int8", "q4_0": "int8", "int8": "int8"}  # float32 elsewhere


def with_fledge(model: PreTrainedModel, end: int | None = None) -> Engine:
    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = Sampling(temperature=0, max_new_tokens=tokens)
        return [made for _, made in sorted(continue_each(model, end, prompts, sampling, ROWS))]

    return run


def with_generate(model: PreTrainedModel, end: int | None = None) -> Engine:
    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        made = []
        for begin in range(0, len(prompts), ROWS):
            batch = prompts[begin : begin + ROWS]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end or 0)
            output = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
            made += [row[: row.index(end) + 1] if end in row else row for row in output]
        return made

    return run


def with_a_loop(model: PreTrainedModel) -> Engine:
    @torch.no_grad()
    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return ids[:, len(prompts[0]) :].tolist()

    return run


def per_second(amount: float, work: Callable[[], object]) -> float:
    """How much of what `work` does `amount` of is done in a second, at best."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return amount / best


@torch.inference_mode()
def machine() -> dict[str, float]:
    """Bytes a second of reading a matrix far larger than the caches, and products a second of large matrices."""
    matrix, vector, n = torch.ones(2**14, 2**13), torch.ones(2**13), 2048
    found = {"bandwidth": per_second(matrix.nbytes, lambda: torch.mv(matrix, vector))}
    for dtype in [torch.float32, *([torch.bfloat16] if multiplies_bf16() else [])]:
        layer, inputs = nn.Linear(n, n, bias=False, dtype=dtype), torch.ones(n, n, dtype=dtype)
        plain = per_second(n**3, lambda: layer(inputs))  # noqa: B023
        with by_onednn(layer):
            found[str(dtype).removeprefix("torch.")] = max(plain, per_second(n**3, lambda: layer(inputs)))  # noqa: B023
    bytes_ = torch.ones(n, n, dtype=torch.int8)
    found["int8"] = per_second(n**3, lambda: torch._int_mm(bytes_, bytes_))
    print(
        f"Memory is read at {found['bandwidth'] / 1e9:.1f} GB/s. Products a second: "
        + ", ".join(f"{found[name] / 1e9:,.0f} G in {name}" for name in found if name != "bandwidth")
    )
    return found


def fastest(model: PreTrainedModel, kind: str, rows: int, tokens: int, rates: dict[str, float]) -> float:
    """Tokens a second that the machine allows `rows` prompts of `PROMPT` tokens.

    A step reads each weight once, but for the tables of embeddings and positions, and each row's cache; and it
    multiplies each of these numbers once for each row. It takes the longer of the two. The prompts are products alone.
    """
    head = model.get_output_embeddings().weight
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding) and part.weight is not head]
    body = sum(weight.numel() for weight in model.parameters()) - sum(map(torch.numel, tables)) - head.numel()
    with torch.no_grad():
        layers = model(torch.tensor([[0]]), use_cache=True).past_key_values.layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    of_head = WEIGHT["q8_0" if kind == "q4_0" else kind]
    mean = PROMPT + tokens / 2
    read = body * WEIGHT[kind] + head.numel() * of_head + rows * mean * cached * CACHED.get(kind, 4)
    products = rates.get(PRODUCTS.get(kind, "float32"), rates["float32"])
    multiplied = rows * (body + head.numel() + mean * cached)
    of_prompts = rows * (PROMPT * body + head.numel() + PROMPT**2 / 2 * cached)
    step = max(read / rates["bandwidth"], multiplied / products)
    return rows * tokens / (of_prompts / products + (tokens - 1) * step)


def compare(title: str, ways: dict[str, Engine], prompts: list, tokens: int, limits: dict[str, float], end: int | None):
    """Prints a line for each way; the first one is what the others are compared with."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            start = time.perf_counter()
            made = run(prompts, tokens)
            rates[way].append(sum(map(len, made)) / (time.perf_counter() - start))
            print(f"{title}: {way} {rates[way][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
            # CTranslate2 goes past an end by leaving the token out, so answers are compared up to there.
            answers[way] = [list(itertools.takewhile(lambda token: token != end, ids)) for ids in made]
    first = next(iter(ways))
    print(f"\n{title:<34}tokens/s   {first} is … times as fast   of the limit   equal answers")
    for way in ways:
        ratios = sorted(a / b for a, b in zip(rates[first], rates[way], strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        same = sum(a == b for a, b in zip(answers[first], answers[way], strict=True))
        rate = statistics.median(rates[way])
        share = f"{rate / limits[way]:.0%}" if way in limits else ""
        print(f"  {way:<30}{rate:>10,.0f}{ratio:>33}{share:>15}{same:>10} of {len(prompts)}", flush=True)


def nameless(count: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `count` tokens for a model with random weights."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", *map(str, range(1000, 1000 + count))][:count]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[-1], unk_token=tokens[-1])


def chosen(name: str, words: list[str]) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


def others(
    model: PreTrainedModel, tokenizer, folder: Path, tokens: int, words: list[str]
) -> dict[str, tuple[Engine, str]]:
    """The other programs that are here and can run this model, with how they store its weights."""
    found = {}
    for package, engine, kind in ENGINES:
        name = f"{engine.__name__} {kind}"
        if not chosen(name, words):
            continue
        if find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed.")
            continue
        try:
            found[name] = engine((model, tokenizer), folder, kind, ROWS, PROMPT + tokens), kind
        except (UserError, ValueError) as reason:
            print(f"{name} is left out: {reason}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model instead of random weights")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="beside Fledge in float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{describe()}; {torch.get_num_threads()} threads", flush=True)
    if args.model:
        model, tokenizer = load_model(args.model)
        who, what, where = ("Lily", "Tim", "A dog", "A cat"), ("ball", "kite", "boat", "hat"), ("park", "shop")
        topics = [f"{a} found {n} of the {b}s in the {c}." for a in who for b in what for c in where for n in range(4)]
        texts = [f"Write a story about: {topic}\nWith: happy ending\n\n### Story:\n" for topic in topics]
    else:
        model, texts = GPT2LMHeadModel(SHAPE).eval(), []
        tokenizer = nameless(SHAPE.vocab_size)
    end, model.generation_config.eos_token_id = tokenizer.eos_token_id, None
    prompts = torch.randint(min(len(tokenizer), model.config.vocab_size), (ROWS, PROMPT)).tolist()
    tokens = min(ANSWER, context_of(model.config) - PROMPT)
    rates = machine()
    own = {"Fledge f32": (with_fledge(model), "f32"), "generate f32": (with_generate(model), "f32")}
    if multiplies_bf16():
        own["Fledge bf16"] = with_fledge(copy.deepcopy(model).bfloat16()), "bf16"
    own["torch's int8 in Fledge's loop"] = with_fledge(in_int8(model, dynamic)), "int8"
    own["the same, of weights alone"] = with_fledge(in_int8(model, weights_only)), "int8"
    own = {name: way for name, way in own.items() if name == "Fledge f32" or chosen(name, args.only)}
    with tempfile.TemporaryDirectory() as folder:
        known = own | others(model, tokenizer, Path(folder), tokens, args.only)
        for rows in (1, ROWS):
            limits = {name: fastest(model, kind, rows, tokens, rates) for name, (_, kind) in known.items()}
            ways = {name: way for name, (way, _) in known.items()}
            compare(f"{rows} prompt{'s' * (rows > 1)}, {tokens} tokens", ways, prompts[:rows], tokens, limits, end)
    del known, ways
    few = {name: way for name, (way, _) in own.items() if name.endswith("f32")} | {"no cache f32": with_a_loop(model)}
    compare(f"{ROWS} prompts, 6 tokens", few, prompts, 6, {}, end)
    if texts:
        ways = {"Fledge f32": with_fledge(model, end), "generate f32": with_generate(model, end)}
        ids = tokenizer(texts)["input_ids"]
        compare(f"{len(ids)} prompts to their ends", ways, ids, min(400, context_of(model.config) // 2), {}, None)


if __name__ == "__main__":
    main()
