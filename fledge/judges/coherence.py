"""Is a story coherent? Judged offline, from counts of the training stories, in milliseconds per story.

The features of a story, and what each should detect:

- `surprise`, `unevenness`, `worst`, `odd`: bits per word under an n-gram model, their spread, the five most surprising
  words, and the number of very surprising ones; a verb that does not fit, a sentence out of place.
- `order`: whether sentences come where stories usually have their words, "one day" early and "learned" late.
- `fit`, `fresh`: whether the words of a sentence usually occur with those of its neighbours, and how many of them occur
  nowhere else in the story; a sentence of another story (the lexical cohesion of Foltz et al. 1998, by counts).
- `given`: "the dog" before any "a dog", for a thing that stories introduce with "a" (Barzilay and Lapata 2008, order).
- `late_names`, `names`, `lost_name`, `gender`, `switch`: characters who appear without introduction or vanish, and
  pronouns that fit nobody or change half-way.
- `repeated`, `same`, `twice`: repeated word 4-grams, a word twice in a sentence, a sentence twice.
- `short`, `long`, `words`: a story of fewer than 70 or more than 350 words, and its length.

A linear score of these features distinguishes stories from damaged ones (`corruption.py`; the idea of UNION, Guan and
Huang 2020, https://aclanthology.org/2020.emnlp-main.736). benchmarks/train_judges.py learns its weights; the usual
values come from the training stories of the run. Repetition gets an extra penalty, because readers mark it down and
models that are trained by rewards tend to it. The score does not understand a story: docs/evaluation.md says how well
it agrees with readers.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from fledge.errors import UserError
from fledge.judges.corruption import TESTED, Corrupter, names
from fledge.judges.ngrams import WordModel
from fledge.text import beings
from fledge.text.stories import QUOTED, sentences
from fledge.text.words import FUNCTION_WORDS

FEATURES = tuple(
    """surprise unevenness worst odd order fit fresh given names late_names lost_name gender switch repeated same twice
    short long words""".split()  # noqa: SIM905
)
REPETITION = {"repeated": 0.9, "same": 0.6}
TOLERATED = 0.5  # standard deviations above the usual
MOST_STORIES, CALIBRATION, PAIRS = 6000, 300, 100
SHORT, LONG, ODD = 70, 350, 9

MALE = frozenset(("he", "him", "his", "himself"))
FEMALE = frozenset(("she", "her", "hers", "herself"))
MEN = beings.MALE | {"mr", "sir"}
WOMEN = beings.FEMALE | {"mrs", "ms", "miss"}
# Function words of stories: they use more words than summaries that say little about the topic.
COMMON_WORDS = FUNCTION_WORDS - {"gets", "learn", "learns", "makes"} | frozenset(
    """any away back came come down go going here herself himself let like lot many much now oh said saw something soon
    thank these thing things those want wanted went why yes""".split()  # noqa: SIM905
)
INTRODUCED = re.compile(
    r"\b(the|a|an|his|her|their|some|my|this|that|your|our) (?:[a-z]+,? ){0,2}?([a-z]+)"
    r"(?=[,.!?;]|$| (?:and|was|were|is|in|on|to|with|that|for|at|had|of|from|but|so|who|named|went|said|saw|came)\b)"
)


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,!?]", text.lower().replace("’", "'"))


def content(text: str) -> list[str]:
    """The content words, without plain inflectional endings."""
    words = re.findall(r"[a-z]{3,}", text.lower().replace("’", "'").replace("'s", ""))
    return [re.sub(r"(?<=\w{3})(?:ies|ied|es|s|ed|ing|e|y)$", "", word) for word in words if word not in COMMON_WORDS]


class CoherenceJudge:
    """Learns the usual values of the features from stories, and ranks a story among stories that it did not learn from.

    `judge` returns the share of these stories that are less coherent: an average story of the training data has 0.5,
    one of the weakest twentieth has less than 0.05.

    Raises:
        UserError: there is no story to learn from.
    """

    def __init__(self, stories: list[str]):
        stories = stories[:MOST_STORIES]
        if not stories:
            raise UserError("The training split is empty, so no judge of coherence can learn what is usual in a story.")
        usual = stories[::4][:CALIBRATION]
        learned = [story for i, story in enumerate(stories) if i % 4 or i >= 4 * CALIBRATION] or usual
        self.words = WordModel([tokens(story) for story in learned])
        self._count_places(learned)
        self._count_company([set(content(story)) for story in learned])
        self._count_introductions(learned)
        self._count_genders(learned)
        weights = json.loads(Path(__file__).with_name("coherence.json").read_text(encoding="utf-8"))
        self.weights = np.array([weights[name] for name in FEATURES])
        found = self.features(usual)
        self.mean, self.spread = found.mean(axis=0), np.maximum(found.std(axis=0), 0.005)
        self.middle, self.width = 0.0, 1.0
        local = self._local(found)
        self.middle, self.width = float(np.median(local)), float(local.std()) or 1.0
        self.usual = np.sort(self.score(usual))

    def judge(self, stories: list[str]) -> np.ndarray:
        """(stories,), each between 0 and 1."""
        return np.searchsorted(self.usual, self.score(stories), side="right") / len(self.usual)

    def measure(self, stories: list[str]) -> dict[str, float]:
        """For each kind of damage, the share of stories that score higher than their damaged copies."""
        stories, rng = stories[:PAIRS], random.Random(0)
        corrupter, found = Corrupter(stories, rng), {}
        for kind in TESTED:
            pairs = [(story, getattr(corrupter, kind)(story)) for story in stories]
            pairs = [pair for pair in pairs if pair[1] is not None]
            if pairs:
                whole, broken = (self.score(list(side)) for side in zip(*pairs, strict=True))
                found[kind] = float(np.mean(whole > broken))
        return found

    def score(self, stories: list[str]) -> np.ndarray:
        """(stories,), without a scale: higher is more coherent. Features that are better than usual count little."""
        found = self.features(stories)
        local, scaled = self._local(found), self._scaled(found)
        excess = sum(
            weight * np.maximum(scaled[:, FEATURES.index(name)] - TOLERATED, 0) for name, weight in REPETITION.items()
        )
        return np.minimum(local, 0.5) + 0.05 * local - excess

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return np.clip((features - self.mean) / self.spread, -6, 6)

    def _local(self, features: np.ndarray) -> np.ndarray:
        return (self._scaled(features) @ self.weights - self.middle) / self.width

    def _count_places(self, stories: list[str]) -> None:
        """`place`: word → its mean position in stories, from -0.5 (the first sentence) to 0.5 (the last)."""
        sums: dict[str, list[float]] = {}
        for story in stories:
            parts = sentences(story)
            for place, part in zip(np.linspace(-0.5, 0.5, len(parts)), parts, strict=True):
                for word in set(tokens(part)):
                    of_word = sums.setdefault(word, [0.0, 0])
                    of_word[0] += place
                    of_word[1] += 1
        self.place = {word: total / (count + 5) for word, (total, count) in sums.items()}

    def _order(self, parts: list[str]) -> float:
        """The covariance of the positions of the sentences and the usual positions of their words."""
        if len(parts) < 2:
            return 0.0
        expected = [np.mean([self.place.get(word, 0.0) for word in tokens(part)] or [0.0]) for part in parts]
        return float(np.mean(np.linspace(-0.5, 0.5, len(parts)) * expected))

    def _count_company(self, stories: list[set[str]]) -> None:
        """`company` (words, words): the pointwise mutual information of two words in a story."""
        counts = Counter(word for story in stories for word in sorted(story))
        self.index = {word: i for i, (word, count) in enumerate(counts.most_common(2500)) if count >= 4}
        inside = np.zeros((len(stories), max(1, len(self.index))), dtype=np.float32)
        for i, story in enumerate(stories):
            inside[i, [self.index[word] for word in story if word in self.index]] = 1
        single = inside.sum(axis=0)
        self.company = np.log((inside.T @ inside + 1) / (np.outer(single, single) / len(stories) + 1))
        np.fill_diagonal(self.company, np.clip(np.log((len(stories) + 1) / (single + 1)), 0, 4))

    def _count_introductions(self, stories: list[str]) -> None:
        """`introduced`: noun → how often its first mention in a story has "a", and how often "the"."""
        self.introduced: dict[str, list[int]] = {}
        for story in stories:
            for noun, definite in first_mentions(story).items():
                self.introduced.setdefault(noun, [0, 0])[definite] += 1

    def _count_genders(self, stories: list[str]) -> None:
        """`genders`: name → how often the one character with a name is "he", and how often "she"."""
        self.genders: dict[str, list[int]] = {}
        for story in stories:
            found = list(names(story))
            if len(found) == 1:
                he, she = pronouns(story)
                if he > 2 * she or she > 2 * he:
                    self.genders.setdefault(found[0], [0, 0])[she > he] += 1

    def features(self, stories: list[str]) -> np.ndarray:
        """(stories, features)."""
        bits = self.words.surprise([tokens(story) for story in stories])
        rows = []
        for story, of_story in zip(stories, bits, strict=True):
            parts = sentences(story)
            each = [content(part) for part in parts]
            row = self._of_words(story, of_story, parts, each) | self._of_company(story, each) | self._of_people(story)
            rows.append(row)
        return np.array([[row[name] for name in FEATURES] for row in rows]).reshape(len(rows), len(FEATURES))

    def _of_words(self, story: str, bits: np.ndarray, parts: list[str], each: list[list[str]]) -> dict[str, float]:
        """The features of words; `each` are the content words of each sentence in `parts`."""
        words = tokens(story)
        runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        return {
            "surprise": bits.mean() if len(bits) else 0.0,
            "unevenness": bits.std() if len(bits) else 0.0,
            "worst": np.sort(bits)[-5:].mean() if len(bits) else 0.0,
            "odd": float(np.log1p((bits > ODD).sum())),
            "order": self._order(parts),
            "repeated": 1 - len(set(runs)) / max(1, len(runs)),
            "same": sum(len(found) - len(set(found)) for found in each) / max(1, len(parts)),
            "twice": 1 - len(set(parts)) / max(1, len(parts)),
            "short": max(0.0, np.log(SHORT / (len(words) + 1))),
            "long": max(0.0, np.log((len(words) + 1) / LONG)),
            "words": np.log(len(words) + 1),
        }

    def _of_company(self, story: str, each: list[list[str]]) -> dict[str, float]:
        counts = Counter(word for found in each for word in found)
        known = [[self.index[word] for word in dict.fromkeys(found) if word in self.index] for found in each]
        fits = []
        for i, own in enumerate(known):
            near = [word for other in (known[max(0, i - 2) : i] + known[i + 1 : i + 3]) for word in other]
            if len(own) > 1 and near:
                fits.append(self.company[np.ix_(own, near)].max(axis=1).mean())
        fresh = [np.mean([counts[word] == found.count(word) for word in set(found)]) for found in each if found]
        given = 0.0
        for noun, definite in first_mentions(story).items():
            if definite:
                indefinite, other = self.introduced.get(noun, (1, 0))
                given -= np.log((other + 0.5) / (indefinite + other + 1))
        return {
            "fit": float(np.mean(fits)) if fits else 0.0,
            "fresh": float(np.mean(fresh)) if fresh else 0.0,
            "given": given / max(1, len(each)),
        }

    def _of_people(self, story: str) -> dict[str, float]:
        found, middle = names(story), len(story) // 2
        first, second = story[:middle], story[middle:]
        main = max(found, key=lambda name: found[name]) if found else ""
        introduced = re.compile(r"(?:named|called|was|is) ([A-Z][a-z]+)")
        brought = set(introduced.findall(story))
        before, after = (np.array(pronouns(part)) + 1 for part in (first, second))
        return {
            "names": len(found),
            "late_names": sum(name not in first and name not in brought for name in found),
            "lost_name": float(bool(main) and main not in story[2 * len(story) // 3 :]),
            "gender": self._misfits(story, found),
            "switch": abs(before[0] / before.sum() - after[0] / after.sum()),
        }

    def _misfits(self, story: str, found: Counter[str]) -> int:
        """How many pronouns of the narration fit nobody in the story; 0 if a character's gender is unknown."""
        words = set(tokens(story))
        male, female = bool(words & MEN), bool(words & WOMEN)
        for name in found:
            he, she = self.genders.get(name, (0, 0))
            male, female = male or 3 * he >= she, female or 3 * she >= he
        he, she = pronouns(QUOTED.sub("", story))
        return (0 if male else he) + (0 if female else she)


def first_mentions(story: str) -> dict[str, bool]:
    """Noun → whether its first mention is definite ("the dog")."""
    found: dict[str, bool] = {}
    for match in INTRODUCED.finditer(story.lower()):
        found.setdefault(match[2], match[1] in ("the", "this", "that"))
    return found


def pronouns(text: str) -> tuple[int, int]:
    """How often "he" and "she" occur, in any grammatical case."""
    words = tokens(text)
    return sum(word in MALE for word in words), sum(word in FEMALE for word in words)
