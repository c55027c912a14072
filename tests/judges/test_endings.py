import numpy as np
import pytest

from fledge.judges.endings import EndingJudge, balanced_accuracy, grams, last_sentences
from fledge.judges.sentiment import SentimentJudge

HAPPY = [
    "Tom lost his kite. He looked for it all day. Then his dad found it in a tree. Tom hugged him and they laughed.",
    "Sue was alone. A girl sat down beside her. They shared an apple and played. Now Sue has a friend.",
    "The bear was hungry. The fox gave him some honey. The bear thanked him. They danced and had fun all night.",
]
SAD = [
    "Tom had a kite. The wind took it away. He ran after it, but it flew too far. Tom cried and never saw it again.",
    "Sue had a puppy. One day it ran into the road. A car hit it. Sue was very sad and missed it every day.",
    "The bear broke the jar. The fox was angry with him. He left. The bear was lonely and wished he had not.",
]


@pytest.mark.parametrize("judge", [EndingJudge(), SentimentJudge()])
def test_endings_that_no_formula_made_are_told_apart(judge):
    assert judge.judge(HAPPY + SAD) == ["happy"] * 3 + ["sad"] * 3


@pytest.mark.parametrize("judge", [EndingJudge(), SentimentJudge()])
def test_only_the_last_sentences_count(judge):
    long = f"{SAD[0]} But then a bird brought it back. Tom was so happy. He thanked the bird. They played all day."

    assert judge.judge([long, f"{long} The end."]) == ["happy", "happy"]


def test_the_end_is_no_sentence_of_the_ending():
    assert last_sentences("A. B. C. D. E. The end.") == "B. C. D. E."
    assert grams("A. It was late. The End!") == ["it", "was", "late", "it was", "was late"]


@pytest.mark.parametrize("judge", [EndingJudge(), SentimentJudge()])
def test_an_empty_answer_has_an_ending_too(judge):
    assert len(judge.judge(["", "The end."])) == 2


def test_accuracy_is_the_mean_of_the_recalls():
    """7 of 8 happy and 1 of 2 sad stories are recognised: (7/8 + 1/2) / 2, not 8/10."""
    judged = ["happy"] * 7 + ["sad"] + ["sad", "happy"]

    assert balanced_accuracy(judged, ["happy"] * 8 + ["sad"] * 2) == pytest.approx(0.6875)
    assert balanced_accuracy(["happy", "sad"], ["sad", "sad"]) == 0.5


def test_the_judge_reports_how_far_it_agrees_with_labels():
    """One of four stories carries the wrong label; the judge is sure of all four."""
    judge = EndingJudge({"": [1.0, 0.0], "cried": [1.0, 3.0], "smiled": [1.0, -3.0]})
    stories, endings = ["Ann smiled.", "Tom smiled.", "Ann cried.", "Tom cried."], ["happy", "happy", "sad", "happy"]
    low, high = judge.sadness(["Ann smiled.", "Ann cried."])
    measured = judge.measure(stories, endings)

    assert (low, high) == pytest.approx((0.0474, 0.9526), abs=1e-4)
    assert measured["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["n"] == 4
    assert measured["brier"] == pytest.approx((low**2 * 2 + (1 - high) ** 2 + high**2) / 4)
    assert [(part["n"], part["was_sad"]) for part in measured["calibration"]] == [(2, 0), (2, 0.5)]
    assert measured["calibration"][0]["said_sad"] == pytest.approx(low)
    assert measured["errors"] == [{"ends": "Tom cried.", "label": "happy", "said_sad": pytest.approx(high)}]


def test_the_probability_is_that_of_weighed_words_of_one_length():
    """Two words of weight 3 are sqrt(2) times as sure as one: the vector of a story's words has length one."""
    judge = EndingJudge({"": [1.0, 0.5], "cried": [2.0, 3.0], "alone": [2.0, 3.0], "sat": [1.0, -0.4]})
    stories = ["Tom cried.", "Tom cried alone.", "Tom cried, cried.", "Tom sat.", "Tom ran."]
    logits = np.array([3.5, 3 * 2**0.5 + 0.5, 3.5, 0.1, 0.5])
    assert judge.sadness(stories) == pytest.approx(1 / (1 + np.exp(-logits)))
    wrong = judge.measure(["Tom sat.", "Tom ran."], ["happy", "sad"])["errors"]  # 52% is sad already
    assert [error["ends"] for error in wrong] == ["Tom sat."]


@pytest.mark.parametrize("judge", [EndingJudge(), SentimentJudge()])
def test_both_judges_agree_with_readers(judge, yardsticks):
    """Measured: 91.5% and 91.0% of 400, and of either decided ending at least 95%."""
    judged = judge.judge([row["story"] for row in yardsticks])
    said = [row["agreed"]["ending"] for row in yardsticks]
    right = [found == label for found, label in zip(judged, said, strict=True)]
    decided = [found for found, label in zip(right, said, strict=True) if label != "neither"]

    assert sum(right) / len(right) > 0.9
    assert sum(decided) / len(decided) > 0.95
