"""Do two words rhyme? They do if they sound alike from the last stressed vowel on, and differ before it.

The pronunciations are those of the CMU Pronouncing Dictionary (Carnegie Mellon University, BSD licence, included in the
file). `pronunciations.txt.gz` has its 8,000 words that children's stories use. Any other word rhymes with nothing.
"""

import gzip
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "pronunciations.txt.gz"


@cache
def _pronunciations() -> dict[str, list[list[str]]]:
    """word → its pronunciations, each a list of ARPAbet phones; a vowel ends in its stress (0 none, 1 first, 2)."""
    found: dict[str, list[list[str]]] = {}
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                word, *phones = line.split()
                found.setdefault(word, []).append(phones)
    return found


def _endings(word: str) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each pronunciation of a lower-case word, the consonants before its last stressed vowel, and the rest."""
    found = set()
    for phones in _pronunciations().get(word, []):
        vowels = [at for at, phone in enumerate(phones) if phone[-1].isdigit()]
        at = max((at for at in vowels if phones[at][-1] != "0"), default=vowels[-1] if vowels else 0)
        onset = max((before + 1 for before in vowels if before < at), default=0)
        found.add((tuple(phones[onset:at]), tuple(phone.rstrip("012") for phone in phones[at:])))
    return found


def rhymes(one: str, other: str) -> bool:
    """Whether two words rhyme perfectly in some pronunciation; a word does not rhyme with itself.

    >>> rhymes("day", "away"), rhymes("day", "Day"), rhymes("home", "some")
    (True, False, False)
    """
    mine, theirs = (_endings(word.lower().replace("’", "'")) for word in (one, other))
    return any(rest == same and onset != other for onset, rest in mine for other, same in theirs)
