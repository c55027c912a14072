"""The settings of a run, stored in each checkpoint: resuming with other settings is refused, or recorded."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.guards import check_overrides
from fledge.training.settings import said_in_words

# What a run is compared by, of which people learn no more than that it differs.
FINGERPRINTS = {"base": "another base", "data": "other data"}
# Keys of transformers and TRL that leave the weights as they are: where a run writes and reports, how fast it reads.
WITHOUT_EFFECT = re.compile(
    r"output_dir|run_name|project|report_to|trackio_.*|log(ging)?_.*|log_level.*|disable_tqdm|hub_.*|push_to_hub.*"
    r"|save_.*|eval_(steps|strategy|delay|on_start|use_gather_object|do_concat_batches|accumulation_steps)|do_.*"
    r"|per_device_eval_batch_size|prediction_loss_only|dataloader_(num_workers|prefetch_factor|pin_memory"
    r"|persistent_workers)|dataset_num_proc|ddp_.*|fsdp.*|deepspeed|accelerator_config|parallelism_config|local_rank"
    r"|resume_from_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint|torch_empty_cache_steps"
    r"|skip_memory_metrics|include_.*|jit_mode_eval|use_cpu|enable_jit_checkpoint|greater_is_better"
    r"|remove_unused_columns"
)


@check_overrides
@dataclass
class Lineage(TrainerCallback, ExportableState):
    """Stores `settings` in the state of every checkpoint, and `parts`: what was changed at which step.

    The first of the `parts` begins at step 0. Trainer writes both in `trainer_state.json`, the last file of a complete
    checkpoint.
    """

    settings: dict
    parts: list[dict] = field(default_factory=lambda: [{"first_step": 0}])
    begun: float | None = field(default=None, init=False)  # by `time.monotonic`
    ended: float | None = field(default=None, init=False)

    def timed_parts(self) -> list[dict]:
        """The parts with their seconds: earlier parts up to their last checkpoint, the current part until now."""
        if self.begun is None:
            return self.parts
        *earlier, last = self.parts
        return [*earlier, last | {"seconds": round((self.ended or time.monotonic()) - self.begun, 3)}]

    @override
    def state(self) -> dict:
        return {"args": {"settings": self.settings, "parts": self.timed_parts()}, "attributes": {}}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun, self.ended = time.monotonic(), None
        # Trainer expects an entry for each stateful callback; a checkpoint saved without this one has none.
        cast(dict[str, Any], state.stateful_callbacks)[type(self).__name__] = self.state()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = time.monotonic()

    @property
    def has_changes(self) -> bool:
        return "changed" in self.parts[-1]


def settings_of(config: TrainingArguments, **more: object) -> dict[str, Any]:
    """The settings that determine the weights: those of `config` that do, the number of processes, and `more`."""
    told = {key: value for key, value in config.to_dict().items() if not WITHOUT_EFFECT.fullmatch(key)}
    return json.loads(json.dumps({**told, "processes": config.world_size, **more}, default=str))


def fingerprint_of_rows(rows: Dataset) -> str:
    """SHA-256 over the ids and labels of encoded rows, and the rejected ids of pairs, in their order."""
    digest, table = hashlib.sha256(), rows.with_format("arrow")[:]
    for column in sorted({"input_ids", "labels", "rejected_ids"} & set(rows.column_names)):
        for chunk in table.column(column).chunks:
            digest.update(pc.list_value_length(chunk).to_numpy(zero_copy_only=False).tobytes())
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()[:16]


def go_on(checkpoint: str | None, settings: dict, may_change: bool) -> Lineage:
    """The lineage of a new run, or of one that resumes from `checkpoint`, with `settings`.

    Raises:
        UserError: the checkpoint was made with other settings, or does not say with which, and `may_change` is false.
    """
    if not checkpoint:
        return Lineage(settings)
    state = read_json(Path(checkpoint) / "trainer_state.json", "the run that saved it")
    allow = "or go on with the new values by --resume_with_changes true"
    try:
        made = Lineage(**state["stateful_callbacks"]["Lineage"]["args"])
        changed = {
            key: [made.settings.get(key), settings.get(key)]
            for key in sorted(made.settings.keys() | settings.keys())
            if made.settings.get(key) != settings.get(key)
        }
    except (KeyError, TypeError, AttributeError) as error:
        if not may_change:
            name = Path(checkpoint).name
            raise UserError(f"{name} does not say what it was made with; begin with --overwrite, {allow}.") from error
        made, changed = Lineage({}), {"everything": ["unknown", "as in hyperparameters"]}
    if changed and not may_change:
        said = ", ".join(
            FINGERPRINTS.get(key, f"{key} {old!r:.60} (now {new!r:.60})") for key, (old, new) in changed.items()
        )
        raise UserError(f"{Path(checkpoint).name} was made with {said}; give the old values, {allow}.")
    part = {"first_step": state["global_step"]} | ({"changed": changed} if changed else {})
    return Lineage(settings, [*made.parts, part])


def lineage_of(trainer: Trainer) -> Lineage:
    return next(call for call in trainer.callback_handler.callbacks if isinstance(call, Lineage))


def load_optimizer(trainer: Trainer, load: Callable[[str], None], checkpoint: str | None) -> None:
    """Loads the optimizer's and the schedule's state by `load`, and keeps the run's own settings if they were changed.

    A saved optimizer restores its learning rate, betas and weight decay, which would silently replace the new ones.
    """
    if not checkpoint:
        return
    assert trainer.optimizer
    own = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    with said_in_words():
        load(checkpoint)
    if not lineage_of(trainer).has_changes:
        return
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate wraps it
    for group, settings in zip(trainer.optimizer.param_groups, own, strict=True):
        group.update(settings)
    if not isinstance(schedule, LambdaLR):  # a schedule that depends on the loss gives no rate for a step
        return
    schedule.base_lrs = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    rates = [
        rate * share(schedule.last_epoch) for rate, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # what the log shows for the next step; the optimizer uses the rates of its groups
