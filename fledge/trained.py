"""Reads the task of a trained model from the records in its folder, without running the task's code."""

from dataclasses import dataclass, field
from pathlib import Path

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.messages import Messages


@dataclass(frozen=True)
class Trained:
    """A task's name, whether it is single-turn, and an example conversation; the other fields are those of `Task`."""

    task: str
    asks_once: bool
    example: Messages
    fields: dict[str, list[str]] = field(default_factory=dict)
    wording: str = ""
    text: str | None = None

    @property
    def system(self) -> Messages:
        """The system message of every conversation with the model, as a list; empty if there is none."""
        return [message for message in self.example if message["role"] == "system"]


def read_trained(folder: Path) -> Trained | None:
    """The task that train_sft.py recorded beside a model; `None` for a model that it did not train.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / "budget.json"
    if not file.exists():
        return None
    budget = read_json(file, "train_sft.py", task=str, about_task=dict)
    about = budget["about_task"]
    try:
        return Trained(budget["task"], **{key: value for key, value in about.items() if key != "purpose"})
    except TypeError as error:
        raise UserError(f"{file} is damaged (about_task: {error}); run train_sft.py again.") from error
