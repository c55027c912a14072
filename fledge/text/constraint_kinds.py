"""The kinds of constraints of the task `constraints`: how each is asked for, checked, rewarded, and drawn for a story.

The kinds are those of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911), adapted to children's stories. To
add one, write a subclass of `Kind` and put it into `KINDS`; docs/tasks.md lists them.
"""

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from fledge.text import checks
from fledge.text.limits import NUMBER_WORDS
from fledge.text.overlap import f1
from fledge.text.rhymes import COUPLETS
from fledge.text.speakers import speakers
from fledge.text.spelling import straight
from fledge.text.stories import main_character, sentences
from fledge.text.words import in_order, used

NUMBERS = (
    *NUMBER_WORDS, "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
COMMON = (
    "day", "time", "little", "play", "see", "say", "love", "want", "big", "girl", "happy", "sad", "friend", "find",
    "look", "help", "boy", "toy", "park", "good", "fun", "home", "cry", "try",
)  # fmt: skip
STOCK = {"Lily": 0.03, "Timmy": 0.12, "Tim": 0.12, "the end": 0.05}  # phrases of many stories → how often to ask


@dataclass
class Told:
    """A story that constraints are drawn for, and the words and the features that its record lists."""

    story: str
    listed: list[str]
    is_sad: bool

    @classmethod
    def of(cls, record: dict, story: str) -> "Told":
        listed = [word.strip() for word in record.get("Words", "").split(",") if in_order(word)]
        return cls(story, listed, "BadEnding" in record.get("Features", ""))

    @cached_property
    def sentences(self) -> list[str]:
        return sentences(self.story)

    @cached_property
    def character(self) -> str:
        """The main character, or an empty string if it is not sure who that is."""
        return main_character(self.story) or ""


class Kind(ABC):
    """One kind of constraint. A constraint is written "kind: value", as in "words: boat, brave".

    The value is a phrase that prompts quote, if a subclass does not say otherwise.
    """

    name: str

    phrasings: dict[str, tuple[str, ...]]
    """Value → how a prompt asks for it, the plain phrasing first; "" stands for every other value, which {} names."""

    meaning: str
    """What `check` measures, for the report."""

    is_share = False
    """Whether a part of the constraint can be kept, so that `check` gives values between 0 and 1."""

    reads_title = False
    """Whether `check` gets the whole text, and not only what is below its title."""

    weight = 0.0
    """How often it is drawn. What most stories support has a small weight, so that kinds are about equally frequent."""

    apart: tuple[str, ...] = ()
    """Kinds that never stand in one prompt with this one. One of the two names the other."""

    common: dict[str, float] = {}
    """Phrases in the values that most stories keep → how often such a value is asked for.

    They are asked for rarely, so that no constant answer does well.
    """

    wanted = "words"
    """What a value is, for the message about a wrong one."""

    def read(self, value: str) -> str:
        """A value as a user wrote it → the value, or "" if it cannot be checked."""
        return value if in_order(value) else ""

    def spelled(self, value: str) -> str:
        """The value as a prompt writes it."""
        return value

    @abstractmethod
    def check(self, value: str, text: str) -> float:
        """How far a text keeps the constraint, from 0 to 1. It is kept at 1."""

    def reward(self, value: str, score: float, text: str, prompt: str) -> float:
        """The reward of a text to which `check` gives this score."""
        return score

    def offer(self, told: Told, rng: random.Random) -> str:
        """The value that may be asked of this story, or "" if there is none."""
        return ""

    def may_ask(self, value: str, told: Told, rng: random.Random) -> bool:
        """Whether the story keeps the constraint, and chance asks for one that is so common."""
        asked = [share for phrase, share in self.common.items() if re.search(rf"\b{phrase}\b", value, re.IGNORECASE)]
        return rng.random() < min(asked, default=1.0) and self.check(value, told.story) == 1


class Words(Kind):
    name = "words"
    phrasings = {"": ("Use these words: {}", "Use all of these words: {}", "These words must occur in it: {}")}
    meaning = "share of the requested words used in sentences, in any inflection"
    is_share = True
    weight = 0.4

    def read(self, value: str) -> str:
        return ", ".join(word.strip() for word in value.split(",") if in_order(word))

    def check(self, value: str, text: str) -> float:
        return checks.uses(value.split(", "), text)

    def reward(self, value: str, score: float, text: str, prompt: str) -> float:
        """A sentence counts for two of the words at most."""
        return checks.uses_apart(value.split(", "), text, prompt)

    def offer(self, told: Told, rng: random.Random) -> str:
        return ", ".join(list(compress(told.listed, checks.used_in_telling(told.listed, told.story)))[:3])


class Without(Kind):
    name = "without"
    phrasings = {"": ("Do not use the word {}.", "Never use the word {}.", "Leave out the word {}.")}
    meaning = "a forbidden word is in no inflection used"
    weight = 0.3

    def check(self, value: str, text: str) -> float:
        return checks.avoids(value, text)

    def offer(self, told: Told, rng: random.Random) -> str:
        missing = [word for word, is_used in zip(COMMON, used(COMMON, told.story), strict=True) if not is_used]
        return rng.choice(missing[:3]) if missing else ""


class Number(Kind):
    """A number of things, which a prompt writes in words where it has one."""

    wanted = "a number above 0"

    def read(self, value: str) -> str:
        return value if value.isascii() and value.isdigit() and int(value) > 0 else ""

    def spelled(self, value: str) -> str:
        return NUMBERS[int(value) - 1] if int(value) <= len(NUMBERS) else value


class Sentences(Number):
    name = "sentences"
    phrasings = {"": ("Write exactly {} sentences.", "Use exactly {} sentences.", "It must have exactly {} sentences.")}
    meaning = "number of sentences: 1 if exact, less with the distance"
    is_share = True
    weight = 0.8
    apart = ("length",)

    def check(self, value: str, text: str) -> float:
        return checks.has_sentences(int(value), text)

    def offer(self, told: Told, rng: random.Random) -> str:
        """The number, if there is one way to count: no quotation holds the end of a sentence."""
        ends = re.findall(r"[.!?]+(?=\"?(?: |$))", straight(told.story))
        return str(len(told.sentences)) if len(ends) == len(checks.parts(told.story)) else ""


class Begin(Kind):
    name = "begin"
    phrasings = {"": ("Begin with: {}", "Start with: {}", "It begins with these words: {}")}
    meaning = "share of the requested beginning that the story begins with"
    is_share = True
    weight = 2.5
    apart = ("name",)
    common = STOCK

    def check(self, value: str, text: str) -> float:
        return checks.begins(value, text)

    def offer(self, told: Told, rng: random.Random) -> str:
        return _quotable(told.sentences[0])


def _quotable(sentence: str) -> str:
    """The sentence, or "" if it is very short, long, or has a quotation."""
    return sentence if 3 <= len(in_order(sentence)) <= 14 and not re.search(r'["“”]', sentence) else ""


class End(Kind):
    name = "end"
    phrasings = {"": ("End with: {}", "Finish with: {}", "It ends with these words: {}")}
    meaning = "share of the requested end that the story ends with"
    is_share = True
    weight = 1.2
    apart = ("rhyme",)
    common = STOCK

    def check(self, value: str, text: str) -> float:
        return checks.ends(value, text)

    def reward(self, value: str, score: float, text: str, prompt: str) -> float:
        """A wrong end earns up to a half for the words that the last sentence shares with it.

        Hardly any answer gets the last words right by chance, and a model never learns what is never rewarded.
        """
        last = checks.parts(text)[-1:]
        return score if score == 1 else (score + (f1(value, last[0]) if last else 0.0)) / 2

    def offer(self, told: Told, rng: random.Random) -> str:
        return _quotable(told.sentences[-1])


class Name(Kind):
    name = "name"
    phrasings = {"": ("Someone in it is called {}.", "Use the name {}.", "It has a character called {}.")}
    meaning = "the requested name occurs"
    weight = 5.0
    common = STOCK

    def check(self, value: str, text: str) -> float:
        return checks.has_name(value, text)

    def offer(self, told: Told, rng: random.Random) -> str:
        names = [name for name in re.split(r", | and ", told.character) if name[:1].isupper()]
        return rng.choice(names) if names else ""


class Speakers(Number):
    name = "speakers"
    phrasings = {"": ("Exactly {} in it.", "Let exactly {}, no more.", "In it exactly {}.")}
    meaning = "number of characters who speak: 1 if exact, less with the distance, 0 if it is not sure who does"
    is_share = True
    weight = 1.2
    apart = ("dialogue",)

    def spelled(self, value: str) -> str:
        return f"{super().spelled(value)} character{'s speak' if int(value) > 1 else ' speaks'}"

    def check(self, value: str, text: str) -> float:
        return checks.has_speakers(int(value), text)

    def offer(self, told: Told, rng: random.Random) -> str:
        return str(speakers(told.story) or "")


class Switch(Kind):
    """A kind whose values are those of its phrasings."""

    wanted = "yes or no"

    def read(self, value: str) -> str:
        return value if value in self.phrasings else ""


class Question(Switch):
    name = "question"
    phrasings = {
        "yes": ("Ask a question in it.", "There must be a question in it.", "It has a question in it."),
        "no": ("Ask no question in it.", "There must be no question in it.", "It has no question in it."),
    }
    meaning = "there is a question, or none, as requested"
    weight = 0.6
    common = {"no": 0.42}

    def check(self, value: str, text: str) -> float:
        return checks.asks(value == "yes", text)

    def offer(self, told: Told, rng: random.Random) -> str:
        return "yes" if "?" in told.story else "no"


class Dialogue(Switch):
    name = "dialogue"
    phrasings = {
        "yes": ("Use dialogue.", "It must have dialogue.", "Let the characters talk."),
        "no": ("Use no dialogue.", "It must not have dialogue.", "Let nobody talk."),
    }
    meaning = "there is dialogue, or no quotation, as requested"
    weight = 0.45
    common = {"yes": 0.7}

    def check(self, value: str, text: str) -> float:
        return checks.quotes(value == "yes", text)

    def offer(self, told: Told, rng: random.Random) -> str:
        return "yes" if checks.quotes(True, told.story) else "no" if '"' not in told.story else ""


class Title(Kind):
    name = "title"
    phrasings = {
        "": ("Give it this title: {}", "Put this title above it: {}", "Its title is: {}"),
        "any": ("Give it a title.", "Put a title above it.", "Begin with a title on its own line."),
    }
    meaning = "there is a title line: the requested one, or one that shares a word with the story"
    reads_title = True
    added = 1 / 8
    """How often a title is added to a story: none has one."""

    def check(self, value: str, text: str) -> float:
        return checks.is_titled("" if value == "any" else value, text)

    def made(self, told: Told, rng: random.Random) -> str:
        """A title made from the main character and a thing of the story: "Lily and the Kite", "The Kite"."""
        from lemminflect import getAllLemmas

        words = [word.lower() for word in told.listed]
        nouns = [word for word in words if "NOUN" in (kinds := getAllLemmas(word)) and "ADJ" not in kinds]
        owned = r"\b(?:the|an?|his|her|their) (?:\w+ )?"
        thing = next((word for word in nouns if re.search(rf"{owned}{re.escape(word)}\b", told.story)), "")
        if not thing:
            return ""
        titles, who = [f"The {thing.title()}"], told.character
        if who and " and " not in who and thing not in who:
            titles.append(f"{who[0].upper()}{who[1:]} and the {thing.title()}")
        titles = [title for title in titles if self.check("any", f"{title}\n\n{told.story}")]
        return rng.choice(titles) if titles else ""


class Length(Kind):
    name = "length"
    phrasings = {"": ("Use {} words.", "Write {} words.", "It must have {} words.")}
    meaning = "number of words: 1 within the bound, less the further from it"
    is_share = True
    weight = 0.3
    wanted = "'at most 100' or 'at least 100'"

    def read(self, value: str) -> str:
        return value if re.fullmatch(r"at (most|least) (\d+)", value) and not value.endswith(" 0") else ""

    def check(self, value: str, text: str) -> float:
        _, bound, count = value.split()
        return (checks.is_at_most if bound == "most" else checks.is_at_least)(int(count), text)

    def offer(self, told: Told, rng: random.Random) -> str:
        count = len(in_order(told.story))
        bound = rng.choice(("at most", "at least") if count >= 10 else ("at most",))
        return f"{bound} {count // 10 * 10 + (10 if bound == 'at most' else 0)}"


class Rhyme(Switch):
    name = "rhyme"
    phrasings = {
        "yes": ("Let the last two lines rhyme.", "The last two lines rhyme.", "End with two lines that rhyme."),
    }
    meaning = "the last two lines rhyme, by the CMU Pronouncing Dictionary"
    wanted = "yes"
    added = 1 / 16
    """How often a closing couplet is added to a story: hardly any has one."""

    def check(self, value: str, text: str) -> float:
        return checks.ends_in_rhyme(text)

    def closed(self, told: Told, rng: random.Random) -> str:
        """The story with a couplet at its end."""
        return re.sub(r"\s*The end\.$", "", told.story) + "\n" + rng.choice(COUPLETS["sad" if told.is_sad else "happy"])


TITLE, RHYME = Title(), Rhyme()
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Words(), Without(), Sentences(), Begin(), End(), Name(), Speakers(), Question(), Dialogue(), TITLE, Length(),
        RHYME,
    )
}  # fmt: skip
