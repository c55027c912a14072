"""Training throughput and peak memory, side by side: TRL's defaults, TRL tuned, a hand-written loop, and Fledge.

    python benchmarks/train_throughput.py            # the 49.5M topic-ending model, the four in turn, three rounds
    python benchmarks/train_throughput.py --supervised 0.05   # as when short answers follow long prompts
    python benchmarks/train_throughput.py --float32           # Fledge and TRL, tuned, without bfloat16

Rows are as long as TinyStories-Instruct's in GPT-2's BPE: a prompt of 54 tokens, a story of 206 in the median and of
351 at the 95th percentile. Every contender trains in a process of its own, on the same rows, optimizer and clipping
included: an epoch to warm up, then one that counts. Prints real (unpadded) tokens a second, the process's peak memory,
and the share of this machine's own matrix rate, in the type that Fledge chose. On a CPU without bfloat16 units Fledge
trains in float32 by itself; TRL's defaults do not, and --float32 says it to TRL, tuned.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn

VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, LAYERS, HEADS = 50257, 512, 384, 6, 6
BATCH_SIZE, STEPS = 8, 4
CONTENDERS = ("TRL, defaults", "TRL, tuned", "hand-written loop", "Fledge")


def rows(supervised: float | None) -> list[dict]:
    """`STEPS` batches of rows; the share of `supervised` tokens is the data's own, unless told."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS * BATCH_SIZE):
        prompt = max(8, round(54 + 15 * torch.randn((), generator=generator).item()))
        story = round(206 * math.exp(0.324 * torch.randn((), generator=generator).item()))
        length = min(prompt + story, CONTEXT_LENGTH)
        ids = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        prompt = prompt if supervised is None else length - max(1, round(supervised * length))
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH // HEADS, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT_LENGTH, CONTEXT_LENGTH)))

    def forward(self, x):
        length = x.shape[1]
        weights = self.query(x) @ self.key(x).transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return F.softmax(weights, dim=-1) @ self.value(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.proj = nn.ModuleList(Head() for _ in range(HEADS)), nn.Linear(WIDTH, WIDTH)
        self.ffwd = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.proj(torch.cat([head(self.ln1(x)) for head in self.heads], dim=-1))
        return x + self.ffwd(self.ln2(x))


class HandWritten(nn.Module):
    """The model as people write it for themselves: a Linear for each head, logits for every position."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Embedding(CONTEXT_LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def train_by_hand(data: list[dict]) -> float:
    model = HandWritten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    for _ in range(2):
        start = time.perf_counter()
        for first in range(0, len(data), BATCH_SIZE):
            batch = data[first : first + BATCH_SIZE]
            ids, targets = (
                nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in batch], True, padding)
                for key, padding in (("input_ids", 0), ("labels", -100))
            )
            optimizer.zero_grad()
            model(ids, targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return time.perf_counter() - start


def train_with_trainer(name: str, data: list[dict], folder: str, float32: bool) -> float:
    import logging

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from fledge.training.trainer import InstructTrainer, SmallModelConfig, prepare_model

    logging.disable(logging.WARNING)

    class LastEpoch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seconds = time.perf_counter() - self.start

    shape = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",
        tie_word_embeddings=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<|endoftext|>": 0})),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    common = {"output_dir": folder, "num_train_epochs": 2, "per_device_train_batch_size": BATCH_SIZE}
    common |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    cpu = not torch.accelerator.is_available()
    if float32 and name != "TRL, defaults":
        common["bf16"] = False
    if name == "Fledge":
        config = SmallModelConfig(**common, eval_strategy="no")
    elif name == "TRL, tuned":
        tuning = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
        config = SFTConfig(**common, **tuning, use_cpu=cpu)
    else:
        config = SFTConfig(**common, use_cpu=cpu)
    clock = LastEpoch()
    trainer = (InstructTrainer if name == "Fledge" else SFTTrainer)(
        model=GPT2LMHeadModel(shape),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    if name == "Fledge":
        prepare_model(trainer)
    trainer.train()
    return clock.seconds


def measure(name: str, supervised: float | None, float32: bool) -> dict:
    from fledge.training.run_record import peak_memory_mib

    torch.manual_seed(0)
    data = rows(supervised)
    with tempfile.TemporaryDirectory() as folder:
        seconds = (
            train_by_hand(data) if name == "hand-written loop" else train_with_trainer(name, data, folder, float32)
        )
    tokens = sum(len(row["input_ids"]) for row in data)
    return {"tokens_per_second": tokens / seconds, "peak_mib": peak_memory_mib()}


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, the limit for any of this."""
    a = torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def operations_a_token(data: list[dict]) -> float:
    """What training needs at least, forward and backward.

    That is 6 for each weight of the blocks, 6 for each weight of the head where a position is supervised, and
    attention's own products under the causal triangle.
    """
    tokens = sum(len(row["input_ids"]) for row in data)
    supervised = sum(label != -100 for row in data for label in row["labels"])
    pairs = sum(len(row["input_ids"]) ** 2 / 2 for row in data)
    blocks = LAYERS * 12 * WIDTH**2 * tokens + LAYERS * 2 * WIDTH * pairs
    return 6 * (blocks + VOCAB_SIZE * WIDTH * supervised) / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supervised", type=float, help="share of supervised tokens instead of the data's own")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="without bfloat16, as on most laptops")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.supervised, args.float32)))
        return
    untouched = dict(os.environ)  # importing fledge sets how OpenMP's threads wait
    from fledge.cpu import describe, multiplies_bf16

    print(describe(), flush=True)
    found = {name: [] for name in args.contenders}
    share = [] if args.supervised is None else ["--supervised", str(args.supervised)]
    share += ["--float32"] if args.float32 else []
    for number in range(1, args.rounds + 1):
        for name in args.contenders:
            command = [sys.executable, __file__, "--measure", name, *share]
            environment = None if name == "Fledge" else untouched
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number}  {name:<18} {found[name][-1]['tokens_per_second']:>7,.0f} tokens/s", flush=True)
    dtype = torch.float32 if args.float32 or not multiplies_bf16() else torch.bfloat16
    rate, needed = matrix_rate(dtype), operations_a_token(rows(args.supervised))
    kind = str(dtype).removeprefix("torch.")
    print(f"{kind} matrix rate {rate / 1e9:,.0f} GFLOP/s; {needed / 1e6:,.0f} MFLOP a token needed")
    for name, runs in found.items():
        speeds = sorted(run["tokens_per_second"] for run in runs)
        speed, memory = statistics.median(speeds), statistics.median(run["peak_mib"] for run in runs)
        print(f"{name:<18} {speed:>7,.0f} tokens/s ({speeds[0]:,.0f} to {speeds[-1]:,.0f})", end="  ")
        print(f"{memory:>6,.0f} MiB at the peak  {speed * needed / rate:>4.0%} of the matrix rate")


if __name__ == "__main__":
    main()
