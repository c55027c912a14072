"""Tasks: what a model learns to do, and how its answers are scored. Each task is one file of this folder.

To add a task, put a file with one subclass of `Task` here, or name a file of your own: `--task my_task.py`.
docs/tasks.md shows a complete one.
"""

import importlib
import importlib.util
import pkgutil
import random
import sys
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any

from fledge.errors import UserError
from fledge.messages import Answer, Messages
from fledge.text.baselines import BASELINES, Baseline

FOLLOWING = "instruction_following"
KINDS = ("string", "strings")
ROLES = ("system", "user", "assistant")
GIVEN = {
    "string": "a text",
    "strings": "a list of texts",
    "messages": "a list of messages with role (system, user, assistant) and content, a text; the last is an answer",
}


class RejectedRecord(Exception):
    """A record that a task cannot use. The message is the reason, which the budget report counts."""


class Task(ABC):
    """Makes prompts and reference answers from records, and scores answers, so that the two cannot drift apart.

    The name of a task is the name of its file. A subclass sets the attributes that have no value here, and defines
    `examples` and `score`. If its scores need something learned from the training split, it also defines `scorer`.
    """

    template: str
    """The default of `--template`: the name of a file in fledge/templates/."""

    purpose: str
    """Completes "a language model trained to …", on the model's card and the Space."""

    example: Messages
    """A conversation that ends with a user's message: the example prompt of cards and of smoke tests.

    Its system message, if it has one, is that of every conversation with the model.
    """

    columns: dict[str, tuple[str, ...] | str]
    """The columns of a row besides its messages: name → a tuple of class labels, `"string"`, or `"strings"` (a list).

    `--balance` accepts classes, and the evaluation reports its figures by class.
    """

    meaning: dict[str, str]
    """Every metric that `score` may return, and `instruction_following`, each with its definition."""

    constraints: dict[str, float]
    """The metrics that decide whether an answer did what its prompt asks, each with the least value that passes.

    Higher is better for each of them. They are also the rewards of a task that does not define `rewards`.
    """

    rewards: dict[str, float] = {}
    """The rewards of `train_grpo.py`: name → weight. They are values that `reward` returns, or else metrics of `score`.

    Every task also has the rewards of fledge/rewards/functions.py.
    """

    done: dict[str, float] = {}
    """The rewards that decide whether an answer did what its prompt asks, each with the least value that passes.

    Only needed if they have other names than the `constraints`.
    """

    parts: tuple[str, ...] = ("instruction",)
    """The parts of an instruction that an answer can ignore separately. Each is replaced to measure chance."""

    judged_twice: tuple[str, str] | None = None
    """Two metrics of the same thing by different kinds of judges. If they differ, one of the judges is being gamed."""

    fields: dict[str, tuple[str, ...]] = {}
    """The fields of a prompt that has them: name → the labels that it takes, `()` for any text.

    `generate.py --interactive` asks for them one by one.
    """

    wording: str = ""
    """The prompt, with the names of its fields in braces."""

    text: str | None = None
    """What a conversation is about, such as a story. It is given once, with the first question."""

    asks_once: bool = False
    """Whether the task is single-turn: every example is one instruction and one answer.

    Such a dataset is written with the columns `instruction` and `response` in place of `messages`.
    """

    may_cut: bool = False
    """Whether `--overflow cut_prompt` may shorten the text in a prompt; see `answer_is_lost`."""

    baselines: dict[str, Baseline] = BASELINES
    """Answers that need no model: name → baseline. The evaluation scores them and shows them beside the model."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """The class columns with their labels."""
        return {column: kind for column, kind in self.columns.items() if isinstance(kind, tuple)}

    @property
    def about(self) -> dict[str, Any]:
        """What later stages need to know about the task, for `budget.json`, so that they need not run its code."""
        told = ("purpose", "asks_once", "example", "fields", "wording", "text")
        return {name: getattr(self, name) for name in told}

    @abstractmethod
    def examples(self, record: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """Makes the examples of one record.

        Each has `messages`, the last of which is the answer to learn, the task's columns, and `group`, a string:
        examples of one group never lie in two splits. All randomness comes from `rng`.

        Raises:
            RejectedRecord: the record gives no example. An example with a wrong answer is worse than none.
        """

    def checked_examples(self, record: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """Makes the examples of a record and checks that they have what the task declares.

        Raises:
            RejectedRecord: the record gives no example.
            UserError: an example lacks a column or has another one, or a value is not what the task declares.
        """
        made = list(self.examples(record, rng))  # which may be a generator
        wanted = {"messages", "group", *self.columns}
        for example in made:
            if example.keys() != wanted:
                raise UserError(
                    f"The task {self.name} made an example of {', '.join(sorted(example))}; it declares "
                    f"{', '.join(sorted(wanted))}."
                )
            for column, labels in self.classes.items():
                if example[column] not in labels:
                    raise UserError(f"The task {self.name} made the {column} {example[column]!r}; it names {labels}.")
            for column, kind in {"group": "string", **self.columns, "messages": "messages"}.items():
                if isinstance(kind, str) and not _is_a(kind, example[column]):
                    raise UserError(f"The task {self.name} made the {column} {example[column]!r}; give {GIVEN[kind]}.")
        return made

    def score(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        """Scores the answer to a row's prompt: all of its messages except the last, which is the reference answer.

        Returns a value in [0, 1] for each metric that the prompt calls for; any other metric is absent, not 0.
        `instruction_following` is not among them: it follows from the constraints.
        """
        raise NotImplementedError

    def reward(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        """A value in [0, 1] for each of `rewards` that the row's prompt calls for.

        A task defines this if its rewards must differ from its metrics: a model learns to please the judge that rewards
        it, so another judge must evaluate it. Otherwise the metrics of the same names are the rewards.
        """
        raise NotImplementedError

    def scorer(self, train_rows: list[dict], unseen_rows: list[dict]) -> "Scorer":
        """The scorer of an evaluation.

        It may learn from `train_rows`, the training split. Its judges are measured on `unseen_rows`, all other splits.
        """
        return Scorer(self)

    def kind(self, row: dict[str, Any]) -> str:
        """The kind of thing that a row asks for, such as a summary or a name.

        Chance compares an answer only with prompts of the same kind, because an answer of another kind proves nothing.
        """
        return ""

    def exchanged(self, part: str, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """The row with a part of its instruction, one of `parts`, taken from another row of its kind."""
        return other

    def weights(self, rows: list[dict[str, Any]]) -> list[float]:
        """The weight of each evaluated row in the task's metrics."""
        return [1.0] * len(rows)

    def answer_is_lost(self, messages: Messages, shortened: Messages) -> bool:
        """Whether shortening the text in the prompt (`may_cut`) removed the answer."""
        return False


class Scorer:
    """Scores answers one at a time with `Task.score`. It learns nothing."""

    def __init__(self, task: Task):
        self.task = task
        self.judge: dict = {}
        """The accuracy of the judges on rows that they did not learn from, for `metrics.json`; empty without judges.

        Its `says`, a list of sentences, is printed under every table.
        """

    def metrics(self, rows: list[dict], answers: list[Answer]) -> list[dict[str, float]]:
        """The metrics of each answer, without `instruction_following`. A scorer with a judge overrides this."""
        return [self.task.score(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def score(self, rows: list[dict], answers: list[Answer]) -> list[dict[str, float]]:
        """All metrics of each answer.

        `instruction_following` is 1 if every constraint that is scored is met and the answer stopped by itself.

        Raises:
            UserError: a metric is not in `meaning`, or has a value outside 0 to 1.
        """
        scored = []
        for metrics, answer in zip(self.metrics(rows, answers), answers, strict=True):
            for name, value in metrics.items():
                if name not in self.task.meaning or not 0 <= value <= 1:
                    raise UserError(
                        f"The task {self.task.name} scored an answer {value} in {name}; give a value from 0 to 1, and "
                        "say in `meaning` what it is."
                    )
            met = [metrics[name] >= least for name, least in self.task.constraints.items() if name in metrics]
            scored.append({FOLLOWING: float(answer.stopped and all(met)), **metrics})
        return scored


def _is_a(kind: str, value: Any) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if not isinstance(value, list):
        return False
    if kind == "strings":
        return all(isinstance(text, str) for text in value)
    is_message = all(m["role"] in ROLES and isinstance(m["content"], str) for m in value)
    return is_message and len(value) > 1 and value[-1]["role"] == "assistant"


def task_names() -> list[str]:
    """The tasks that are shipped: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def load_task(name: str) -> Task:
    """Opens a shipped task by its name.

    Raises:
        UserError: there is no task of that name.
    """
    if name not in task_names():
        raise UserError(
            f"The task {name!r} is unknown; choose one of {', '.join(task_names())}, or a Python file of your own with "
            "--task."
        )
    return _task_in(importlib.import_module(f"{__name__}.{name}"))


@cache
def open_task(named: str) -> Task:
    """Opens what --task names: a shipped task, or a Python file, whose code is run.

    A file is only run if a person names it, never because a dataset or a model names it.

    Raises:
        UserError: there is no such task or file, the file cannot be run, or it does not define one complete task.
    """
    if not named.endswith(".py"):
        return load_task(named)
    file = Path(named)
    if not file.is_file():
        raise UserError(f"--task {named} is no file; name a Python file, or choose one of {', '.join(task_names())}.")
    if file.stem in task_names() or not file.stem.isidentifier():
        raise UserError(f"--task {named} needs another name: an identifier that no shipped task has.")
    spec = importlib.util.spec_from_file_location(f"{__name__}.{file.stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"--task {named} cannot be run: {type(error).__name__}: {error}.") from error
    return _task_in(module)


def _task_in(module: ModuleType) -> Task:
    """Returns the task that a module defines.

    Raises:
        UserError: it defines none or several, or one that is incomplete.
    """
    file = Path(str(module.__file__)).name
    named = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    kinds = [kind for kind in named if issubclass(kind, Task)]
    if len(kinds) != 1:
        raise UserError(
            f"{file} defines {len(kinds) or 'no'} tasks; a task file has one subclass of fledge.tasks.Task."
        )
    kind = kinds[0]
    missing = [name for name in Task.__annotations__ if not hasattr(kind, name)] + sorted(kind.__abstractmethods__)
    if kind.score is Task.score and kind.scorer is Task.scorer:
        missing.append("score")
    if kind.reward is Task.reward and (unknown := set(kind.rewards) - set(kind.meaning)):
        missing.append(f"reward (or a meaning of {', '.join(sorted(unknown))})")
    if missing:
        raise UserError(f"The task in {file} lacks {', '.join(missing)}; fledge/tasks/__init__.py says what each is.")
    for column, labels in kind.columns.items():
        if not isinstance(labels, tuple) and labels not in KINDS:
            raise UserError(f"The column {column} of {file} is {labels!r}; give a tuple of labels or one of {KINDS}.")
    if {name for _, name, _, _ in Formatter().parse(kind.wording) if name is not None} != kind.fields.keys():
        raise UserError(f"The task in {file} has the fields {', '.join(kind.fields)}, and its wording other ones.")
    if unknown := {FOLLOWING, *kind.constraints} - set(kind.meaning):
        raise UserError(
            f"The task in {file} does not say what {', '.join(sorted(unknown))} means; add it to `meaning`."
        )
    return kind()
