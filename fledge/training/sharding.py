"""Sharding of weights, gradients and optimizer states over processes: enabled on CPUs too, and checked."""

import os
from importlib.util import find_spec
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from fledge.errors import UserError
from fledge.guards import check_overrides, missing


def told_to_shard(config: TrainingArguments) -> str | None:
    """The kind of sharding that the launcher or a key asks for: "FSDP", "DeepSpeed", or `None`."""
    for name, key in (("FSDP", config.fsdp), ("DeepSpeed", config.deepspeed)):
        if key or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            return name
    return None


def check_deepspeed(config: TrainingArguments) -> None:
    """Checks that DeepSpeed is installed if the run is to use it.

    Raises:
        UserError: DeepSpeed is asked for and not installed.
    """
    if told_to_shard(config) == "DeepSpeed" and find_spec("deepspeed") is None:
        raise UserError("This run was told to shard by DeepSpeed, which is not installed: pip install deepspeed.")


def shard_on_cpus(config: TrainingArguments) -> None:
    """Lets accelerate shard over CPU processes, before a trainer is made.

    accelerate enables FSDP on accelerators only and silently uses DDP, with whole copies, on CPUs, although FSDP2 works
    over gloo. This function sets on CPUs what `AcceleratorState` sets on GPUs.
    """
    if not (config.use_cpu and config.world_size > 1 and told_to_shard(config) == "FSDP"):
        return
    plugin = FullyShardedDataParallelPlugin(**(config.fsdp_plugin_args or {}))
    precision = config.mixed_precision
    if precision != "no":
        plugin.set_mixed_precision(precision)
    try:
        state = AcceleratorState(precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    except TypeError as error:
        raise missing("accelerate", "AcceleratorState(_from_accelerator)") from error
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


@check_overrides
class CheckSharded(TrainerCallback):
    """Stops a run before its first step if it was told to shard but every process holds the whole model."""

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        told = told_to_shard(args)
        by_deepspeed = AcceleratorState().distributed_type == DistributedType.DEEPSPEED
        shards = {
            "FSDP": model is not None and any(isinstance(p, DTensor) for p in model.parameters()),
            "DeepSpeed": by_deepspeed,
            None: True,
        }
        if not shards[told]:
            raise UserError(
                f"This run was told to shard by {told} and holds the whole model in each of its {args.world_size} "
                "processes; FSDP needs fsdp_version 2 and two processes, DeepSpeed GPUs: see docs/training.md."
            )
