"""The configuration that all of Fledge's trainings share: defaults for small models, precision, threads, processes."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from transformers import TrainingArguments

from fledge.cpu import cores, multiplies_bf16
from fledge.errors import UserError
from fledge.training.settings import check_training, said_in_words
from fledge.training.sharding import check_deepspeed

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass
class SmallDefaults:
    """Defaults for models of 1M to 200M parameters. To be inherited beside one of TRL's configurations.

    TRL's own are for billions of parameters: gradient checkpointing, pinned memory, a checkpoint every 500 steps.
    """

    # TRL's default is on, and transformers is renaming the key: None turns it off under both names without a warning.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "trade time for memory"})
    save_strategy: str = field(default="no", metadata={"help": "when to save a checkpoint for --resume"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "pin memory in the data loader"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step, where training starts from"})
    log_level_replica: str = field(default="error", metadata={"help": "what processes other than the first print"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "only if a forward skips weights"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Fledge prints a line of progress instead"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations without a lower loss; keep the best model"}
    )

    def __post_init__(self) -> None:
        config = cast(TrainingArguments, self)
        save_the_best(config, self.early_stopping_patience)
        check_training(config)
        self.precision_reason = choose_device_and_precision(config)
        with said_in_words():
            cast(Any, super()).__post_init__()


def save_the_best(config: TrainingArguments, patience: int | None) -> None:
    """Has a checkpoint saved at each evaluation where the best model is to be kept, as early stopping keeps it.

    Raises:
        UserError: nothing is evaluated.
    """
    config.load_best_model_at_end = config.load_best_model_at_end or patience is not None
    if config.load_best_model_at_end and config.eval_strategy == "no":
        key = "load_best_model_at_end" if patience is None else "early_stopping_patience"
        raise UserError(f"--{key} compares evaluations, and there are none; add --eval_strategy epoch, or steps.")
    if config.load_best_model_at_end and config.save_strategy == "no":
        config.save_strategy, config.save_steps = config.eval_strategy, config.eval_steps or config.save_steps


def choose_device_and_precision(config: TrainingArguments) -> str:
    """Sets `use_cpu` and `bf16` of a configuration that is not checked yet; returns the reason for the precision."""
    check_deepspeed(config)
    config.use_cpu = config.use_cpu or not torch.accelerator.is_available()
    if config.bf16 is not None or config.fp16:
        return "as asked for"
    config.bf16, reason = choose_bf16(config.use_cpu)
    return reason


def precision(config: TrainingArguments) -> str:
    return "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"


def choose_bf16(use_cpu: bool) -> tuple[bool, str]:
    """Whether to train in bf16 autocast, and why."""
    if use_cpu:
        if multiplies_bf16():
            return True, "this CPU multiplies bfloat16 matrices in hardware"
        return False, "this CPU has no bfloat16 matrix unit"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return True, "this GPU multiplies bfloat16 matrices in hardware"
    return False, "this device has no bfloat16 matrix unit"


def use_all_threads(config: TrainingArguments) -> str | None:
    """Gives each process its share of the cores under `accelerate launch`, and returns a line that says so.

    On CPUs, `accelerate launch` sets OMP_NUM_THREADS to 1 by default, which leaves all cores but one idle.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    threads = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not (config.use_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1" and threads > 1):
        return None
    torch.set_num_threads(threads)
    return f"Threads {threads}: accelerate launch gives a process one, and this machine has more"


def with_values(config: Config, **values: Any) -> Config:
    """A copy of a checked configuration with other `values`."""
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def smoke(config: Config) -> Config:
    """The configuration for three steps of a recipe, with an evaluation and a checkpoint, in a separate folder."""
    return with_values(
        config,
        output_dir=f"{config.output_dir}-smoke",
        max_steps=3,
        logging_steps=1,
        eval_steps=3,
        save_steps=3,
        eval_strategy="no" if config.eval_strategy == "no" else "steps",
        save_strategy="no" if config.save_strategy == "no" else "steps",
    )


def check_processes(config: TrainingArguments, script: str) -> None:
    """Refuses to run `script` with fewer processes than the launcher was told to start.

    Raises:
        UserError: `accelerate launch` took a configuration of several processes and started one, as it does for CPUs
            without MPI; or several GPUs are visible to one process.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    # accelerate sets a rendezvous address only when it is to start several processes.
    if launched and "MASTER_ADDR" in os.environ and config.world_size == 1:
        raise UserError(
            "accelerate launch was told to start several processes and started one; "
            f"start them by torchrun --nproc_per_node COUNT {script} instead."
        )
    if config.n_gpu > 1:
        raise UserError(
            f"One process sees {config.n_gpu} GPUs; start one on each with accelerate launch --multi_gpu {script}, "
            "or show it a single one with CUDA_VISIBLE_DEVICES=0."
        )
