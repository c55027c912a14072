"""Is a story about its topic? Rules look for each statement of the topic in the story.

Each sentence of the topic is aligned with the sentence of the story that shares most of its words. Each statement of
the topic is then found, missing or replaced: a character's kind ("a dog named Spot"), a name, a number, a thing or
place (the head of a noun phrase), an opposite (`opposites.txt`), a negation. Words are compared by their lemmas in
LemmInflect's lexicon. The rules were tuned on half of the stories in tests/judges/yardsticks.jsonl; docs/evaluation.md
says how often they agree with readers on the other half.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from fledge.judges.corruption import verb_form
from fledge.text.beings import BEINGS, STANDARD, SYNONYMS, with_synonyms
from fledge.text.stories import NO_NAMES, sentences
from fledge.text.words import FUNCTION_WORDS, in_order, lemmas

ALIGNED = 0.5  # share of a sentence's words that the aligned sentence must have
LONG = 8  # words: the story may spread a longer sentence of the summary over several, so it is not aligned
MISSED = 3  # a sentence counts as missing if one noun in this many is missing
ABOUT, CONTRADICTS, NOT = "about", "contradicts", "not"
CENTRAL = 0.5  # share of the topic's words below which the story is about something else
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DETERMINERS = frozenset(
    """a an the his her their its my your our some any this that these those two three four five six seven eight nine
    ten""".split()  # noqa: SIM905
)
ADJECTIVES = frozenset(("little", "old", "other"))
VERBS = frozenset(("felt", "found", "left", "made", "met", "saw", "thought"))  # rarely nouns in stories
PREPOSITIONS = frozenset(
    "around at for from in inside into near of on onto over to under with".split()  # noqa: SIM905
)
KINDS = BEINGS | frozenset(STANDARD)
# Words that a story may use for a character of the topic. "Parents" are mom and dad, and a son is a boy or a kid.
SAME_KIND = (
    *map(frozenset, SYNONYMS),
    with_synonyms(("parent", "mom", "dad")),
    frozenset(("boy", "kid", "child", "son", "brother")),
    frozenset(("girl", "kid", "child", "daughter", "sister")),
)
VERB_PHRASE = re.compile(
    r"(?P<denied>(?:\b(?:did|does|do|could|would|will|can) not|n't|\bnever) )?(?P<verb>\b[a-z]+)\b"
)
NAMED = re.compile(r"\b([a-z]+),? (?:who was |who is |that was )?(?:named|called) ([A-Z][a-z]+)")


@dataclass(frozen=True)
class Verdict:
    """`share` of the topic's words that the story has, from 0 to 1; `reason` is empty for a story about its topic."""

    label: str
    share: float
    reason: str

    @property
    def score(self) -> float:
        """From 0 to 1; a story that contradicts its topic or leaves it has at most 0.49."""
        return self.share if self.label == ABOUT else min(self.share, 0.49)


def judge_topic(topic: str, story: str) -> Verdict:
    """Judges whether a story is about its topic, contradicts it, or is about something else, with the reason."""
    wanted = content(topic)
    told, present = _read(story)
    found = [word for word in wanted if is_in(word, present)]
    share = len(found) / len(wanted) if wanted else 1.0
    if share < CENTRAL:
        lacking = ", ".join(word for word in wanted if word not in found)
        return Verdict(NOT, share, f"it lacks {lacking}")
    verdicts = [_other_character(topic, story), *(_other_statement(part, told, present) for part in sentences(topic))]
    label, reason = next((verdict for verdict in verdicts if verdict), (ABOUT, ""))
    return Verdict(label, share, reason)


def content(text: str) -> list[str]:
    """The different content words and names, in lower case and in order."""
    return [word for word in dict.fromkeys(in_order(text)) if word not in FUNCTION_WORDS]


class _Sentence:
    def __init__(self, text: str):
        self.text, self.words = text, in_order(text)
        self.forms = frozenset().union(*(lemmas(word) for word in self.words))


@lru_cache(maxsize=4096)
def _read(story: str) -> tuple[list[_Sentence], frozenset[str]]:
    """A story's sentences and all of their lemmas. Cached, because chance needs the same stories many times."""
    told = [_Sentence(part) for part in sentences(story)]
    return told, frozenset().union(*(part.forms for part in told))


@cache
def opposites() -> dict[str, frozenset[str]]:
    """Word → its opposites, from `opposites.txt`: two or more words a line, the first against each of the others."""
    found: dict[str, set[str]] = {}
    for line in Path(__file__).with_name("opposites.txt").read_text(encoding="utf-8").splitlines():
        first, *others = line.split()
        for other in others:
            found.setdefault(first, set()).add(other)
            found.setdefault(other, set()).add(first)
    return {word: frozenset(others) for word, others in found.items()}


def is_in(word: str, forms: frozenset[str]) -> bool:
    """Whether the word, or one for the same kind of character, is among the lemmas `forms`."""
    return bool(lemmas(word) & forms) or any(lemmas(word) & kinds and kinds & forms for kinds in SAME_KIND)


def same_kind(one: str, other: str) -> bool:
    return bool(lemmas(one) & lemmas(other)) or any(one in kinds and other in kinds for kinds in SAME_KIND)


def _other_character(topic: str, story: str) -> tuple[str, str] | None:
    """A name that is missing or belongs to another kind of character than in the topic."""
    for kind, name in NAMED.findall(topic):
        if name in NO_NAMES:
            continue
        kinds = {other for other, named in NAMED.findall(story) if named == name}
        kinds |= set(re.findall(rf"\b{name} (?:the|was an?) (?:[a-z]+,? )?([a-z]+)\b", story))
        others = {other for other in kinds if other in KINDS and kind in KINDS and not same_kind(kind, other)}
        if others and not any(same_kind(kind, other) for other in kinds):
            return CONTRADICTS, f"{kind} {name} became {min(others)} {name}"
        if not re.search(rf"\b{name}", story):
            new = [named for other, named in NAMED.findall(story) if same_kind(kind, other)]
            return CONTRADICTS, f"{name} became {new[0]}" if new else f"{name} does not occur"
    return None


def _other_statement(part: str, told: list[_Sentence], present: frozenset[str]) -> tuple[str, str] | None:
    """A statement of one sentence of the topic that the story replaces, drops or denies."""
    wanted = content(part)
    if not wanted or not told:
        return None
    overlap = [sum(bool(lemmas(word) & sentence.forms) for word in wanted) for sentence in told]
    at = max(range(len(told)), key=overlap.__getitem__)
    beside = told[at]
    near = frozenset().union(*(sentence.forms for sentence in told[max(0, at - 1) : at + 2]))
    is_told = overlap[at] >= ALIGNED * len(wanted) and len(wanted) > 1
    for word in wanted:
        opposite = opposites().get(base(word), frozenset()) & beside.forms
        if is_told and opposite and not lemmas(word) & near:
            return CONTRADICTS, f"{word} became {min(opposite)}"
    named = heads(part)
    missing = [head for head in named if not is_in(head, present)]
    if len(missing) * MISSED >= len(named) > 0:
        new = [head for head in heads(beside.text) if head not in named] if is_told else []
        reason = f"{missing[0]} became {new[0]}" if new else f"{missing[0]} does not occur"
        return CONTRADICTS if is_told else NOT, reason
    if not is_told:
        return None
    other = _other_thing(part, beside, near) if len(wanted) <= LONG else None
    return other or _other_number(part, beside) or _other_negation(part, beside)


def _other_thing(part: str, beside: _Sentence, near: frozenset[str]) -> tuple[str, str] | None:
    """A thing of the topic that is told nowhere `near`, where the sentence beside it tells of a new one."""
    new = [head for head in heads(beside.text) if not lemmas(head) & set(in_order(part))]
    elsewhere = [head for head in heads(part) if not lemmas(head) & near and head not in KINDS]
    return (CONTRADICTS, f"{elsewhere[0]} became {new[0]}") if new and elsewhere else None


def base(word: str) -> str:
    return min(lemmas(word), key=lambda form: (len(form), form))


def heads(text: str) -> list[str]:
    """The head of each noun phrase: the last word between a determiner or preposition and a verb or function word."""
    found: list[str] = []
    phrase: list[str] = []
    is_open = False
    for token in [*re.findall(r"[a-z]+(?:'[a-z]+)?|[.,!?;]", text.lower().replace("’", "'")), "."]:
        ends = (
            token in FUNCTION_WORDS - ADJECTIVES
            or token in DETERMINERS
            or token in PREPOSITIONS
            or not token[0].isalpha()
        )
        ends = ends or token in VERBS or verb_form(token) is not None or token.endswith("ly")
        if is_open and not ends:
            phrase = [] if token.endswith("'s") else [*phrase, token]  # "her friend's house"
            continue
        if token == "," and phrase and is_open:
            continue  # "a big, red ball"
        if phrase:
            found.append(phrase[-1])
        phrase, is_open = [], token in DETERMINERS or token in PREPOSITIONS - {"to"}
    return [head for head in dict.fromkeys(found) if head not in FUNCTION_WORDS and head not in ("day", "time")]


def _other_number(part: str, beside: _Sentence) -> tuple[str, str] | None:
    told = list(pairwise(beside.words))
    for number, noun in pairwise(in_order(part)):
        if number not in NUMBERS or (number, noun) in told:
            continue
        for other, same in told:
            if other in NUMBERS and lemmas(same) & lemmas(noun):
                return CONTRADICTS, f"{number} {noun} became {other}"
    return None


def _other_negation(part: str, beside: _Sentence) -> tuple[str, str] | None:
    """A verb that one of the two sentences denies and the other states."""
    wanted, told = denials(part), denials(beside.text)
    for verb in [verb for verb in wanted if verb in told and wanted[verb] != told[verb]]:
        return CONTRADICTS, f"not {verb} became {verb}" if wanted[verb] else f"{verb} became not {verb}"
    return None


def denials(text: str) -> dict[str, bool]:
    """The verb's lemma → whether it is negated ("did not want"), for each verb that occurs once."""
    found: dict[str, list[bool]] = {}
    for match in VERB_PHRASE.finditer(text.lower().replace("’", "'")):
        if match["denied"] or verb_form(match["verb"]):
            found.setdefault(base(match["verb"]), []).append(bool(match["denied"]))
    return {verb: denied[0] for verb, denied in found.items() if len(denied) == 1}
