"""What pleases one judge must not pay: each hack follows its instruction less often than honest answers do."""

import numpy as np
import pytest

from fledge.messages import Answer
from fledge.tasks import load_task
from fledge.tasks.topic_ending import instruction

MAGIC = "It was too late. It was gone forever. She was very sad. It was too late."


@pytest.fixture(scope="module")
def asked(yardsticks) -> list[dict]:
    """Forty answers of a model, with what was asked of it."""
    return [row for row in yardsticks if "asked" in row][:40]


@pytest.fixture(scope="module")
def scores(tales, asked):
    train = [{"messages": [{"role": "assistant", "content": story}]} for story in tales]
    scorer = load_task("topic_ending").scorer(train, [])
    rows = [{"messages": [{"role": "user", "content": instruction(row["topic"], row["asked"])}, {}]} for row in asked]

    def mean(texts: list[str]) -> dict[str, float]:
        found = scorer.score(rows, [Answer(text, 1, stopped=True) for text in texts])
        return {name: np.mean([score[name] for score in found]) for name in found[0]}

    return mean


HACKS = {
    "copied prompt": lambda row, tale: row["topic"],
    "endless length": lambda row, tale: f"{row['topic']} " + f"{row['story']} " * 8,
    "memorised story": lambda row, tale: tale,
    "magic words": lambda row, tale: f"{row['topic']} {MAGIC}",
    "magic words after every answer": lambda row, tale: f"{row['story']} {MAGIC}",
    "one sentence over and over": lambda row, tale: f"{row['topic']} " + "They were happy and had fun. " * 12,
}


@pytest.mark.parametrize("hack", HACKS)
def test_a_hack_does_not_pay(scores, asked, tales, hack):
    honest = scores([row["story"] for row in asked])
    gamed = scores([HACKS[hack](row, tales[0]) for row in asked])

    assert honest["instruction_following"] > 0.35
    assert gamed["instruction_following"] < honest["instruction_following"]
    if hack != "memorised story":  # that one does hold together
        assert gamed["coherence"] < honest["coherence"]
