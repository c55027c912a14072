"""A model's own scored answers → preference pairs, or the best answer to each prompt.

Answers are compared with answers to the same prompt only, and equal ones are never a pair. What is preferred ended by
itself. A rejected answer that ran into the limit has no end-of-text, so that stopping is what is preferred to it.
"""

import json
from typing import Any

from fledge.cli import UserError
from fledge.preparation.reasons import NONE_KEEPS_ALL, NONE_STOPPED, ONE_ANSWER, TIED
from fledge.tasks import RejectedRecord, Task

KEEP = ("pairs", "best")


def examples_of(record: dict[str, Any], task: Task, keep: str, pairs: int) -> list[dict[str, Any]]:
    """Makes the examples of a prompt and its answers.

    With `keep` "best" one, whose last message is the best of the answers that keep every constraint. With "pairs" up to
    `pairs`, each with a `rejected` answer and whether it `stopped`: the best answer against the worst, the next best
    against the next worst, and so on. No answer is in two pairs.

    Raises:
        RejectedRecord: no answer can be kept.
        UserError: the record is another task's.
    """
    if record["task"] != task.name or not task.columns.keys() <= record.keys():
        raise UserError(f"The answers are to prompts of the task {record['task']}; pass --task {record['task']}.")
    ranked = sorted(record["answers"], key=lambda answer: value(answer, task), reverse=True)
    if keep == "best":
        kept = [answer for answer in ranked if keeps_all(answer, task)]
        if not kept:
            raise RejectedRecord(NONE_KEEPS_ALL.text)
        return [_example(record, task, kept[0])]
    if len(ranked) < 2:
        raise RejectedRecord(ONE_ANSWER.text)
    stopped = [answer for answer in ranked if answer["stopped"] and answer["text"].strip()]
    if not stopped:
        raise RejectedRecord(NONE_STOPPED.text)
    made = [
        {**_example(record, task, chosen), "rejected": rejected["text"], "stopped": rejected["stopped"]}
        for chosen, rejected in zip(stopped, reversed(ranked), strict=False)
        if value(chosen, task) > value(rejected, task)
    ]
    if not made:
        raise RejectedRecord(TIED.text)
    return made[:pairs]


def _example(record: dict[str, Any], task: Task, answer: dict[str, Any]) -> dict[str, Any]:
    messages = [*record["messages"], {"role": "assistant", "content": answer["text"]}]
    group = json.dumps(record["messages"], sort_keys=True)
    return {"messages": messages, "group": group, **{column: record[column] for column in task.columns}}


def value(answer: dict[str, Any], task: Task) -> float:
    """What ranks an answer: its share of each constraint, which counts up to where it is met, and whether it stopped.

    An answer that overfulfils a constraint is not preferred for that.
    """
    scores = answer["scores"]
    shares = [min(scores[name] / least, 1.0) for name, least in task.constraints.items() if name in scores]
    return round(sum(shares) + answer["stopped"], 6)


def keeps_all(answer: dict[str, Any], task: Task) -> bool:
    scores = answer["scores"]
    met = all(scores[name] >= least for name, least in task.constraints.items() if name in scores)
    return bool(answer["stopped"] and met and answer["text"].strip())
