"""Tasks: a record → conversations, and how an answer is scored. One file a task; docs/data.md tells how to add one."""

import importlib
from types import ModuleType

from fledge.cli import UserError

TASKS = ("topic_ending", "story_chat", "instructions")


class RejectedRecord(Exception):
    """A record that a task cannot use. The message is the reason, counted in the budget report."""


def load_task(name: str) -> ModuleType:
    """Raises:
    UserError: there is no task of that name.
    """
    if name not in TASKS:
        raise UserError(f"The task {name!r} is unknown; choose one of {', '.join(TASKS)}.")
    return importlib.import_module(f"fledge.tasks.{name}")
