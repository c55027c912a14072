"""The records of a run: lines of progress, the loss curve, and `run.json`."""

import importlib.util
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from fledge.cpu import describe
from fledge.guards import check_overrides
from fledge.pictures import picture
from fledge.training.checked import CheckedTrainer
from fledge.training.configuration import precision
from fledge.training.lineage import lineage_of
from fledge.version import __version__


@check_overrides
class Progress(TrainerCallback):
    """Prints a line for each logged step: loss, tokens per second, time left. Only the main process prints."""

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = self.last_time = time.monotonic()
        self.first_step, self.last_tokens = state.global_step, float(state.num_input_tokens_seen)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        done = f"{state.epoch or 0:5.2f} epochs  step {state.global_step:>5}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{done}  {self.figures_of_validation(logs)}", flush=True)
        elif "loss" in logs:
            now, tokens = time.monotonic(), logs.get("num_tokens", 0)
            speed = (tokens - self.last_tokens) / (now - self.last_time)
            self.last_tokens, self.last_time = tokens, now
            steps_left = state.max_steps - state.global_step
            seconds_left = round((now - self.start) / (state.global_step - self.first_step) * steps_left)
            time_left = f"{seconds_left // 60}:{seconds_left % 60:02d} left"
            print(f"{done}  {self.figures(logs)}  {speed:>7,.0f} tokens/s  {time_left}", flush=True)

    def figures(self, logs: dict[str, float]) -> str:
        """The figures in the line of a logged step."""
        return f"loss {float(logs['loss']):.3f}"

    def figures_of_validation(self, logs: dict[str, float]) -> str:
        loss = logs["eval_loss"]
        return f"validation loss {loss:.3f}  perplexity {math.exp(min(loss, 100)):.2f}"


def shield_trackers(trainer: Trainer) -> None:
    """Turns off a tracker that fails after training has begun, with one sentence, instead of stopping the run."""

    failed = set()

    def shielded(tracker: TrainerCallback, event: str) -> Callable[..., object]:
        do = getattr(tracker, event)

        def ask(*arguments: Any, **keywords: Any) -> object:
            if tracker not in failed:
                try:
                    return do(*arguments, **keywords)
                except Exception as error:  # a dropped connection, a full disk, a service that changed
                    failed.add(tracker)
                    print(f"{type(tracker).__name__} failed and is left out: {error}", file=sys.stderr, flush=True)
            return None

        return ask

    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith(("transformers.integrations", "trackio")):
            for event in set(events) - {"on_init_end", "on_train_begin"}:  # these may stop the run
                setattr(callback, event, shielded(callback, event))


def save_log(log_history: list[dict], folder: Path) -> None:
    """Writes everything that was logged, one JSON object per line."""
    with (folder / "training_log.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(json.dumps(entry) + "\n" for entry in log_history)


def save_curve(log_history: list[dict], folder: Path, what: str = "completion loss") -> None:
    """Draws training and validation loss (`what`) over steps."""
    with picture(folder / "loss_curve.png", (7, 3.6)) as axes:
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
            points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel=f"{what} (nats per token)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)


def run_record(trainer: CheckedTrainer, rows: DatasetDict, trained: dict) -> dict:
    """The content of `run.json`: the data, which parameters are `trained`, and the `outcome`."""
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "data_fingerprint": lineage_of(trainer).settings["data"],
        "trained": trained,
        **outcome(trainer, trl_config(trainer.args)),
        **trainer.extra_record(),
        "best_validation_loss": trainer.state.best_metric,
        "resumed": len(lineage_of(trainer).parts) > 1,
    }


def trl_config(config: TrainingArguments) -> type[TrainingArguments]:
    """The class of TRL that a configuration extends: the record lists what differs from its defaults."""
    return next(kind for kind in type(config).__mro__ if kind.__module__.startswith("trl."))


def outcome(trainer: Trainer, defaults: type[TrainingArguments]) -> dict:
    """Hyperparameters that differ from the library's `defaults`, the machine, the losses and the speed.

    `parts` lists where a run was resumed, how many seconds each part took, and what was changed. `seconds` is their
    sum: work after a checkpoint that was lost is not counted.
    """
    args, history = trainer.args, trainer.state.log_history
    with warnings.catch_warnings():  # TRL's default for gradient_checkpointing warns of its coming name
        warnings.simplefilter("ignore", FutureWarning)
        usual = defaults(output_dir=args.output_dir, use_cpu=args.use_cpu).to_dict()
    left_out: tuple[str, ...] = (
        "run_name",
        "disable_tqdm",
        "dataloader_pin_memory",
        "use_cpu",
        "do_eval",
        "save_total_limit",
    )
    left_out += ("log_level_replica", "logging_first_step", "ddp_find_unused_parameters", "gradient_checkpointing")
    chosen = args.to_dict().items()
    hyperparameters = {k: v for k, v in sorted(chosen) if k in usual and v != usual[k] and k not in left_out}
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    training = [float(entry["loss"]) for entry in history if "loss" in entry]
    parts = lineage_of(trainer).timed_parts()
    return {
        "hyperparameters": hyperparameters,
        "effective_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "parts": parts,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "first_loss": training[0] if training else None,
        "last_loss": training[-1] if training else None,
        "validation_loss": evaluations[-1] if evaluations else None,
        "tokens": tokens_until(history),
        "seconds": round(sum(part.get("seconds", 0) for part in parts), 1),
        "tokens_per_second": tokens_per_second(history, parts),
        "peak_memory_mib": peak_memory_mib(),
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{args.device.type} ({describe()})",
        "threads": torch.get_num_threads(),
        "precision": precision(args),
        "commit": commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that the result depends on: Python, Fledge and the libraries that train."""
    import accelerate
    import datasets
    import peft
    import transformers
    import trl

    return {
        "python": platform.python_version(),
        "fledge": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "datasets": datasets.__version__,
        "accelerate": accelerate.__version__,
        "peft": peft.__version__,
    }


def tokens_until(history: list[dict], step: float = math.inf) -> int:
    """The number of tokens from step 0 to `step`, from Trainer's log."""
    return int(max((entry.get("num_tokens", 0) for entry in history if entry["step"] <= step), default=0))


def tokens_per_second(history: list[dict], parts: list[dict]) -> int:
    """Mean speed over the `parts` that have seconds; a part that another program trained has none."""
    ends = [part["first_step"] for part in parts[1:]] + [math.inf]
    timed = [(part, end) for part, end in zip(parts, ends, strict=True) if "seconds" in part]
    tokens = sum(tokens_until(history, end) - tokens_until(history, part["first_step"]) for part, end in timed)
    return round(tokens / sum(part["seconds"] for part, _ in timed))


def peak_memory_mib() -> int | None:
    """Peak memory of this process: the GPU's when there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    if not importlib.util.find_spec("resource"):  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def commit() -> str | None:
    """The commit of the running code, if it runs from a checkout."""
    command = ["git", "rev-parse", "--show-prefix", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    # An installed package may lie in somebody else's repository, in its .venv.
    in_repository, _, name = found.stdout.strip().partition("\n")
    return name if found.returncode == 0 and in_repository == "fledge/training/" else None
