"""The base class of Fledge's trainers: how the optimizer and the schedule are made, and loaded to resume a run."""

import torch
from torch import nn
from transformers import Trainer
from typing_extensions import override

from fledge.guards import check_overrides
from fledge.training.lineage import load_optimizer
from fledge.training.settings import said_in_words


@check_overrides
class OptimizingTrainer(Trainer):
    """Says in a sentence why the optimizer or the schedule cannot be made; keeps changed settings of a resumed run."""

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with said_in_words("--optim or --optim_args"):
            return super().create_optimizer(model)

    @override
    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        with said_in_words("--lr_scheduler_type or --lr_scheduler_kwargs"):
            return super().create_scheduler(num_training_steps, optimizer)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load_optimizer(self, super()._load_optimizer_and_scheduler, checkpoint)
