"""Constraints: write a story that keeps one to three constraints that rules can check.

The kinds are those of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911), adapted to children's stories. Each
instruction is made from a story that keeps its constraints, and `fledge.text.checks` checks the answers. In the column
`constraints`, in `generate.py --constraints` and in this file, a constraint is written "kind: value".
"""

import hashlib
import random
import re
from collections.abc import Callable
from itertools import compress
from typing import Any

from fledge.errors import UserError
from fledge.messages import Answer, Messages
from fledge.tasks import RejectedRecord, Task
from fledge.text import checks
from fledge.text.baselines import BASELINES
from fledge.text.limits import NUMBER_WORDS
from fledge.text.overlap import f1
from fledge.text.speakers import speakers
from fledge.text.spelling import straight
from fledge.text.stories import COMPLETE, main_character, sentences
from fledge.text.words import in_order, used

OPENINGS = ("Write a short story.", "Tell me a short story.", "Write a story for children.")
# The phrasings of each kind, or of one value of a kind, as in "question: no". The first phrasing is the plain one.
PHRASINGS = {
    "words": ("Use these words: {}", "Use all of these words: {}", "These words must occur in it: {}"),
    "without": ("Do not use the word {}.", "Never use the word {}.", "Leave out the word {}."),
    "sentences": ("Write exactly {} sentences.", "Use exactly {} sentences.", "It must have exactly {} sentences."),
    "begin": ("Begin with: {}", "Start with: {}", "It begins with these words: {}"),
    "end": ("End with: {}", "Finish with: {}", "It ends with these words: {}"),
    "name": ("Someone in it is called {}.", "Use the name {}.", "It has a character called {}."),
    "speakers": ("Exactly {} in it.", "Let exactly {}, no more.", "In it exactly {}."),
    "question: yes": ("Ask a question in it.", "There must be a question in it.", "It has a question in it."),
    "question: no": ("Ask no question in it.", "There must be no question in it.", "It has no question in it."),
    "dialogue: yes": ("Use dialogue.", "It must have dialogue.", "Let the characters talk."),
    "dialogue: no": ("Use no dialogue.", "It must not have dialogue.", "Let nobody talk."),
    "title": ("Give it this title: {}", "Put this title above it: {}", "Its title is: {}"),
    "title: any": ("Give it a title.", "Put a title above it.", "Begin with a title on its own line."),
    "length": ("Use {} words.", "Write {} words.", "It must have {} words."),
    "rhyme: yes": ("Let the last two lines rhyme.", "The last two lines rhyme.", "End with two lines that rhyme."),
}
KINDS = tuple(dict.fromkeys(phrasing.split(":")[0] for phrasing in PHRASINGS))
NUMBERS = (
    *NUMBER_WORDS, "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
LENGTH = re.compile(r"at (most|least) (\d+)")


def _length(value: str, text: str) -> float:
    _, bound, count = value.split()
    return (checks.is_at_most if bound == "most" else checks.is_at_least)(int(count), text)


CHECKS: dict[str, Callable[[str, str], float]] = {
    "words": lambda value, text: checks.uses(value.split(", "), text),
    "without": checks.avoids,
    "sentences": lambda value, text: checks.has_sentences(int(value), text),
    "begin": checks.begins,
    "end": checks.ends,
    "name": checks.has_name,
    "speakers": lambda value, text: checks.has_speakers(int(value), text),
    "question": lambda value, text: checks.asks(value == "yes", text),
    "dialogue": lambda value, text: checks.quotes(value == "yes", text),
    "title": lambda value, text: checks.is_titled("" if value == "any" else value, text),
    "length": _length,
    "rhyme": lambda value, text: checks.ends_in_rhyme(text),
}
SHARES = ("words", "sentences", "begin", "end", "speakers", "length")  # the others have no partial score

# Kinds that most stories support have smaller weights, so that all kinds are about equally frequent.
WEIGHTS = {
    "words": 0.4, "without": 0.3, "sentences": 0.8, "begin": 2.5, "end": 1.2, "name": 5.0, "speakers": 1.2,
    "question": 0.6, "dialogue": 0.45, "length": 0.3,
}  # fmt: skip
ADDED = {"title": 1 / 8, "rhyme": 1 / 16}  # how often a title or rhyme is added
APART = ({"dialogue", "speakers"}, {"end", "rhyme"}, {"sentences", "length"}, {"begin", "name"})
# How often a constraint that most stories keep is asked for, so that no constant answer does well.
SHARE = {"question: no": 0.42, "dialogue: yes": 0.7, "Lily": 0.03, "Timmy": 0.12, "Tim": 0.12, "the end": 0.05}
COMMON = (
    "day", "time", "little", "play", "see", "say", "love", "want", "big", "girl", "happy", "sad", "friend", "find",
    "look", "help", "boy", "toy", "park", "good", "fun", "home", "cry", "try",
)  # fmt: skip
RHYMES = {
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


def parse(constraint: str) -> tuple[str, str]:
    """ "kind: value" → kind and value.

    Raises:
        UserError: there is no such kind, or it does not take this value.
    """
    kind, _, value = (part.strip() for part in constraint.partition(":"))
    if kind not in KINDS:
        raise UserError(f"The constraint {constraint!r} is of no kind; write 'kind: value', one of {', '.join(KINDS)}.")
    fixed = [name.split(": ")[1] for name in PHRASINGS if name.startswith(f"{kind}: ")]
    wanted = None
    if kind in ("sentences", "speakers"):
        is_right, wanted = value.isascii() and value.isdigit() and int(value) > 0, "a number above 0"
    elif kind == "length":
        is_right, wanted = bool(LENGTH.fullmatch(value)) and not value.endswith(" 0"), "'at most 100' or 'at least 100'"
    elif kind in PHRASINGS:
        is_right, wanted = bool(in_order(value)), "words"
        if kind == "words":
            value = ", ".join(word.strip() for word in value.split(",") if in_order(word))
    else:
        is_right, wanted = value in fixed, " or ".join(fixed)
    if not is_right:
        raise UserError(f"The constraint {constraint!r} has no value that can be checked; give {kind} {wanted}.")
    return kind, value


def instruction(constraints: list[str], rng: random.Random | None = None) -> str:
    """The prompt for a story that keeps `constraints`, one per line; with plain phrasings if there is no `rng`.

    Raises:
        UserError: see `parse`; or one kind is given twice.
    """
    choose = rng.choice if rng else lambda phrasings: phrasings[0]
    parsed = [parse(constraint) for constraint in constraints]
    if len({kind for kind, _ in parsed}) < len(parsed):
        raise UserError(f"A kind of constraint is given twice in {', '.join(constraints)}; give each once.")
    lines = [choose(OPENINGS)]
    for kind, value in parsed:
        phrasings = PHRASINGS.get(f"{kind}: {value}") or PHRASINGS[kind]
        lines.append(choose(phrasings).format(_in_words(kind, value)))
    return "\n".join(lines)


def _in_words(kind: str, value: str) -> str:
    if kind not in ("sentences", "speakers"):
        return value
    number = NUMBERS[int(value) - 1] if int(value) <= len(NUMBERS) else value
    return number if kind == "sentences" else f"{number} character{'s speak' if int(value) > 1 else ' speaks'}"


class Constraints(Task):
    """Each story gives three instructions, with one, two and three constraints, all in one split."""

    template = "story"
    purpose = "write short stories that keep the constraints of their prompt"
    example: Messages = [{"role": "user", "content": instruction(["words: boat, brave", "question: yes"])}]
    columns = {"number": ("one", "two", "three"), "constraints": "strings"}
    meaning = {
        "instruction_following": "keeps every constraint of its prompt, is a story in form, and stopped by end-of-text",
        "all_kept": "keeps every constraint of its prompt (IFEval's prompt-level strict accuracy, Zhou et al. 2023)",
        "kept": "share of the prompt's constraints that are kept (IFEval's instruction-level strict accuracy, each "
        "prompt weighing the same)",
        "story": "three different sentences of three words or more, no list, no copy of the prompt, no repetition",
        "words": "share of the requested words used in sentences, in any inflection",
        "without": "a forbidden word is in no inflection used",
        "sentences": "number of sentences: 1 if exact, less with the distance",
        "begin": "share of the requested beginning that the story begins with",
        "end": "share of the requested end that the story ends with",
        "name": "the requested name occurs",
        "speakers": "number of characters who speak: 1 if exact, less with the distance, 0 if it is not sure who does",
        "question": "there is a question, or none, as requested",
        "dialogue": "there is dialogue, or no quotation, as requested",
        "title": "there is a title line: the requested one, or one that shares a word with the story",
        "length": "number of words: 1 within the bound, less the further from it",
        "rhyme": "the last two lines rhyme, by the CMU Pronouncing Dictionary",
        **{f"{kind}_kept": f"{kind}: exactly as requested" for kind in SHARES},
    }
    constraints = {"story": 1.0, **dict.fromkeys(KINDS, 1.0)}
    rewards = {"story": 1.0, "all_kept": 1.0, **dict.fromkeys(KINDS, 1.0)}
    asks_once = True
    baselines = {name: BASELINES[name] for name in ("most_frequent_answer", "copied_prompt")}

    def kind(self, row: dict[str, Any]) -> str:
        return row["number"]

    def examples(self, record: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """A TinyStories-Instruct record → three rows, fewer if the story keeps few constraints.

        Raises:
            RejectedRecord: the record has no story, or its story breaks off or has fewer than three sentences.
        """
        story = record.get("Story", "").strip()
        if not story:
            raise RejectedRecord("no story")
        if not story.endswith(COMPLETE):
            raise RejectedRecord("the story breaks off")
        if not checks.tells(story, ""):
            raise RejectedRecord("fewer than three whole sentences")
        group = hashlib.blake2b(" ".join(story.split()).encode(), digest_size=16).hexdigest()
        offers, rows = _offers(record, story, rng), []
        for count, number in enumerate(self.columns["number"], 1):
            constraints, answer = _draw(record, story, offers, count, rng)
            messages = [
                {"role": "user", "content": instruction(constraints, rng)},
                {"role": "assistant", "content": answer},
            ]
            row = {"messages": messages, "number": number, "constraints": constraints, "group": group}
            # The prompt may quote so much of a very short story that the story counts as a copy of it.
            if len(constraints) == count and self._is_kept(row):
                rows.append(row)
        if not rows:
            raise RejectedRecord("it keeps no constraint that can be asked for")
        return rows

    def _is_kept(self, row: dict[str, Any]) -> bool:
        scores = self.score(row, Answer(row["messages"][-1]["content"], tokens=0, stopped=True))
        return bool(scores["all_kept"] and scores["story"])

    def score(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        wanted = dict(map(parse, row["constraints"]))
        text, least = answer.text, min(3, int(wanted.get("sentences", 3)))
        body = checks.title_and_body(text)[1] if "title" in wanted else text
        shares = {kind: CHECKS[kind](value, text if kind == "title" else body) for kind, value in wanted.items()}
        kept = {kind: float(share == 1) for kind, share in shares.items()}
        return {
            "all_kept": float(all(kept.values())),
            "kept": sum(kept.values()) / len(kept),
            "story": float(checks.tells(body, row["messages"][-2]["content"], least)),
            **shares,
            **{f"{kind}_kept": kept[kind] for kind in SHARES if kind in kept},
        }

    def reward(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        """As `score`, but a sentence counts for two of the words at most, and `all_kept` needs a story.

        A wrong end earns up to a half for the words that the last sentence shares with it: hardly any answer gets the
        last words right by chance, and a model never learns what is never rewarded.
        """
        scores, wanted = self.score(row, answer), dict(map(parse, row["constraints"]))
        found = {name: scores[name] for name in self.rewards if name in scores}
        body = checks.title_and_body(answer.text)[1] if "title" in found else answer.text
        if "words" in found:
            found["words"] = checks.uses_apart(wanted["words"].split(", "), body, row["messages"][-2]["content"])
        if found.get("end", 1) < 1:
            last = checks.parts(body)[-1:]
            found["end"] = (found["end"] + (f1(wanted["end"], last[0]) if last else 0.0)) / 2
        return found | {"all_kept": found["all_kept"] * found["story"] * (found.get("words", 1.0) == 1)}


def _draw(record: dict, story: str, offers: dict, count: int, rng: random.Random) -> tuple[list[str], str]:
    """Up to `count` constraints in random order, and the story that keeps them all."""
    chosen, title = {}, None
    if checks.ends_in_rhyme(story):
        chosen["rhyme"] = "yes"
    elif rng.random() < count * ADDED["rhyme"]:
        chosen["rhyme"] = "yes"
        ending = "sad" if "BadEnding" in record.get("Features", "") else "happy"
        story = re.sub(r"\s*The end\.$", "", story) + "\n" + rng.choice(RHYMES[ending])
        offers = _offers(record, story, rng)
    if len(chosen) < count and rng.random() < count * ADDED["title"] and (title := _title(record, story, rng)):
        chosen["title"] = rng.choice(("any", title))
    while len(chosen) < count:
        apart = set().union(*(pair for pair in APART if pair & chosen.keys()), chosen)
        left = [kind for kind in offers if kind not in apart]
        if not left:
            break
        kind = rng.choices(left, [WEIGHTS[kind] for kind in left])[0]
        chosen[kind] = offers[kind]
    lines = [f"{kind}: {value}" for kind, value in chosen.items()]
    rng.shuffle(lines)
    return lines, f"{title}\n\n{story}" if "title" in chosen else story


def _offers(record: dict, story: str, rng: random.Random) -> dict[str, str]:
    """The constraints that a story surely keeps, kind → value; those that nearly all stories keep only sometimes."""
    told, words, who = sentences(story), in_order(story), main_character(story) or ""
    listed = [word.strip() for word in record.get("Words", "").split(",") if in_order(word)]
    asked = list(compress(listed, checks.used_in_telling(listed, story)))
    missing = [word for word, is_used in zip(COMMON, used(COMMON, story), strict=True) if not is_used]
    names = [name for name in re.split(r", | and ", who) if name[:1].isupper()]
    voices, bound = speakers(story), rng.choice(("at most", "at least") if len(words) >= 10 else ("at most",))
    ends_inside = len(re.findall(r"[.!?]+(?=\"?(?: |$))", straight(story))) != len(checks.parts(story))
    found = {
        "words": ", ".join(asked[:3]),
        "without": rng.choice(missing[:3]) if missing else "",
        "sentences": "" if ends_inside else str(len(told)),
        "begin": told[0],
        "end": told[-1],
        "name": rng.choice(names) if names else "",
        "speakers": str(voices or ""),
        "question": "yes" if "?" in story else "no",
        "dialogue": "yes" if checks.quotes(True, story) else "no" if '"' not in story else "",
        "length": f"{bound} {len(words) // 10 * 10 + (10 if bound == 'at most' else 0)}",
    }
    return {kind: value for kind, value in found.items() if value and _is_sound(kind, value, story, rng)}


def _is_sound(kind: str, value: str, story: str, rng: random.Random) -> bool:
    """Whether a constraint may be asked for: it is kept, short, and not one that nearly every story keeps."""
    if kind in ("begin", "end") and (not 3 <= len(in_order(value)) <= 14 or re.search(r'["“”]', value)):
        return False
    share = SHARE.get(f"{kind}: {value}", 1.0)
    for stock in ("Lily", "Timmy", "Tim", "the end"):
        if kind in ("begin", "end", "name") and re.search(rf"\b{stock}\b", value, re.IGNORECASE):
            share = min(share, SHARE[stock])
    return rng.random() < share and CHECKS[kind](value, story) == 1


def _title(record: dict, story: str, rng: random.Random) -> str | None:
    """A title made from the main character and a thing of the story: "Lily and the Kite", "The Kite"."""
    from lemminflect import getAllLemmas

    words = [word.strip().lower() for word in record.get("Words", "").split(",")]
    nouns = [word for word in words if "NOUN" in (kinds := getAllLemmas(word)) and "ADJ" not in kinds]
    things = [word for word in nouns if re.search(rf"\b(?:the|an?|his|her|their) (?:\w+ )?{re.escape(word)}\b", story)]
    who = main_character(story) or ""
    titles = [f"The {thing.title()}" for thing in things[:1]]
    if who and " and " not in who:
        titles += [f"{who[0].upper()}{who[1:]} and the {thing.title()}" for thing in things[:1] if thing not in who]
    titles = [title for title in titles if checks.is_titled("", f"{title}\n\n{story}")]
    return rng.choice(titles) if titles else None
