"""Opens and closes a trainer with what all of Fledge's trainings share.

These are checks that the weights are sharded, lines of progress, and trackers whose failure does not stop the run.
"""

from typing import Any, TypeVar

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fledge.cli import attempt
from fledge.training.configuration import SmallDefaults
from fledge.training.run_record import Progress, shield_trackers
from fledge.training.settings import said_in_words
from fledge.training.sharding import CheckSharded, shard_on_cpus

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def early_stopping(config: SmallDefaults) -> list[TrainerCallback]:
    """The callback that stops a run after `early_stopping_patience` evaluations without a lower loss, if it is set."""
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def open_trainer(
    kind: type[AnyTrainer],
    config: TrainingArguments,
    callbacks: list[TrainerCallback],
    progress: type[Progress] = Progress,
    **inputs: Any,
) -> AnyTrainer:
    """A trainer of the class `kind`, called with `inputs` (model, datasets, …), which prints `progress`.

    Raises:
        UserError: transformers or TRL refuses the configuration.
    """
    shard_on_cpus(config)
    with said_in_words():
        trainer = kind(args=config, callbacks=[CheckSharded(), progress(), *callbacks], **inputs)
    trainer.remove_callback(PrinterCallback)
    shield_trackers(trainer)
    return trainer


def close_trainer(trainer: Trainer) -> None:
    """Finishes the trackers and destroys the process group, once all processes have arrived.

    The model that DDP wraps is freed first. Otherwise its reducer would be the last owner of the group and would join
    the group's threads while it holds the GIL, for which they may be waiting.
    """
    trainer.accelerator.wait_for_everyone()  # no process may leave while another still needs it
    trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainer.accelerator.free_memory()
    attempt("The end of tracking", trainer.end)
