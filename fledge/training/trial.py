"""Estimates how long a run will take on this machine, from trial passes that do not change the run."""

import time
from collections.abc import Callable
from typing import cast

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fledge.training.loss import has_fused_head
from fledge.training.sharding import told_to_shard

# Tokens of a trial: under a second on two cores at the quickstart's size, and large enough for threads to be used.
TRIAL = 2048


def seconds_of(trainer: Trainer, loss_of: Callable[[], Tensor], repeats: int) -> float:
    """The fastest of `repeats` forward and backward passes after a warm-up. Weights and random state do not change."""
    model = cast(nn.Module, trainer.model).to(trainer.args.device).train()
    times = []
    with torch.random.fork_rng():
        for _ in range(1 + repeats):
            start = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = loss_of()
            loss.backward()
            if trainer.args.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    model.zero_grad()
    return min(times[1:])


def in_words(seconds: float) -> str:
    """A duration for people: "40 seconds", "6 minutes", "5 hours"."""
    unit, name = (1, "second") if seconds < 100 else (60, "minute") if seconds < 180 * 60 else (3600, "hour")
    count = max(1, round(seconds / unit))
    return f"{count} {name}{'s' if count > 1 else ''}"


def time_needed(trainer: Trainer, tokens_seen: int) -> str | None:
    """A line with the time left of a fine-tuning; `None` for a sharded model. See `time_of_rows`."""
    model = cast(PreTrainedModel, trainer.model)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        if has_fused_head(model):
            return -model(**batch, fused_lm_head=True).log_probs.mean()
        return model(**batch).loss

    rows = cast(Dataset, trainer.train_dataset)
    return time_of_rows(trainer, lengths_in(rows, "input_ids"), loss_of, tokens_seen)


def lengths_in(rows: Dataset, column: str) -> np.ndarray:
    """The number of tokens in each row of a column, an array of shape (rows,)."""
    return pc.list_value_length(rows.with_format("arrow")[column][:]).to_numpy()


def time_of_rows(
    trainer: Trainer, lengths: np.ndarray, loss_of: Callable[[dict[str, Tensor]], Tensor], tokens_seen: int
) -> str | None:
    """A line with the time left of a training on rows of `lengths` (rows,) tokens, shared among the processes.

    The trial uses the rows that are nearest to the mean length, so that its batch needs little padding.
    """
    args, rows = trainer.args, cast(Dataset, trainer.train_dataset)
    if told_to_shard(args):
        return None
    mean = float(lengths.mean())
    nearest = np.argsort(np.abs(lengths - mean), kind="stable")
    chosen = nearest[: max(1, min(args.train_batch_size, int(TRIAL / mean)))].tolist()
    batch = send_to_device(trainer.data_collator([rows[k] for k in chosen]), args.device)
    seconds = seconds_of(trainer, lambda: loss_of(batch), 1)
    speed = int(lengths[chosen].sum()) / seconds * args.world_size
    a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * mean
    needed = args.max_steps * a_step if args.max_steps > 0 else args.num_train_epochs * int(lengths.sum())
    left = max(0.0, needed - tokens_seen) / speed
    return f"Time: about {in_words(left)} on this machine ({speed:,.0f} tokens/s in a short trial)"
