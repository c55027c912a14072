"""Does a story end happily or sadly? The first of two judges of different kinds: a text seldom fools both.

`EndingJudge` is a linear model of the words and word pairs of the last four sentences. It does not learn from the
labels of the run that it judges: a rule made those, and the judge would only learn the rule. benchmarks/train_judges.py
trains its weights, first on the shipped tales, then on real stories for whose ending it agrees with the second judge
(co-training, Blum and Mitchell 1998, https://doi.org/10.1145/279943.279962). One half of these stories trains the judge
that evaluates (`endings.json`), the other half the one that rewards (`rewarding.json`).
"""

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from fledge.text.stories import CLOSED, sentences

LAST = 4
ERRORS_SHOWN = 5


@cache
def _weights(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def last_sentences(story: str) -> str:
    """The last four sentences, not counting "The end."

    >>> last_sentences("A. B. C. D. E. The end.")
    'B. C. D. E.'
    """
    told = [part for part in sentences(story) if not CLOSED.fullmatch(part)]
    return " ".join(told[-LAST:])


def grams(story: str) -> list[str]:
    """The words and word pairs of the last sentences, in lower case."""
    words = re.findall(r"\w\w+", last_sentences(story).lower().replace("’", "'"))
    return words + [f"{one} {two}" for one, two in pairwise(words)]


class EndingJudge:
    """Classifies endings as happy or sad.

    `weights` maps a word or word pair to its inverse document frequency and its weight, and "" to the intercept.
    """

    def __init__(self, weights: dict[str, list[float]] | None = None):
        self.weights = _weights("endings.json") if weights is None else weights

    @classmethod
    def that_rewards(cls) -> "EndingJudge":
        """The judge for rewards, which was trained on other stories than the one that evaluates."""
        return cls(_weights("rewarding.json"))

    def sadness(self, stories: list[str]) -> np.ndarray:
        """(stories,), the probability that each of them ends sadly."""
        logits = []
        for story in stories:
            counts = Counter(gram for gram in grams(story) if gram in self.weights)
            values = {gram: (1 + np.log(count)) * self.weights[gram][0] for gram, count in counts.items()}
            norm = np.sqrt(sum(value**2 for value in values.values())) or 1.0
            weighed = sum(value * self.weights[gram][1] for gram, value in values.items())
            logits.append(self.weights[""][1] + weighed / norm)
        return 1 / (1 + np.exp(-np.array(logits)))

    def judge(self, stories: list[str]) -> list[str]:
        """(stories,), "happy" or "sad"."""
        return ["sad" if sadness > 0.5 else "happy" for sadness in self.sadness(stories)]

    def measure(self, stories: list[str], endings: list[str]) -> dict:
        """How well the judge agrees with the labels of stories: accuracy, calibration, and its most confident errors.

        `brier` is the mean squared error of its probabilities (Brier 1950; a constant 0.5 has 0.25). `calibration` has
        a bin for each fifth of the probability of a sad ending that occurs: the mean prediction, and the share of sad
        labels.
        """
        sadness, is_sad = self.sadness(stories), np.array([ending == "sad" for ending in endings])
        bins = np.minimum((sadness * 5).astype(int), 4)
        worst = np.argsort(-np.abs(sadness - is_sad), kind="stable")[:ERRORS_SHOWN]
        return {
            "accuracy": balanced_accuracy(self.judge(stories), endings),
            "n": len(stories),
            "brier": float(np.mean((sadness - is_sad) ** 2)),
            "calibration": [
                {
                    "said_sad": float(sadness[bins == number].mean()),
                    "was_sad": float(is_sad[bins == number].mean()),
                    "n": int((bins == number).sum()),
                }
                for number in sorted(set(bins.tolist()))
            ],
            "errors": [
                {"ends": last_sentences(stories[i]), "label": endings[i], "said_sad": float(sadness[i])}
                for i in worst.tolist()
                if (sadness[i] > 0.5) != is_sad[i]
            ],
        }


def balanced_accuracy(judged: list[str], endings: list[str]) -> float:
    """Mean of the accuracies on either ending (0.5 is chance, however rare one of them is)."""
    recalls = []
    for label in sorted(set(endings)):
        of_label = [found for found, ending in zip(judged, endings, strict=True) if ending == label]
        recalls.append(sum(found == label for found in of_label) / len(of_label))
    return sum(recalls) / len(recalls) if recalls else 0.0
