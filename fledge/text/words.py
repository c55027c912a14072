"""Whether a text uses a word. Inflections count (run, runs, ran, running), derivations do not (runner).

Two words are inflections of one word if they share a lemma in LemmInflect's lexicon, which is made from the NIH's
SPECIALIST lexicon (https://github.com/bjascob/LemmInflect). "A run" and "to run" are one word here.

This module also splits texts into words. The learned judges have their own splitters, with which their weights were
trained (`endings.py`, `coherence.py` and `corruption.py` in `fledge/judges/`); `judges/topic.py` also reads
punctuation, to find noun phrases.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

FUNCTION_WORDS = frozenset(
    """a about after all also an and are as at be because been before being but by can could day did do does each
    every for from get gets got had has have he her hers him his how i if in into is it its just learn learns
    little made make makes me more my named no not of off old on once one only or other our out over she so some
    than that the their them then there they this time to too two up upon us very was we were what when where
    which while who will with would you your""".split()  # noqa: SIM905
)
SUPPLETIVE = {"people": "person"}  # two words in the lexicon, one in stories


@lru_cache(maxsize=100_000)
def lemmas(word: str) -> frozenset[str]:
    """The possible lemmas of a lower-case word, and the word itself."""
    from lemminflect import getAllLemmas

    found = {lemma for forms in getAllLemmas(word).values() for lemma in forms}
    return frozenset({word, SUPPLETIVE.get(word, word)} | found)


def as_written(text: str) -> list[str]:
    """Lower-case words of a text in order, split at hyphens.

    >>> as_written("The ice-cream man's van")
    ['the', 'ice', 'cream', "man's", 'van']
    """
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))


def in_order(text: str) -> list[str]:
    """Lower-case words of a text in order, split at hyphens and without the possessive 's.

    >>> in_order("The ice-cream man's van")
    ['the', 'ice', 'cream', 'man', 'van']
    """
    return re.findall(r"[^\W_]+(?:'(?!s\b)[^\W_]+)*", re.sub(r"'s\b", "", text.lower().replace("’", "'")))


def used(requested: Sequence[str], text: str) -> list[bool]:
    """For each requested word, or phrase of several words, whether `text` uses it in any inflection."""
    words = [lemmas(word) for word in in_order(text)]
    known, found = frozenset().union(*words), []
    for phrase in requested:
        wanted = [lemmas(word) for word in in_order(phrase)]
        if len(wanted) == 1:
            found.append(not known.isdisjoint(wanted[0]))
            continue
        places = range(len(words) - len(wanted) + 1)
        found.append(bool(wanted) and any(all(w & words[at + i] for i, w in enumerate(wanted)) for at in places))
    return found


def content_words(text: str) -> set[str]:
    """Lower-case content words, without plain plural and past endings."""
    words = (word for word in in_order(text) if word not in FUNCTION_WORDS)
    return {re.sub(r"(?<=\w{3})(es|s|ed|ing|e)$", "", word) for word in words}


def is_run(words: str, text: str) -> bool:
    """Whether `words` occur consecutively in `text`; case, punctuation and possessives do not matter.

    >>> is_run("The cat sat.", "Then the cat sat down.")
    True
    """
    return f" {' '.join(in_order(words))} " in f" {' '.join(in_order(text))} "
