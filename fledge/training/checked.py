"""The base class of Fledge's fine-tuning trainers: it stops at NaN, saves safely, and logs the speed."""

import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from typing_extensions import override

from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.guards import check_overrides, missing
from fledge.training.optimizing import OptimizingTrainer
from fledge.training.resuming import newest_checkpoint, tokens_seen


@check_overrides
class CheckedTrainer(OptimizingTrainer):
    """Stops at the first NaN or infinite loss or gradient. Inherit from it before one of TRL's trainers.

    The optimizer never takes such a step, so every saved checkpoint has finite weights.
    """

    args: Any  # one of Fledge's configurations, which all have SmallDefaults
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    _total_train_tokens: int  # the name under which TRL's SFT and DPO trainers count
    last_logged: tuple[float, int]
    inputs: Any  # the batch of the current step

    def tokens_so_far(self) -> int:
        """The number of tokens that the run has read, over all processes and since its first step."""
        return self._total_train_tokens

    def start_from(self, checkpoint: str | None) -> None:
        """Continues the token count of the interrupted run.

        Raises:
            UserError: TRL no longer counts them under this name.
        """
        if "_total_train_tokens" not in vars(self):
            raise missing("trl", f"{type(self).__bases__[-1].__name__}._total_train_tokens")
        self._total_train_tokens = tokens_seen(checkpoint)

    def excerpt_of(self, inputs: Any) -> str:
        """The beginning of the first answer of a batch, or else of its first text, for messages."""
        ids = inputs["input_ids"][0]
        if "labels" in inputs and (inputs["labels"][0] == IGNORED).any():  # a template begins every prompt alike
            ids = ids[inputs["labels"][0] != IGNORED]
        return cast(str, self.processing_class.decode(ids[:24]))

    def save_process_state(self, folder: Path) -> None:
        """Saves in a checkpoint's `folder` what this process needs to resume, beyond what Trainer saves."""

    def extra_record(self) -> dict:
        """Further entries of `run.json` for this kind of training."""
        return {}

    def summary_lines(self, record: dict) -> list[str]:
        """Lines that sum up a run, from its record (`run.json`)."""
        if record["first_loss"] is None:  # --logging_strategy no
            return []
        if sum("loss" in entry for entry in self.state.log_history) == 1:
            return [f"Loss {record['first_loss']:.3f} at the only step that was logged; --logging_steps 1 logs all."]
        return [f"Loss {record['first_loss']:.3f} to {record['last_loss']:.3f}."]

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self.inputs = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse("loss", loss)
        return loss

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # the gradient scaler skips such a step itself
            self._refuse("gradient's norm", norm)
        return norm

    def _refuse(self, what: str, value: float | torch.Tensor) -> None:
        if math.isfinite(value):
            return
        saved = newest_checkpoint(Path(str(self.args.output_dir)))
        begin = " ".join(self.excerpt_of(self.inputs).split())[:200]
        raise UserError(
            f"The {what} is {float(value)} at step {self.state.global_step + 1}, on the batch with "
            f"{begin!r}; lower --learning_rate and "
            + (f"go on from {saved.name} with --resume auto." if saved else "start again.")
        )

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.monotonic(), self.tokens_so_far()
            since, before = self.last_logged
            logs.setdefault("num_tokens", tokens)  # GRPO's trainer logs it only in steps that sampled answers
            logs["tokens_per_second"] = round((tokens - before) / (now - since), 1)
            self.last_logged = now, tokens
        super().log(logs, start_time)

    @override
    def train(self, *arguments: Any, **keywords: Any) -> TrainOutput:
        self.last_logged = time.monotonic(), self.tokens_so_far()
        return super().train(*arguments, **keywords)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.num_input_tokens_seen = self.tokens_so_far()
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_process_state(folder)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # raised on a full disk by torch and safetensors
            saved = newest_checkpoint(Path(str(self.args.output_dir)))
            raise UserError(
                f"A checkpoint cannot be written to {self.args.output_dir} ({' '.join(str(error).split())}); make room "
                + (f"and go on from {saved.name} with --resume auto." if saved else "and start again.")
            ) from error
