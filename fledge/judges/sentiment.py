"""The second judge of endings, of another kind: the valence of the last sentences in VADER's lexicon.

VADER (Hutto and Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550) has a valence for 7,500 words,
rated by people, and rules for negation, degree and "but". It was not trained on stories, so phrases that fool the first
judge do not fool this one.
"""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fledge.judges.endings import last_sentences
from fledge.text.stories import sentences

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

HAPPY_FROM = 0.1  # threshold of the valence from -1 to 1: stories for children are cheerful on the whole


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


class SentimentJudge:
    def valence(self, stories: list[str]) -> np.ndarray:
        """(stories,), from -1 (sad) to 1 (happy): the mean over the last sentences, later ones weighted more."""
        found = []
        for story in stories:
            values = [_analyzer().polarity_scores(part)["compound"] for part in sentences(last_sentences(story))]
            weights = range(1, len(values) + 1)
            found.append(np.average(values, weights=weights) if values else 0.0)
        return np.array(found)

    def judge(self, stories: list[str]) -> list[str]:
        """(stories,), "happy" or "sad"."""
        return ["happy" if valence >= HAPPY_FROM else "sad" for valence in self.valence(stories)]
