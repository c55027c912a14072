"""A whole step of GRPO, Fledge against TRL: sampling, rewards, reference, forward, backward, update; time and memory.

    python benchmarks/grpo.py --model runs/quickstart/model --dataset runs/quickstart/data
    python benchmarks/grpo.py --model … --dataset … --trl_defaults   # TRL's checkpointing and precision, too

Both take the same prompts from the same model at temperature 1, with the same rewards, objective, optimizer and, unless
told otherwise, the same precision and no gradient checkpointing; what differs is the code that samples and that scores.
Each runs in a process of its own, in turn, `--rounds` times: one step warms up, `--steps` count. Both sample from the
same distribution, and times are given for as many sampled tokens: seconds on the wall, and processor seconds of all
threads, which other processes on the machine change less. Prints each part's share (of processor seconds on a CPU), the
peak of the memory, and how much of it came on top of the loaded model.
"""

import argparse
import collections
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("sampling", "rewards", "reference", "forward", "backward", "update", "rest")
WAYS = ("Fledge", "TRL")
CLOCKS = {"wall": "on the wall", "processor": "in processor seconds"}


class Clock:
    """Seconds in named parts, by the clock `now`. A part within another counts for itself alone."""

    def __init__(self, now):
        self.now, self.seconds, self.inner = now, collections.Counter(), []

    @contextlib.contextmanager
    def part(self, name):
        start = self.now()
        self.inner.append(0.0)
        yield
        passed = self.now() - start
        self.seconds[name] += passed - self.inner.pop()
        if self.inner:
            self.inner[-1] += passed

    def timed(self, name, function):
        def call(*arguments, **keywords):
            with self.part(name() if callable(name) else name):
                return function(*arguments, **keywords)

        return call


def make_trainer(way, args, folder):
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from fledge.encoding import open_prepared, open_rows
    from fledge.evaluation.prompts import task_of
    from fledge.models import load_model
    from fledge.rewards.configuration import SmallGrpoConfig, fit_answers
    from fledge.rewards.functions import Rewarder, chosen_rewards, reward_functions
    from fledge.rewards.rollouts import Rollouts
    from fledge.rewards.trainer import SmallGrpoTrainer
    from fledge.training.configuration import choose_bf16

    data = Path(args.dataset)
    task, rows, (_, tokenizer, encoded) = task_of(data, None), open_rows(data)["train"], open_prepared(data)
    model, _ = load_model(args.model)
    cpu = not torch.accelerator.is_available()
    bf16 = choose_bf16(cpu)[0] if args.precision is None else args.precision == "bf16"
    weights = chosen_rewards(task, None, None)
    common = {
        "output_dir": folder, "max_steps": args.steps + 1, "report_to": "none", "disable_tqdm": True, "seed": 1,
        "beta": args.beta, "learning_rate": 1e-5, "num_generations": args.answers, "loss_type": "dr_grpo",
        "scale_rewards": "none", "per_device_train_batch_size": args.micro_batch, "logging_steps": 1,
        "gradient_accumulation_steps": args.prompts * args.answers // args.micro_batch, "use_cpu": cpu,
        "reward_weights": list(weights.values()), "save_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    config, _ = fit_answers(SmallGrpoConfig(**common, bf16=bf16), model, encoded["train"])
    prompts = [row["messages"][:-1] for row in rows]
    functions = reward_functions(Rewarder(task, rows), rows, tokenizer, list(weights))
    if way == "Fledge":
        rollouts = Rollouts(encoded["train"], prompts)
        given = {"prompts": prompts, "rollouts": rollouts}
        return SmallGrpoTrainer(model=model, args=config, reward_funcs=functions, processing_class=tokenizer, **given)
    own = {} if args.trl_defaults else {"bf16": bf16, "gradient_checkpointing": False}
    tokenizer.padding_side = "left"
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(**common, **own, max_completion_length=config.max_completion_length),
        reward_funcs=functions,
        train_dataset=Dataset.from_list([{"prompt": prompt, "row": row} for row, prompt in enumerate(prompts)]),
        processing_class=tokenizer,
    )


def time_parts(trainer, way, clock):
    """Lets the clock see each part of the trainer's steps."""
    import torch

    sampler = "rollout_func" if way == "Fledge" else "_generate_single_turn"
    setattr(trainer, sampler, clock.timed("sampling", getattr(trainer, sampler)))
    trainer._calculate_rewards = clock.timed("rewards", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = clock.timed(
        lambda: "forward" if torch.is_grad_enabled() else "reference", trainer._get_per_token_logps_and_entropies
    )
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    create = trainer.create_optimizer

    def timed_optimizer(*arguments):
        optimizer = create(*arguments)
        optimizer.step = clock.timed("update", optimizer.step)
        return optimizer

    trainer.create_optimizer = timed_optimizer


def measure(way, args):
    """One process: seconds of each part, tokens that were sampled, and peak memory in MiB."""
    import torch
    from transformers import TrainerCallback

    from fledge.memory import keep_freed_memory
    from fledge.terminal import quiet
    from fledge.training.run_record import peak_memory_mib

    quiet()
    logging.disable(logging.WARNING)
    clock = Clock(time.perf_counter if torch.accelerator.is_available() else time.process_time)
    clocks, lengths, started = (time.perf_counter, time.process_time, clock.now), [], []

    class Steps(TrainerCallback):
        """Notes the mean length of each step's answers; the first step warms up, and nothing of it counts."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                clock.seconds.clear()
                started.extend(now() for now in clocks)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                lengths.append(logs["completions/mean_length"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(way, args, folder)
        loaded = peak_memory_mib()
        trainer.add_callback(Steps())
        time_parts(trainer, way, clock)
        if way == "Fledge":
            keep_freed_memory()
            trainer.start_from(None)
        trainer.train()
    wall, processor, total = (now() - start for now, start in zip(clocks, started, strict=True))
    clock.seconds["rest"] = total - sum(clock.seconds.values())
    return {
        "shares": {part: seconds / total for part, seconds in clock.seconds.items()},
        "wall": wall,
        "processor": processor,
        "tokens": sum(lengths[1:]) * args.prompts * args.answers,
        "peak": peak_memory_mib(),
        "loaded": loaded,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=8, help="answers in one forward pass, of both")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--precision", choices=["bf16", "float32"], help="default: what Fledge chooses here")
    parser.add_argument("--trl_defaults", action="store_true", help="TRL keeps its own precision and checkpointing")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--only", way], stdout=subprocess.PIPE, text=True, check=True
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {found[way][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
    for way, runs in found.items():
        wall, processor = (statistics.median(speeds(runs, clock)) for clock in CLOCKS)
        print(f"{way:<7} {wall:6.2f} s per 1,000 sampled tokens, {processor:.2f} of a processor; ", end="")
        print(", ".join(f"{part} {statistics.median(r['shares'].get(part, 0) for r in runs):.0%}" for part in PARTS))
        peak, loaded = (statistics.median(r[key] for r in runs) for key in ("peak", "loaded"))
        print(f"        peak {peak:,.0f} MiB, of which {peak - loaded:,.0f} MiB came after the model was loaded")
    for clock, of in CLOCKS.items():
        each = zip(*(speeds(runs, clock) for runs in found.values()), strict=True)
        ratios = sorted(trl / fledge for fledge, trl in each)
        print(f"Fledge is {statistics.median(ratios):.1f} times as fast {of} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    peaks = {way: statistics.median(r["peak"] for r in runs) for way, runs in found.items()}
    print(f"in {peaks['Fledge'] / peaks['TRL']:.0%} of the memory")


def speeds(runs, clock):
    """Seconds per 1,000 sampled tokens of each run."""
    return [1000 * run[clock] / run["tokens"] for run in runs]


if __name__ == "__main__":
    main()
