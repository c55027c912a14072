"""Do two words rhyme? They do if they sound alike from the last stressed vowel on, and differ before it.

The pronunciations are those of the CMU Pronouncing Dictionary (Carnegie Mellon University, BSD licence, included in the
file). `pronunciations.txt.gz` has its 8,000 words that children's stories use. Any other word rhymes with nothing.
"""

import gzip
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "pronunciations.txt.gz"
COUPLETS = {
    "happy": (
        "The sun went down at the end of the day. Tomorrow they would come out to play.",
        "The moon came up and the stars were bright. They all slept well on that happy night.",
        "The wind was soft and the sky was blue. It was a day when a wish came true.",
        "So that was the end of a day full of fun. They laughed and they danced in the light of the sun.",
        "They ate some cake and they drank some tea. They were as happy as happy can be.",
        "The birds sang a song in the top of the tree. It was a good day for you and for me.",
        "The rain had stopped and the grass was green. It was the best day they had ever seen.",
        "They went back home and they got into bed. What a good day it had been, they said.",
    ),
    "sad": (
        "The rain came down and the wind was cold. That is how the sad story is told.",
        "The sky was dark and the wind blew strong. It was too late, for so much went wrong.",
        "The sun went down and the light was gone. The long cold night went on and on.",
        "There was no song and there was no light. It was a sad and a quiet night.",
        "The house was still and the day was done. There was no more laughter and no more fun.",
        "Nobody came and nobody knew. The night was long and the cold wind blew.",
        "The stars were far and the moon was small. There was nothing left to say at all.",
        "The game was over, they could not stay. That was the end of a very sad day.",
    ),
}
"""Two lines that rhyme, to close a story that ends happily or sadly."""


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
