"""Does a text keep a constraint? Each check is a rule that returns a value in [0, 1], 1 only if the constraint is kept.

Case, spacing and the kind of quotation marks do not matter; line breaks matter only for a title. The kinds are those of
IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911), adapted to children's stories.
"""

import re
from functools import lru_cache

from fledge.text.rhymes import rhymes
from fledge.text.speakers import VERB, speakers
from fledge.text.spelling import straight
from fledge.text.words import FUNCTION_WORDS, in_order, lemmas, used

ENDS = re.compile(r"(?<!\bmr)(?<!\bmrs)(?<!\bms)(?<!\bdr)[.!?]+(?P<quote>\"?)(?= |$)")
SAYS_WHO = re.compile(rf" (?:[\w'-]+ ){{0,5}}?{VERB}\b")
TITLE_WORDS = 8  # at most
LEAST_WORDS = 3  # of a sentence that counts


@lru_cache(maxsize=256)  # several checks read one story
def parts(text: str) -> tuple[str, ...]:
    """The sentences of a text, in lower case. A quotation and its speech tag are one sentence.

    An ellipsis ends a sentence only at the end. `fledge.text.stories.sentences` needs capital letters; this does not.

    >>> parts("“Hi!” said Tom. He ran... fast")
    ('"hi!" said tom.', 'he ran... fast')
    """
    text = straight(text).lower()
    # Quotations keep their length but lose their sentence ends, except for one before the closing mark.
    flat = re.sub(r'"[^"]*"', lambda quote: re.sub(r'[.!?](?!"$)', ",", quote[0]), text)
    found, start = [], 0
    for end in ENDS.finditer(flat):
        is_pause = end[0].startswith("...")  # at the end of the text, what is left is the last sentence
        if is_pause or (end["quote"] and _goes_on(flat, start, end)):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return tuple(part for part in [*found, text[start:].strip()] if in_order(part))


def _goes_on(flat: str, start: int, end: re.Match) -> bool:
    """Whether the sentence continues after a quotation at its beginning: "Hi!" said Tom."""
    opening = flat.rfind('"', start, end.start())
    is_introduced = flat[start:opening].rstrip().endswith((",", ":"))
    return "." not in end[0] and not is_introduced and bool(SAYS_WHO.match(flat, end.end()))


def title_and_body(text: str) -> tuple[str | None, str]:
    """The title of a text (a short first line without a full stop) and the text below it; `None` if it has no title.

    >>> title_and_body("The Red Kite\\n\\nTom had a kite.")
    ('The Red Kite', 'Tom had a kite.')
    """
    first, _, rest = text.strip().partition("\n")
    title = straight(first).strip('"*#_ ')
    if not rest.strip() or not 1 <= len(in_order(title)) <= TITLE_WORDS or re.search(r"[.!?,;:]$", title):
        return None, text
    return title, rest.strip()


def is_titled(title: str, text: str) -> float:
    """Whether a text has this title or, if `title` is empty, any title that shares a word with the text below it."""
    found, body = title_and_body(text)
    if found is None:
        return 0.0
    if title:
        return float(in_order(title) == in_order(found))
    words = [word for word in in_order(found) if word not in FUNCTION_WORDS]
    return float(any(used(words, body)))


def used_in_telling(words: list[str], text: str) -> list[bool]:
    """For each of `words`, whether a sentence uses it in any inflection; a sentence made mostly of them does not count.

    >>> used_in_telling(["boat", "brave"], "Boat. Brave. The boats were white.")
    [True, False]
    """
    forms = frozenset().union(*(lemmas(word) for phrase in words for word in in_order(phrase)))
    telling = []
    for part in parts(text):
        of_part = in_order(part)
        if 2 * sum(not forms.isdisjoint(lemmas(word)) for word in of_part) <= len(of_part):
            telling.append(part)
    return used(words, " ".join(telling))


def uses(words: list[str], text: str) -> float:
    """The share of `words` that are used in telling."""
    found = used_in_telling(words, text)
    return sum(found) / len(found)


def uses_apart(words: list[str], text: str, prompt: str) -> float:
    """As `uses`, but lists of the words and copies of `prompt` count little.

    A sentence counts for at most two of the words, and for none if it has a word 4-gram of the prompt.
    """
    asked = set(_fourgrams(prompt))
    own = [part for part in parts(text) if asked.isdisjoint(_fourgrams(part))]
    telling = [part for part in own if any(used_in_telling(words, part))]
    found = [used_in_telling(words, part) for part in telling for _ in range(2)]
    word_of: dict[int, int] = {}  # a slot of a sentence → its word: a bipartite matching (Kuhn 1955)

    def is_placed(word: int, tried: set[int]) -> bool:
        for place, has in enumerate(found):
            if has[word] and place not in tried:
                tried.add(place)
                if place not in word_of or is_placed(word_of[place], tried):
                    word_of[place] = word
                    return True
        return False

    return sum(is_placed(word, set()) for word in range(len(words))) / len(words)


def _fourgrams(text: str) -> list[tuple[str, ...]]:
    words = in_order(text)
    return [tuple(words[at : at + 4]) for at in range(len(words) - 3)]


def avoids(word: str, text: str) -> float:
    """Whether no inflection of `word` occurs."""
    return float(bool(in_order(text)) and not any(used([word], text)))


def has_name(name: str, text: str) -> float:
    """Whether a sentence of three words or more has a name, of one word or several."""
    told = (in_order(part) for part in parts(text))
    return float(any(len(words) >= LEAST_WORDS and _has(words, in_order(name)) for words in told))


def _has(words: list[str], phrase: list[str]) -> bool:
    return any(words[at : at + len(phrase)] == phrase for at in range(len(words)))


def has_sentences(count: int, text: str) -> float:
    """1 for exactly `count` sentences; falls with the distance."""
    return _near(len(parts(text)), count)


def has_speakers(count: int, text: str) -> float:
    """1 for exactly `count` speakers; falls with the distance. 0 if it is not certain who speaks."""
    found = speakers(text)
    return _near(found, count) if found else 0.0


def _near(found: int, count: int) -> float:
    return max(0.0, 1 - abs(found - count) / count)


def begins(phrase: str, text: str) -> float:
    """The share of the words of `phrase` with which a text begins, counted up to the first that differs."""
    return _same(in_order(phrase), in_order(text))


def ends(phrase: str, text: str) -> float:
    """As `begins`, from the end backwards."""
    return _same(in_order(phrase)[::-1], in_order(text)[::-1])


def _same(wanted: list[str], words: list[str]) -> float:
    same = 0
    while same < min(len(wanted), len(words)) and wanted[same] == words[same]:
        same += 1
    return same / len(wanted)


def asks(is_wanted: bool, text: str) -> float:
    """Whether a text has a question (a word and a question mark), or none, as `is_wanted` says."""
    has_question = bool(re.search(r"\w[^\w?.!]*\?", text))
    return float(has_question == is_wanted and bool(in_order(text)))


def quotes(is_wanted: bool, text: str) -> float:
    """Whether a text has dialogue (a quotation and a verb of speech), or no quotation, as `is_wanted` says."""
    text = straight(text).lower()
    if not is_wanted:
        return float('"' not in text and bool(in_order(text)))
    narration = re.sub(r'"[^"]*"', lambda quote: quote[0] if not in_order(quote[0]) else "", text)
    return float(narration != text and bool(re.search(rf"\b{VERB}\b", narration)))


def is_at_most(count: int, text: str) -> float:
    """1 for a text of 1 to `count` words; falls with the excess."""
    found = len(in_order(text))
    return min(1.0, count / found) if found else 0.0


def is_at_least(count: int, text: str) -> float:
    """1 for a text of at least `count` words; falls with the shortage."""
    return min(1.0, len(in_order(text)) / count)


def ends_in_rhyme(text: str) -> float:
    """Whether the last words of the last two lines rhyme; a line ends where a sentence or a line of the text does."""
    lines = [in_order(part) for line in text.splitlines() for part in parts(line)]
    return float(len(lines) > 1 and rhymes(lines[-2][-1], lines[-1][-1]))


def tells(text: str, prompt: str, least: int = 3) -> bool:
    """Whether a text has the form of a story: it is not a list, a copy or a repetition.

    It has at least `least` different sentences of three words or more; more than half of its sentences are such; it
    does not contain the first line of `prompt`; and less than half of its word 4-grams are from `prompt`.
    """
    told = parts(text)
    whole = [part for part in told if len(in_order(part)) >= LEAST_WORDS]
    if len(set(whole)) < least or 2 * len(set(whole)) <= len(told):
        return False
    opening = in_order(prompt.strip().partition("\n")[0])
    copied = bool(opening) and _has(in_order(text), opening)
    fourgrams, known = _fourgrams(text), set(_fourgrams(prompt))
    return not copied and 2 * sum(fourgram in known for fourgram in fourgrams) < len(fourgrams)
