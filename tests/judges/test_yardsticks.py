import json
import re
import sys
from hashlib import sha256
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from conftest import ROOT
from judges import kappa

from fledge.judges import AGAINST_READERS
from fledge.judges.endings import EndingJudge
from fledge.judges.sentiment import SentimentJudge
from fledge.judges.topic import judge_topic
from fledge.sources import load_source


def test_kappa_is_agreement_beyond_chance():
    """Cohen's own form: 0.75 observed, 0.5 by chance."""
    assert kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"]) == pytest.approx(0.5)


def test_every_story_has_two_readers_and_an_agreed_label(yardsticks):
    for row in yardsticks:
        labels = [[reader[name] for reader in row["readers"]] for name in ("ending", "topic", "coherence")]
        assert len(row["readers"]) == (2 if all(len(set(of[:2])) == 1 for of in labels) else 3)
        for name, of in zip(("ending", "topic", "coherence"), labels, strict=True):
            assert of.count(row["agreed"][name]) >= 2


@pytest.mark.parametrize(("name", "value"), [("ending", 0.973), ("topic", 0.931), ("coherence", 0.832)])
def test_the_readers_agreement_is_what_the_docs_say(yardsticks, name, value):
    one, other = ([row["readers"][i][name] for row in yardsticks] for i in (0, 1))

    assert kappa(one, other) == pytest.approx(value, abs=0.0005)


def labels_of_two_endings() -> list[tuple[str, list[str]]]:
    """The label of each record of examples/two_endings.txt.gz that was read, and what its two readers say."""
    records = load_source("tinystories_instruct").records(str(ROOT / "examples" / "two_endings.txt.gz"))
    labels = {
        sha256(record["Story"].encode()).hexdigest()[:16]: "sad" if "BadEnding" in record["Features"] else "happy"
        for record in records
        if "Features" in record
    }
    read = (ROOT / "tests" / "judges" / "two_endings_read.jsonl").read_text(encoding="utf-8").splitlines()
    return [(labels.get(row["story"], "happy"), row["endings"]) for row in map(json.loads, read)]


def test_the_labels_of_two_endings_are_right_by_two_readers():
    labels = labels_of_two_endings()
    assert len(labels) == 187
    assert {label for label, _ in labels} == {"happy", "sad"}
    assert sum(found == [label, label] for label, found in labels) / len(labels) >= 0.97
    assert kappa(*([found[i] for _, found in labels] for i in (0, 1))) >= 0.98


def test_what_reports_say_of_the_judges_is_what_the_readings_show(yardsticks):
    def share(right: list[bool]) -> str:
        return f"{sum(right) / len(right):.1%}"

    stories, said = [row["story"] for row in yardsticks], [row["agreed"]["ending"] for row in yardsticks]
    shown = []
    for judge in (EndingJudge(), SentimentJudge()):
        judged = list(zip(judge.judge(stories), said, strict=True))
        shown += [share([found == label for found, label in judged if label == of]) for of in ("happy", "sad")]
    told = [(judge_topic(row["topic"], row["story"]).label == "about", row["agreed"]["topic"]) for row in yardsticks]
    shown.append(share([found for found, label in told if label == "about"]))
    shown.append(share([not found for found, label in told if label != "about"]))
    rules = [(row["rule"], row["agreed"]["ending"]) for row in yardsticks if "rule" in row]
    shown += [share([label == rule for rule, label in rules if rule == of]) for of in ("happy", "sad")]
    labels = labels_of_two_endings()
    shown += [share([found == [of, of] for label, found in labels if label == of]) for of in ("happy", "sad")]

    assert re.findall(r"[\d.]+%", " ".join(AGAINST_READERS)) == shown
