"""Damaged copies of stories, from which the judge of coherence learns.

Shuffled sentences are the test of Barzilay and Lapata (2008, https://aclanthology.org/J08-1001); a sentence of another
story is the test of Li and Jurafsky (2017, https://aclanthology.org/D17-1019).
"""

import random
import re
from collections import Counter
from functools import lru_cache

from fledge.text.stories import NO_NAMES, sentences

NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")
TESTED = ("shuffled", "name", "foreign", "verb")
ALL = (*TESTED, "salad", "repeated", "cut", "endless")


class Corrupter:
    """Damages stories with names, verbs and sentences of other stories.

    Each method returns the damaged story, or `None` if it finds nothing to damage.
    """

    def __init__(self, stories: list[str], rng: random.Random):
        self.rng, self.stories = rng, stories
        self.names = sorted({name for story in stories for name in names(story)}) or ["Zed"]
        counts = Counter(word for story in stories for word in re.findall(r"[a-z]+", story))
        self.verbs: dict[str, list[str]] = {}
        self.weights: dict[str, list[int]] = {}
        for word, count in sorted(counts.items()):
            if form := verb_form(word):
                self.verbs.setdefault(form, []).append(word)
                self.weights.setdefault(form, []).append(count)

    def shuffled(self, story: str) -> str | None:
        parts = sentences(story)
        order = parts[:]
        for _ in range(5):
            self.rng.shuffle(order)
            if order != parts:
                return " ".join(order)
        return None

    def name(self, story: str) -> str | None:
        """From the middle of its mentions on, the most frequent name is replaced by another."""
        found = names(story)
        if not found:
            return None
        old = max(found, key=lambda name: found[name])
        places = [match.start() for match in re.finditer(rf"\b{old}\b", story)]
        if len(places) < 2:
            return None
        new, at = self.rng.choice(self.names), places[max(1, len(places) // 2)]
        return story[:at] + re.sub(rf"\b{old}\b", new, story[at:]) if new not in story else None

    def foreign(self, story: str) -> str | None:
        """One sentence, neither the first nor the last, is taken from another story."""
        parts, other = sentences(story), sentences(self.rng.choice(self.stories))
        if len(parts) < 3 or len(other) < 3:
            return None
        new = self.rng.choice(other[1:-1])
        parts[self.rng.randrange(1, len(parts) - 1)] = new
        return " ".join(parts) if new not in story else None

    def verb(self, story: str) -> str | None:
        """One verb is replaced by another in the same form, sampled by its frequency in stories."""
        places = [match for match in re.finditer(r"\b[a-z]+\b", story) if verb_form(match[0]) in self.verbs]
        if not places:
            return None
        match = self.rng.choice(places)
        form = verb_form(match[0]) or ""
        new = self.rng.choices(self.verbs[form], self.weights[form])[0]
        return story[: match.start()] + new + story[match.end() :] if new != match[0] else None

    def salad(self, story: str) -> str | None:
        """The words of one sentence are shuffled."""
        parts = sentences(story)
        at = self.rng.randrange(len(parts)) if parts else 0
        words = parts[at].split() if parts else []
        self.rng.shuffle(words)
        return " ".join([*parts[:at], " ".join(words), *parts[at + 1 :]]) if len(words) > 3 else None

    def repeated(self, story: str) -> str | None:
        """One of the last sentences is repeated two to six times."""
        parts = sentences(story)
        if len(parts) < 3:
            return None
        at = self.rng.randrange(len(parts) // 2, len(parts))
        return " ".join([*parts[: at + 1], *[parts[at]] * self.rng.randrange(2, 7), *parts[at + 1 :]])

    def cut(self, story: str) -> str | None:
        """The first one to three sentences alone."""
        parts = sentences(story)
        return " ".join(parts[: self.rng.randrange(1, 4)]) if len(parts) > 4 else None

    def endless(self, story: str) -> str | None:
        """Two stories in one."""
        other = self.rng.choice(self.stories)
        return f"{story} {other}" if story and other and other != story else None


def names(story: str) -> Counter[str]:
    return Counter(name for name in NAME.findall(story) if name not in NO_NAMES)


@lru_cache(maxsize=100_000)
def verb_form(word: str) -> str | None:
    """The form ("past" or "ing") of a word that can only be a verb; `None` for any other word."""
    from lemminflect import getAllLemmas, getInflection

    found = getAllLemmas(word)
    if "VERB" not in found or "NOUN" in found or "AUX" in found or word in found["VERB"]:
        return None
    lemma = found["VERB"][0]
    if word in getInflection(lemma, "VBG"):
        return "ing"
    return "past" if word in getInflection(lemma, "VBD") else None
