"""Pre-training throughput: pretrain.py's trainer against a loop in nanoGPT's style, in turn, at the same shapes.

    python benchmarks/pretrain.py             # the wikitext_dolly shape: 6 layers, width 384, 30,000 tokens
    python benchmarks/pretrain.py --compile   # also the loop compiled, where there is a C++ compiler
    python benchmarks/pretrain.py --float32   # pretrain.py without bfloat16

The loop is what people write after nanoGPT: one fused attention projection, PyTorch's causal attention, a tied head,
cross-entropy over the logits of a whole batch, AdamW with decay on matrices, clipping. On a CPU such loops run in
float32 (nanoGPT's autocast is off there); the same loop under bfloat16 autocast is measured beside it. A step counts
whole: batch, forward, backward, clipping, optimizer. Prints tokens a second and the share of the machine's matrix rate.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fledge.cpu import describe

VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, LAYERS, HEADS = 30000, 256, 384, 6, 6
BATCH_SIZE, STEPS, WARM_UP = 16, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Embedding(CONTEXT_LENGTH, WIDTH)
        self.blocks, self.ln_f = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, ids, targets):
        x = self.ln_f(self.blocks(self.wte(ids) + self.wpe.weight[: ids.shape[1]]))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


def loop(ids: np.memmap, autocast: bool, compiled: bool) -> list[float]:
    """Seconds of each of `STEPS` steps."""
    torch.manual_seed(0)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    model = GPT().to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=device != "cpu")
    forward, times = torch.compile(model) if compiled else model, []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        begins = torch.randint(len(ids) - CONTEXT_LENGTH, (BATCH_SIZE,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(ids[b + s : b + s + CONTEXT_LENGTH].astype(np.int64)) for b in begins])
            for s in (0, 1)
        )
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = forward(x.to(device), y.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def fledge(folder: Path, float32: bool) -> tuple[list[float], int, str]:
    """Seconds of each of `STEPS` steps of pretrain.py's trainer, operations of a token, and precision."""
    from tokenizers import Tokenizer, models

    from fledge.pretraining.pretrainer import PretrainConfig, PretrainTrainer, flops_per_token, new_gpt2
    from fledge.pretraining.tokens import Windows

    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, VOCAB_SIZE)}
    roles = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), **roles)
    count = (folder / "train.bin").stat().st_size // 2
    tokens = {"dtype": "uint16", "splits": {"train": {"tokens": count, "bytes": count}}}
    windows, watch = Windows(folder, "train", tokens, CONTEXT_LENGTH), Stopwatch()
    config = PretrainConfig(
        bf16=False if float32 else None,
        output_dir=str(folder / "out"),
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
    )
    torch.manual_seed(0)
    trainer = PretrainTrainer(
        model=new_gpt2(tokenizer, LAYERS, HEADS, WIDTH, CONTEXT_LENGTH),
        args=config,
        train_dataset=windows,
        processing_class=tokenizer,
        callbacks=[watch],
        bytes_per_token=1.0,
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return seconds[WARM_UP:], flops_per_token(trainer.model), "bf16" if config.bf16 else "float32"


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the limit for any of this."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    a, best = torch.randn(2048, 2048, device=device).to(dtype), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the compiled loop too")
    parser.add_argument("--float32", action="store_true", help="pretrain.py without bfloat16, as on most laptops")
    args = parser.parse_args()
    print(describe(), flush=True)
    tokens = BATCH_SIZE * CONTEXT_LENGTH
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.bin")
        np.random.default_rng(0).integers(VOCAB_SIZE, size=64 * tokens + 1, dtype=np.uint16).tofile(file)
        ids = np.memmap(file, dtype=np.uint16, mode="r")
        contenders = {
            "loop, float32": lambda: loop(ids, autocast=False, compiled=False),
            "loop, bf16 autocast": lambda: loop(ids, autocast=True, compiled=False),
        }
        if args.compile:
            contenders["loop, bf16, compiled"] = lambda: loop(ids, autocast=True, compiled=True)
        speeds, rates = {name: [] for name in (*contenders, "pretrain.py")}, []
        for _ in range(args.rounds):
            for name, seconds in contenders.items():
                speeds[name].append(tokens / statistics.median(seconds()))
            times, flops, precision = fledge(Path(folder), args.float32)
            speeds["pretrain.py"].append(tokens / statistics.median(times))
            rates.append(matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32))
    rate = max(rates)
    print(
        f"pretrain.py runs in {precision}; the matrix rate is {rate / 1e9:,.0f} GFLOP/s; {args.rounds} rounds in turn"
    )
    print("| | tokens/s, median | lowest | highest | share of the matrix rate | pretrain.py against it |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, found in speeds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(speeds["pretrain.py"], found, strict=True))
        share = flops * statistics.median(found) / rate
        print(f"| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} | {max(found):,.0f} |", end=" ")
        print(f"{share:.0%} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
