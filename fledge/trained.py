"""What a model's folder says of the task it was trained on. No code of that task is run for it."""

from dataclasses import dataclass
from pathlib import Path

from fledge.cli import UserError, read_json
from fledge.messages import Messages


@dataclass(frozen=True)
class Trained:
    """The task's name, whether it asks once, and a conversation that ends with its prompt."""

    task: str
    asks_once: bool
    example: Messages

    @property
    def system(self) -> Messages:
        """The system message of every conversation with the model, in a list; an empty one if there is none."""
        return [message for message in self.example if message["role"] == "system"]


def read_trained(folder: Path) -> Trained | None:
    """What train_sft.py has kept of the dataset beside a model; `None` for a model that it did not train.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / "budget.json"
    if not file.exists():
        return None
    budget = read_json(file, "train_sft.py", task=str, about_task=dict)
    about = budget["about_task"]
    try:
        return Trained(budget["task"], about["asks_once"], about["example"])
    except KeyError as error:
        raise UserError(f"{file} is damaged (about_task lacks {error}); run train_sft.py again.") from error
