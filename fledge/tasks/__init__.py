"""Tasks: a record → conversations, and how an answer is scored. One file a task; docs/data.md tells how to add one."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fledge.cli import UserError

if TYPE_CHECKING:
    from fledge.generation.answers import Answer

TASKS = ("topic_ending", "story_chat", "instructions")


class RejectedRecord(Exception):
    """A record that a task cannot use. The message is the reason, counted in the budget report."""


class RuleScorer:
    """Scores each answer by `score_one(row, answer)`: nothing is learned, so there is no judge to judge."""

    def __init__(self, train_rows: list[dict], unseen_rows: list[dict]):
        self.judge: dict = {}

    def score(self, rows: list[dict], answers: "list[Answer]") -> list[dict[str, float]]:
        return [self.score_one(row, answer) for row, answer in zip(rows, answers, strict=True)]


def load_task(name: str) -> ModuleType:
    """Raises:
    UserError: there is no task of that name.
    """
    if name not in TASKS:
        raise UserError(f"The task {name!r} is unknown; choose one of {', '.join(TASKS)}.")
    return importlib.import_module(f"fledge.tasks.{name}")
