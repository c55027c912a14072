"""DPO (Rafailov et al. 2023, arXiv:2305.18290) for small models, through TRL's DPOTrainer."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from typing_extensions import override

from fledge.encoding import IGNORED, prompt_length
from fledge.guards import check_overrides
from fledge.pictures import picture
from fledge.ranges import POSITIVE, check_ranges
from fledge.rewards.pairs import lengths_of
from fledge.rewards.watch import record_of
from fledge.terminal import progress
from fledge.training.checked import CheckedTrainer
from fledge.training.configuration import SmallDefaults, with_values
from fledge.training.run_record import Progress
from fledge.training.sharding import told_to_shard
from fledge.training.trainer import score_faster
from fledge.training.trial import lengths_in, time_of_rows

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# The picture's panels: what the log calls a curve, and what the picture does.
SHOWN = {
    "loss (nats per pair)": {"loss": ""},
    "share of pairs whose chosen answer is preferred": {"rewards/accuracies": ""},
    "log-probability gained, times beta": {"rewards/chosen": "chosen,", "rewards/rejected": "rejected,"},
}


@dataclass
class SmallDpoConfig(SmallDefaults, DPOConfig):  # type: ignore[misc]  # gradient_checkpointing may be None
    """`DPOConfig` with defaults for models of 1M to 200M parameters.

    TRL's defaults are a learning rate of 1e-6, a copy of the model that runs in each step, and a max_length beyond the
    context of most models trained from scratch.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or a share of all steps if below 1"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the pairs"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "pairs a step and device"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "pairs a step and device in evaluation"})
    max_length: int | None = field(default=None, metadata={"help": "cut pairs; prepare_dataset.py has fitted them"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate on the validation split"})
    disable_dropout: bool = field(default=False, metadata={"help": "overrule --dropout, which is 0 untold"})
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "ask the model at the start once, before training; else a copy in each step"}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of like length pad less"}
    )

    def __post_init__(self) -> None:
        check_ranges(self, {"beta": POSITIVE})  # without it no pair would teach anything
        super().__post_init__()


@check_overrides
class PreferenceTrainer(CheckedTrainer, DPOTrainer):
    """TRL's `DPOTrainer` on rows that are already encoded. It scores only the answers.

    The reference is the model of the start. Its log-probabilities are computed once, before the first step. If the
    weights are sharded, a copy of it computes them in each step.
    """

    args: SmallDpoConfig
    loss_line: str | None = None

    def __init__(self, *, model: PreTrainedModel, args: SmallDpoConfig, **inputs: Any):
        if told_to_shard(args):
            args = with_values(args, precompute_ref_log_probs=False)
        is_copied = not args.precompute_ref_log_probs and inputs["peft_config"] is None
        super().__init__(model=model, args=args, ref_model=copy.deepcopy(model) if is_copied else None, **inputs)
        self.prepare()

    def prepare(self) -> None:
        """Makes the models score only the answers, and sets `loss_line`."""
        if self.loss_line is None:
            model = self.accelerator.unwrap_model(self.model)
            self.loss_line = score_faster(model, self.args, rows=5 if self.args.use_weighting else 4)
            if self.ref_model is not None:
                score_faster(self.accelerator.unwrap_model(self.ref_model), self.args, rows=1)

    def time_needed(self, tokens_seen: int) -> str | None:
        """A line with the time left, from a trial with both answers of some pairs; see `time_of_rows`."""
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompts, chosen, rejected = (lengths_in(self.train_dataset, column) for column in columns)
        longest = self.args.max_length
        lengths = (prompts + chosen).clip(0, longest) + (prompts + rejected).clip(0, longest)

        def log_probs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORED)
            return self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs

        def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if not self.precompute_ref_logps:
                with torch.no_grad():
                    log_probs(batch)  # the reference is as large as the model
            return -log_probs(batch).mean()

        return time_of_rows(self, lengths, loss_of, tokens_seen)

    @override
    def extra_record(self) -> dict:
        return record_of(self.state.log_history)

    @override
    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        """Splits the ids of each row into TRL's columns. TRL's own method would encode texts, by other rules."""
        begins = list(map(prompt_length, dataset["labels"]))
        rows = list(zip(dataset["input_ids"], begins, strict=True))
        return Dataset.from_dict(
            {
                "prompt_ids": [ids[:begin] for ids, begin in rows],
                "chosen_ids": [ids[begin:] for ids, begin in rows],
                "rejected_ids": list(dataset["rejected_ids"]),
                "length": lengths_of(dataset),
            }
        )

    @override
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        with_length = list(dict.fromkeys([*columns, "length"]))  # for group_by_length
        self._signature_columns = with_length  # type: ignore[assignment]  # declared by the None it begins as

    @override
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Adds the reference's log-probabilities of both answers, which TRL would store beside the user's data."""
        self.prepare()
        model = self.model.eval()
        order = np.argsort(dataset["length"], kind="stable")
        loader = DataLoader(dataset.select(order), batch_size, collate_fn=self.data_collator)
        loader, found = self.accelerator.prepare(loader), []
        with progress(f"reference, {name}", len(loader)) if self.is_world_process_zero() else nullcontext() as tell:
            for batch in loader:
                found.append(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch)))
                if tell:
                    tell(len(found))
        back = np.argsort(order, kind="stable")
        for column, parts in zip(REFERENCE, zip(*found, strict=True), strict=True):
            dataset = dataset.add_column(column, torch.cat(parts).double().cpu().numpy()[back])
        return dataset


class PreferenceProgress(Progress):
    """One line a logged step: loss, how often the chosen answer has gained on the rejected one, and by how much."""

    @override
    def figures(self, logs: dict[str, float]) -> str:
        return f"loss {float(logs['loss']):.3f}  {_preferred(logs, 'rewards')}"

    @override
    def figures_of_validation(self, logs: dict[str, float]) -> str:
        return f"validation loss {logs['eval_loss']:.3f}  {_preferred(logs, 'eval_rewards')}"


def _preferred(logs: dict[str, float], prefix: str) -> str:
    return f"preferred {logs[f'{prefix}/accuracies']:.0%}  margin {logs[f'{prefix}/margins']:.2f}"


def save_preference_curve(log_history: list[dict], folder: Path) -> None:
    """The loss, how often the chosen answer is preferred, and what both answers gained, as `loss_curve.png`."""
    with picture(folder / "loss_curve.png", (11, 3.4), columns=len(SHOWN)) as panels:
        for panel, (title, curves) in zip(panels, SHOWN.items(), strict=True):
            for key, label in curves.items():
                for prefix, style, split in (("", "-", "training"), ("eval_", "o--", "validation")):
                    told = [entry for entry in log_history if prefix + key in entry]
                    points = [(entry["step"], float(entry[prefix + key])) for entry in told]
                    if points:
                        panel.plot(*zip(*points, strict=True), style, label=f"{label} {split}".strip(), markersize=4)
            panel.set(xlabel="step", title=title)
            if panel.lines:
                panel.legend(frameon=False)
            panel.grid(alpha=0.3)
