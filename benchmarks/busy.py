"""Training of the quickstart's size alone and beside busy processes, under several ways for threads to wait.

    python benchmarks/busy.py                 # every setting, alone and beside one busy process, three rounds
    python benchmarks/busy.py --busy 2 --float32

Threads of one product meet at a barrier. One that waits there spins, by default for some milliseconds, before it
sleeps: that is quick when the machine is idle, and beside another process it takes the very time that the late thread
is waiting for. Every setting trains in a process of its own: a warm-up, then steps for about ten seconds. The settings
take turns, each alone and at once beside the busy processes. Prints real (unpadded) tokens a second.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fledge import SPINS

# What each sets in the environment, which OpenMP reads when torch is imported.
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SETTINGS = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "spin 30,000": {"GOMP_SPINCOUNT": "30000"},
    "spin 3,000": {"GOMP_SPINCOUNT": "3000"},
    "spin 300": {"GOMP_SPINCOUNT": "300"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "Fledge": {},
}
SHAPE = {"vocab_size": 4096, "n_positions": 512, "n_embd": 192, "n_layer": 6, "n_head": 4}
BATCH_SIZE, LENGTH, PROMPT, SECONDS, WARM_UP = 32, 220, 40, 10.0, 3
SPIN = "while True: pass"


def train(float32: bool) -> float:
    """Tokens a second of train_sft.py's trainer in this process."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

    from fledge.training.trainer import InstructTrainer, SmallModelConfig, prepare_model

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            if state.global_step == WARM_UP:
                self.start = now
            elif state.global_step > WARM_UP and now - self.start > SECONDS:
                self.speed = (state.global_step - WARM_UP) * BATCH_SIZE * LENGTH / (now - self.start)
                control.should_training_stop = True

    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]} for ids in _random_rows(torch)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<|endoftext|>": 0})),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SmallModelConfig(
            output_dir=folder, max_steps=10_000, per_device_train_batch_size=BATCH_SIZE, eval_strategy="no",
            report_to="none", logging_steps=10_000, logging_first_step=False, use_cpu=True,
            bf16=False if float32 else None,
        )  # fmt: skip
        model = GPT2LMHeadModel(GPT2Config(**SHAPE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        trainer = InstructTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        prepare_model(trainer)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return clock.speed


def _random_rows(torch) -> list[list[int]]:
    return torch.randint(SHAPE["vocab_size"], (8 * BATCH_SIZE, LENGTH)).tolist()


def speed_of(setting: dict[str, str], busy: int, float32: bool) -> float:
    """Tokens a second of one process under `setting`, beside `busy` processes that count in an endless loop."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | setting
    command = [sys.executable, __file__, "--measure", *(["--float32"] if float32 else [])]
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside the training (default 1)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--float32", action="store_true", help="without bfloat16, as on most laptops")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(train(args.float32)))
        return
    from fledge.cpu import describe

    print(f"{describe()}; Fledge lets threads spin {SPINS} times")
    found = {(name, busy): [] for name in args.settings for busy in (0, args.busy)}
    for number in range(1, args.rounds + 1):
        for (name, busy), speeds in found.items():
            speeds.append(speed_of(SETTINGS[name], busy, args.float32))
            print(f"round {number}  {name:<18} beside {busy}  {speeds[-1]:>8,.0f} tokens/s", flush=True)
    print(f"\n| threads that wait | alone, tokens/s | beside {args.busy} busy | what is left |\n|---|---:|---:|---:|")
    for name in args.settings:
        alone, beside = found[name, 0], found[name, args.busy]
        left = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        print(f"| {name} | {statistics.median(alone):,.0f} | {statistics.median(beside):,.0f} | {left:.0%} |")


if __name__ == "__main__":
    main()
