"""A trainer with what every training of Fledge has, and its end.

That is sharding that is checked, lines of progress, and trackers whose failure costs nothing.
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
    """What stops a run after `early_stopping_patience` evaluations without a lower loss."""
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def open_trainer(
    kind: type[AnyTrainer],
    config: TrainingArguments,
    callbacks: list[TrainerCallback],
    progress: type[Progress] = Progress,
    **inputs: Any,
) -> AnyTrainer:
    """A trainer of the class `kind`, which takes `inputs` (model, datasets, …) and says its `progress`.

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
    """Finishes the trackers and destroys the process group; not before every process is here.

    The model that DDP wraps is freed first. Its reducer would otherwise be the last owner of the group, and end the
    group's threads while it holds the interpreter's lock, for which they may be waiting.
    """
    trainer.accelerator.wait_for_everyone()  # none leaves while another still needs it
    trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainer.accelerator.free_memory()
    attempt("The end of tracking", trainer.end)
