"""A model's own answers with rewards → preference pairs, or the best answer to each prompt.

Answers are only compared with answers to the same prompt, and answers of equal reward are never a pair. The preferred
answer always stopped by itself. A rejected answer that ran into the limit has no end-of-text, so the model also learns
to stop.
"""

import json
from dataclasses import dataclass
from typing import Any

from fledge.errors import UserError
from fledge.preparation.reasons import NONE_IS_DONE, NONE_STOPPED, ONE_ANSWER, TIED
from fledge.reading.values import is_visible
from fledge.tasks import RejectedRecord, Task

KEEP = ("pairs", "best")


@dataclass
class Choice:
    """How training data is chosen among the answers to a prompt.

    `keep` is "pairs" or "best". `weights` are the rewards that rank the answers, with their weights. The answers of a
    pair differ by at least `margin`, and a prompt gives up to `pairs` pairs.
    """

    keep: str
    weights: dict[str, float]
    margin: float
    pairs: int

    def examples(self, record: dict[str, Any], task: Task) -> list[dict[str, Any]]:
        """Makes the examples of a prompt and its answers.

        With "best" there is one, whose last message is the best of the answers that did what the prompt asks. With
        "pairs" each has a `rejected` answer and whether it `stopped`: the best answer against the worst, the next best
        against the next worst, and so on. No answer is in two pairs.

        Raises:
            RejectedRecord: no answer can be kept.
            UserError: the record belongs to another task.
        """
        if record["task"] != task.name:
            raise UserError(f"The answers are to prompts of the task {record['task']}; pass --task {record['task']}.")
        if missing := task.columns.keys() - record.keys():
            raise UserError(
                f"The answers lack {', '.join(sorted(missing))}, which rows of the task {task.name} have; ask for them "
                "again with evaluate_model.py."
            )
        ranked = sorted(record["answers"], key=self.value, reverse=True)
        if self.keep == "best":
            done = [answer for answer in ranked if is_done(answer, task)]
            if not done:
                raise RejectedRecord(NONE_IS_DONE.text)
            return [_example(record, task, done[0])]
        if len(ranked) < 2:
            raise RejectedRecord(ONE_ANSWER.text)
        stopped = [answer for answer in ranked if answer["stopped"] and is_visible(answer["text"])]
        if not stopped:
            raise RejectedRecord(NONE_STOPPED.text)
        made = [
            {**_example(record, task, chosen), "rejected": rejected["text"], "stopped": rejected["stopped"]}
            for chosen, rejected in zip(stopped, reversed(ranked), strict=False)
            if self.value(chosen) - self.value(rejected) >= self.margin
        ]
        if not made:
            raise RejectedRecord(TIED.text)
        return made[: self.pairs]

    def value(self, answer: dict[str, Any]) -> float:
        """The weighted sum of an answer's rewards, rounded so that the order of summation does not matter."""
        return round(sum(weight * answer["rewards"].get(name, 0.0) for name, weight in self.weights.items()), 6)


def is_done(answer: dict[str, Any], task: Task) -> bool:
    """Whether an answer stopped and did what its prompt asks.

    Only the rewards decide. The judges of the evaluation must not choose what they will evaluate.
    """
    least = task.done or task.constraints
    met = all(value >= least.get(name, 0.0) for name, value in answer["rewards"].items())
    return bool(answer["stopped"] and met and is_visible(answer["text"]))


def _example(record: dict[str, Any], task: Task, answer: dict[str, Any]) -> dict[str, Any]:
    messages = [*record["messages"], {"role": "assistant", "content": answer["text"]}]
    group = json.dumps(record["messages"], sort_keys=True)
    return {"messages": messages, "group": group, **{column: record[column] for column in task.columns}}
