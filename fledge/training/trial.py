"""How long a run will take on this machine, from forward and backward passes that leave no trace."""

import time
from collections.abc import Callable
from typing import cast

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
    """The fastest of `repeats` forward and backward passes after one that warms up; weights and dice are as before."""
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
    """About how long: "40 seconds", "6 minutes", "5 hours"."""
    unit, name = (1, "second") if seconds < 100 else (60, "minute") if seconds < 180 * 60 else (3600, "hour")
    count = max(1, round(seconds / unit))
    return f"{count} {name}{'s' if count > 1 else ''}"


def time_needed(trainer: Trainer, tokens_seen: int) -> str | None:
    """A line on what is left of a fine-tuning, in which each process has a part; nothing where a model is sharded.

    The rows of the trial are those nearest to the mean length, as batches of like length have them.
    """
    args, rows = trainer.args, cast(Dataset, trainer.train_dataset)
    model = cast(PreTrainedModel, trainer.model)
    if told_to_shard(args):
        return None
    lengths = pc.list_value_length(rows.with_format("arrow")["input_ids"][:])
    mean, total = pc.mean(lengths).as_py(), pc.sum(lengths).as_py()
    nearest = pc.array_sort_indices(pc.abs(pc.subtract(lengths.combine_chunks(), mean)))
    chosen = nearest[: max(1, min(args.train_batch_size, int(TRIAL / mean)))].to_pylist()
    batch = send_to_device(trainer.data_collator([rows[k] for k in chosen]), args.device)
    tokens = sum(lengths[k].as_py() for k in chosen)

    def loss_of() -> Tensor:
        if has_fused_head(model):
            return -model(**batch, fused_lm_head=True).log_probs.sum() / tokens
        return model(**batch).loss

    seconds = seconds_of(trainer, loss_of, 1)
    speed = tokens / seconds * args.world_size
    a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * mean
    needed = args.max_steps * a_step if args.max_steps > 0 else args.num_train_epochs * total
    left = max(0.0, needed - tokens_seen) / speed
    return f"Time: about {in_words(left)} on this machine ({speed:,.0f} tokens/s in a short trial)"
