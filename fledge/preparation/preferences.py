"""A model's own rewarded answers → preference pairs, or the best answer to each prompt.

Answers are compared with answers to the same prompt only, and those of equal reward are never a pair. What is
preferred ended by itself. A rejected answer that ran into the limit has no end-of-text, so that stopping is preferred.
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
    """What is chosen of a prompt's answers.

    `keep` is "pairs" or "best". `weights` are those of the rewards that rank. The answers of a pair differ by `margin`
    at least, and a prompt gives up to `pairs` of them.
    """

    keep: str
    weights: dict[str, float]
    margin: float
    pairs: int

    def examples(self, record: dict[str, Any], task: Task) -> list[dict[str, Any]]:
        """Makes the examples of a prompt and its answers.

        With "best" one, whose last message is the best of the answers that did what the prompt asks. With "pairs" each
        has a `rejected` answer and whether it `stopped`: the best answer against the worst, the next best against the
        next worst, and so on. No answer is in two pairs.

        Raises:
            RejectedRecord: no answer can be kept.
            UserError: the record is another task's.
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
        """The weighted sum of an answer's rewards, rounded so that the order of the sum makes no difference."""
        return round(sum(weight * answer["rewards"].get(name, 0.0) for name, weight in self.weights.items()), 6)


def is_done(answer: dict[str, Any], task: Task) -> bool:
    """Whether an answer stopped and did what its prompt asks.

    By the rewards alone: the judges that report would otherwise have chosen what they report on.
    """
    least = task.done or task.constraints
    met = all(value >= least.get(name, 0.0) for name, value in answer["rewards"].items())
    return bool(answer["stopped"] and met and is_visible(answer["text"]))


def _example(record: dict[str, Any], task: Task, answer: dict[str, Any]) -> dict[str, Any]:
    messages = [*record["messages"], {"role": "assistant", "content": answer["text"]}]
    group = json.dumps(record["messages"], sort_keys=True)
    return {"messages": messages, "group": group, **{column: record[column] for column in task.columns}}
