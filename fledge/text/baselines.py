"""Answers that need no model. One that scores no better than these has not learned what its prompts ask."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

from fledge.messages import INPUT_MARK
from fledge.text.stories import sentences


class Baseline(NamedTuple):
    """A way to answer without a model: a description, and a function of rows and the training rows of their kind."""

    meaning: str
    answer: Callable[[list[dict], list[dict]], list[str]]

    def answers(self, rows: list[dict], train_rows: list[dict], kind: Callable[[dict], Hashable]) -> list[str]:
        """The answer to each row; each kind of rows is answered separately."""
        found: dict[int, str] = {}
        for name in dict.fromkeys(map(kind, rows)):
            numbers = [number for number, row in enumerate(rows) if kind(row) == name]
            training = [row for row in train_rows if kind(row) == name]
            found |= zip(numbers, self.answer([rows[number] for number in numbers], training), strict=True)
        return [found[number] for number in range(len(rows))]


def most_frequent_answer(rows: list[dict], train_rows: list[dict]) -> list[str]:
    counts = Counter(row["messages"][-1]["content"] for row in train_rows)
    return [max(counts, key=lambda answer: counts[answer], default="")] * len(rows)


def first_sentence(rows: list[dict], train_rows: list[dict]) -> list[str]:
    """The first sentence of the longest text in the prompt, which is the one that the question is about."""
    found = []
    for row in rows:
        said = [message["content"] for message in row["messages"][:-1] if message["role"] != "system"]
        found.append(sentences(max((content.rpartition(INPUT_MARK)[2] for content in said), key=len))[:1])
    return [" ".join(first) for first in found]


def copied_prompt(rows: list[dict], train_rows: list[dict]) -> list[str]:
    return [row["messages"][-2]["content"] for row in rows]


BASELINES = {
    "most_frequent_answer": Baseline(
        "the most frequent answer of the training split to such a prompt", most_frequent_answer
    ),
    "first_sentence": Baseline("the first sentence of the text that the prompt is about", first_sentence),
    "copied_prompt": Baseline("the prompt itself", copied_prompt),
}
