"""Reward functions for TRL, one for each reward of a task, each logged under its own name.

Besides its own rewards (`Task.rewards`) every task rewards

- `stopped`: the model ended its answer itself;
- `usual`: the answer is about as long, and repeats itself as little, as the training answers to such prompts. A model
  that is rewarded for anything else finds out that a short answer, or the same words again, often pay as well;
- `varied`: the answer does not end as too many answers to other prompts do. Otherwise the model finds one ending that
  pays, and ends every story with it.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerState

from fledge.errors import UserError
from fledge.generation.answers import answer_of
from fledge.messages import Answer
from fledge.rewards.usual import Ending, Usual, Varied
from fledge.tasks import Task

RewardFunction = Callable[..., list[float | None]]
OF_EVERY_TASK = {"stopped": 1.0, "usual": 1.0, "varied": 1.0}
FILE_MARK = ".py:"


def weights_of(task: Task) -> dict[str, float]:
    """The rewards of a task with their weights. A second judge of the same thing is never a reward."""
    second = task.judged_twice[1] if task.judged_twice else None
    own = task.rewards or {name: 1.0 for name in task.constraints if name != second}
    return own | OF_EVERY_TASK


def chosen_rewards(task: Task, names: list[str] | None, weights: list[float] | None) -> dict[str, float]:
    """Rewards by name with their weights: those of the task, or the `names` and `weights` that the user gives.

    A name that is not a reward of the task is a function of the user, `file.py:function`, with the weight 1.

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
        self.ids: list[list[int]] | None = None
        self.found: list[dict[str, float]] = []

    def function(self, name: str) -> RewardFunction:
        def reward(*, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
            return [found.get(name) for found in self.rewards(row, completion_ids)]

        reward.__name__ = name
        return reward

    def rewards(self, numbers: list[int], completion_ids: list[list[int]]) -> list[dict[str, float]]:
        if self.ids is not completion_ids:  # the first function that TRL calls in this step
            answers = [answer_of(self.tokenizer, ids) for ids in completion_ids]
            rows = [self.rows[number] for number in numbers]
            self.ids, self.found = completion_ids, self.rewarder.rewards(rows, answers, gather_object)
        return self.found


class Rewarder:
    """Computes the rewards of a task; `usual` and `varied` learn from the training split, `train_rows`."""

    def __init__(self, task: Task, train_rows: list[dict]):
        self.task, self.names = task, weights_of(task)
        self.usual, self.varied = Usual(task, train_rows), Varied(task, train_rows)
        self.scorer = task.scorer(train_rows, []) if type(task).reward is Task.reward else None

    def rewards(
        self, rows: list[dict], answers: list[Answer], gather: Callable[[list[Ending]], list[Ending]] = list
    ) -> list[dict[str, float]]:
        """All rewards of each answer that its prompt calls for.

        `gather` collects the endings of the answers of all processes; without it, these are all answers.

        Raises:
            UserError: a reward does not belong to the task, or is outside 0 to 1.
        """
        if self.scorer:
            scored = self.scorer.metrics(rows, answers)
            found = [{name: value for name, value in of.items() if name in self.names} for of in scored]
        else:
            found = [self.task.reward(row, answer) for row, answer in zip(rows, answers, strict=True)]
        endings = self.varied.endings(rows, answers)
        varied = self.varied.rewards(endings, gather(endings))
        for row, answer, of_varied, of_answer in zip(rows, answers, varied, found, strict=True):
            usual = self.usual.reward(row, answer)
            of_answer |= {"stopped": float(answer.stopped), "usual": usual, "varied": of_varied}
            for name, value in of_answer.items():
                if name not in self.names or not 0 <= value <= 1:
                    raise UserError(
                        f"The task {self.task.name} rewarded an answer with {value} for {name}; give a value from 0 to "
                        "1, and name it in `rewards`."
                    )
        return found


def call_of(rows: list[dict], texts: list[str], completion_ids: list[list[int]], state: TrainerState) -> dict[str, Any]:
    """The arguments with which TRL calls a reward function, for one answer to the prompt of each of `rows`."""
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
