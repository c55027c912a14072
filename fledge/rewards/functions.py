"""Reward functions as TRL takes them, one for each thing that a task rewards, each logged by its own name.

Besides its own rewards (`Task.rewards`) every task rewards

- `stopped`: the model ended its answer itself;
- `usual`: the answer is about as long, and repeats itself as little, as the training answers to such prompts. A model
  that is rewarded for anything else finds out that a short answer, or the same words again, often pay as well.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainerState

from fledge.errors import UserError
from fledge.evaluation.wording import repetition
from fledge.generation.answers import answer_of
from fledge.messages import Answer
from fledge.tasks import Task
from fledge.text.words import as_written

RewardFunction = Callable[..., list[float | None]]
OF_EVERY_TASK = {"stopped": 1.0, "usual": 1.0}
COMMON_SHARE = 0.95  # of the training answers are as usual as an answer that gets the whole reward
FILE_MARK = ".py:"


def weights_of(task: Task) -> dict[str, float]:
    """The rewards that a task gives, with the weight of each. A second judge of the same thing is never rewarded."""
    second = task.judged_twice[1] if task.judged_twice else None
    own = task.rewards or {name: 1.0 for name in task.constraints if name != second}
    return own | OF_EVERY_TASK


def chosen_rewards(task: Task, names: list[str] | None, weights: list[float] | None) -> dict[str, float]:
    """Rewards by name with their weights: those of the task, or the `names` and `weights` that the user gives.

    A name that is none of the task's is a function of the user's, `file.py:function`, with the weight 1.

    Raises:
        UserError: there is no such reward, one is named twice, or there are more or fewer weights than rewards.
    """
    known = weights_of(task)
    names = list(known) if names is None else names
    for name in names:
        if name not in known and FILE_MARK not in name:
            raise UserError(
                f"The task {task.name} has no reward {name!r}; name some of {', '.join(known)}, or a function of your "
                "own as my_rewards.py:shorter."
            )
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--rewards names {', '.join(names) or 'none'}; name at least one, and each once.")
    if weights is not None and len(weights) != len(names):
        raise UserError(f"--reward_weights has {len(weights)} numbers for {len(names)} rewards: {', '.join(names)}.")
    return dict(zip(names, weights or [known.get(name, 1.0) for name in names], strict=True))


def reward_functions(
    rewarder: "Rewarder", rows: list[dict], tokenizer: PreTrainedTokenizerBase, names: list[str] | None = None
) -> list[RewardFunction]:
    """TRL's reward functions for answers to the prompts of `rows`, for all rewards of the task or those of `names`.

    Each is called with `completion_ids` and `row`, the number of each answer's prompt among `rows`. It returns a value
    in [0, 1] for each answer, and None where the prompt does not call for this reward (see `chosen_rewards`).

    Raises:
        UserError: a name is no reward; a user's file cannot be run; a task returned a value outside 0 to 1.
    """
    step = _Step(rewarder, rows, tokenizer)
    return [
        _of_user(name, rows) if FILE_MARK in name else step.function(name)
        for name in chosen_rewards(rewarder.task, names, None)
    ]


class _Step:
    """Rewards the answers of a step to the prompts of `rows`, once for all functions."""

    def __init__(self, rewarder: "Rewarder", rows: list[dict], tokenizer: PreTrainedTokenizerBase):
        self.rewarder, self.rows, self.tokenizer = rewarder, rows, tokenizer
        self.last: tuple[list[int], list[list[int]], list[dict[str, float]]] = ([], [], [])

    def function(self, name: str) -> RewardFunction:
        def reward(*, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
            return [found.get(name) for found in self.rewards(row, completion_ids)]

        reward.__name__ = name
        return reward

    def rewards(self, numbers: list[int], completion_ids: list[list[int]]) -> list[dict[str, float]]:
        if self.last[:2] != (numbers, completion_ids):
            answers = [answer_of(self.tokenizer, ids) for ids in completion_ids]
            rows = [self.rows[number] for number in numbers]
            self.last = (numbers, completion_ids, self.rewarder.rewards(rows, answers))
        return self.last[2]


class Rewarder:
    """Rewards answers as a task does; what is usual is learned from the training split, `train_rows`."""

    def __init__(self, task: Task, train_rows: list[dict]):
        self.task, self.names = task, weights_of(task)
        self.usual = Usual(task, train_rows)
        self.scorer = task.scorer(train_rows, []) if type(task).reward is Task.reward else None

    def rewards(self, rows: list[dict], answers: list[Answer]) -> list[dict[str, float]]:
        """Every reward that is called for in each answer.

        Raises:
            UserError: a reward is none of the task's, or outside 0 to 1.
        """
        if self.scorer:
            scored = self.scorer.metrics(rows, answers)
            found = [{name: value for name, value in of.items() if name in self.names} for of in scored]
        else:
            found = [self.task.reward(row, answer) for row, answer in zip(rows, answers, strict=True)]
        for row, answer, of_answer in zip(rows, answers, found, strict=True):
            of_answer |= {"stopped": float(answer.stopped), "usual": self.usual.reward(row, answer)}
            for name, value in of_answer.items():
                if name not in self.names or not 0 <= value <= 1:
                    raise UserError(
                        f"The task {self.task.name} rewarded an answer with {value} for {name}; give a value from 0 to "
                        "1, and name it in `rewards`."
                    )
        return found


class Usual:
    """How long training answers are and how much they repeat themselves, by the kind of their prompt.

    The limits leave out the outermost twentieth of the training answers on either side. Inside them the reward is 1.
    Outside it falls to 0: for an answer half as long, twice as long, or with half as many different runs of words.
    """

    def __init__(self, task: Task, rows: list[dict]):
        self.task = task
        found: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            text = row["messages"][-1]["content"]
            found.setdefault(task.kind(row), []).append((len(as_written(text)), 1 - repetition(text)))
        self.limits = {
            kind: (
                float(np.quantile([count for count, _ in of_kind], 1 - COMMON_SHARE)),
                float(np.quantile([count for count, _ in of_kind], COMMON_SHARE)),
                float(np.quantile([fresh for _, fresh in of_kind], 1 - COMMON_SHARE)),
            )
            for kind, of_kind in found.items()
        }

    def reward(self, row: dict, answer: Answer) -> float:
        limits, count = self.limits.get(self.task.kind(row)), len(as_written(answer.text))
        if limits is None:  # a kind of prompt that training does not have
            return 1.0
        shortest, longest, least_fresh = limits
        if count == 0:
            return float(shortest == 0)
        fresh = min(1.0, (1 - repetition(answer.text)) / least_fresh)
        length = min(1.0, count / max(shortest, 1), max(longest, 1) / count)
        return max(0.0, 2 * fresh * length - 1)


def call_of(rows: list[dict], texts: list[str], completion_ids: list[list[int]], state: TrainerState) -> dict[str, Any]:
    """What TRL calls a reward function with, for one answer to the prompt of each of `rows`."""
    return {
        "prompts": [row["messages"][:-1] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": completion_ids,
        "row": list(range(len(rows))),
        "trainer_state": state,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }


def _of_user(named: str, rows: list[dict]) -> RewardFunction:
    """The function that `file.py:function` names. It is called as by TRL, with the columns of each answer's row.

    Raises:
        UserError: the file cannot be run, or has no such function.
    """
    path, _, name = named.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"The reward {named} is in no file; name a Python file and a function in it.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"The reward {named} cannot be run: {type(error).__name__}: {error}.") from error
    function = vars(module).get(name)
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}, which the reward {named} names.")

    def reward(*, row: list[int], **given: Any) -> list[float | None]:
        columns = {key: [rows[number][key] for number in row] for key in rows[0] if key not in given}
        return function(row=row, **given, **columns)

    reward.__name__ = name
    return reward
