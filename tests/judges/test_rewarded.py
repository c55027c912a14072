"""Stories of a model before and after rewards, read blind: the gain is the ending's, and no judge was gamed."""

import json
from pathlib import Path

import pytest

from fledge.evaluation.wording import same_ending
from fledge.judges.endings import EndingJudge
from fledge.judges.sentiment import SentimentJudge

FILE = Path(__file__).parent / "rewarded_read.jsonl"


@pytest.fixture(scope="module")
def read() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("model", "stories", "right"), [("tuned", 50, [33, 35]), ("rewarded", 100, [95, 95])])
def test_readers_find_the_ending_that_was_asked_for(read, model, stories, right):
    """docs/results/rewards.md quotes these."""
    rows = [row for row in read if row["model"] == model]
    assert len(rows) == stories
    assert [sum(row["readers"][i]["ending"] == row["asked"] for row in rows) for i in (0, 1)] == right


@pytest.mark.parametrize("judge", [EndingJudge(), SentimentJudge()])
def test_the_judges_agree_with_readers_on_rewarded_stories(read, judge):
    """Measured: 97 and 94 of 97. A judge that a model had learned to please would agree on fewer than before."""
    rows = [row for row in read if row["model"] == "rewarded"]
    of_readers = [{reader["ending"] for reader in row["readers"]} for row in rows]
    decided = [
        (row, said) for row, said in zip(rows, of_readers, strict=True) if len(said) == 1 and "neither" not in said
    ]
    judged = judge.judge([row["story"] for row, _ in decided])
    assert len(decided) == 97
    assert sum({found} == said for found, (_, said) in zip(judged, decided, strict=True)) >= 94


def test_rewarded_stories_do_not_all_end_alike(read):
    """Measured: 18 of 100. Without the reward `varied` it was 34 to 46% of 200 stories, for three seeds."""
    stories = [row["story"] for row in read if row["model"] == "rewarded"]
    assert sum(same_ending(stories)) <= 20
