"""Finds facts of a short story by rules: the main character, the plot, the moral, whether anyone speaks.

Every function returns `None` unless it is certain: an example with a wrong answer is worse than none.
`tests/text/main_characters.jsonl` has the main characters of 200 stories, checked by a reader.
"""

import re
from collections import Counter

from fledge.text.beings import BEINGS

SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)"
    r"""(?:(?<=[.!?])|(?<=[.!?]["”’']))\s+(?=["“‘']?[A-Z])"""
)
COMPLETE = (".", "!", "?", '"', "”", "'")  # how the last sentence of a complete story ends
QUOTED = re.compile(r'"[^"]*"|“[^”]*”')
MORAL = re.compile(
    r"\bmoral of (?:the|this) story(?: is\b|:).*\w \w|^(?:The|Our) moral is\b"
    r"|\blesson\b[^.!?]*(?: that (?!day\b|she |he |they )|: | [-–—] )\w+ \w+ \w+"
    r"|\blearn(?:ed|t) (?:that day )?that (?:it(?: i|['’])s|being|sharing|helping|we|you|sometimes)\b"
)
EVENT = re.compile(
    r"(?:But |Then,? |And then,? )?(?:[Oo]ne|[Oo]n an?) (?:\w+,? ){0,3}(?:day|morning|afternoon|evening|night)\b"
)
CLOSED = re.compile(r"(?:The|THE) (?:end|End|END)[.!]?")
BAD_TURN = re.compile(
    r"\b(?:sad(?:ly)?|cr(?:y|ied|ying)|died|dead|lost|gone|hurt|sick|alone|lonely|scared|never|too late|sorry|tears?"
    r"|broken|regret(?:ted)?|angry|no one)\b"
)
GOOD_TURN = re.compile(
    r"\b(?:happ(?:y|ier|ily|iest|iness)|smil(?:ed?|ing|es)|fun|friends?|laugh(?:ed|ing)|glad|proud|love[ds]?"
    r"|hug(?:ged|s)?|enjoy(?:ed)?|safe(?:ly)?|best|thank(?:ed|ful)|excited|joy)\b"
)
SPEECH = re.compile(
    r"\b(said|says|say|asked|asks|replied|replies|answered|shouted|yelled|whispered|cried out|exclaimed|called out"
    r"|told|tells|talk(?:ed|ing|s)?|spoke|speaks?|begged|screamed|explained|laughed|responded|warned|suggested)\b"
)
# Things that may have a name but are not characters.
PLACES = frozenset(
    """area book building castle city club country farm forest game garden hill hotel house island kingdom lake land
    mountain ocean park place planet play playground restaurant river school sea shop song store street team town
    valley village zoo""".split()  # noqa: SIM905
)
NO_NAMES = frozenset(
    """A After All Although An And Another As At Aunt Auntie Because But By Christmas Dad Daddy Dr Each Easter English
    Even Every Everyone Finally First For Friday From God Grandad Grandma Grandmother Grandpa Granny Halloween
    Happy He Hello Her Hey Hi His How I If In It Its Jr Just Later Little Look Lord Mama Maybe Mister Mom Momma
    Mommy Monday Mr Mrs Ms Mum Mummy Mother Father My Nana Next No Not Now Oh Okay On Once One Our Papa Please
    Santa Saturday She Since So Some Sometimes Soon Sunday Thank Thanks That The Their Then There These They This
    Thursday Today Too Tuesday Two Uncle Wednesday We What When Where Which While Who Why With Wow Yes You Your
    January February March April May June July August September October November December TV""".split()  # noqa: SIM905
)
TITLE = r"(?:(?:Mr|Mrs|Ms|Miss|Dr|Captain|Princess|Prince|King|Queen)\.? )?"
NAME = rf"{TITLE}[A-Z][a-zé]+(?:-[A-Z][a-z]+)?"
NAMED = re.compile(rf"\b(\w+),? (?:(?:who|that) (?:was|is) )?(?:named|called) ({NAME}(?: [A-Z][a-z]+)?)\b(?!')")
LISTED = re.compile(rf"\b({NAME}(?:, {NAME})*),? and ({NAME})\b(?!['’])")


def sentences(text: str) -> list[str]:
    """Splits at sentence ends; a quotation of several sentences stays with the sentence it stands in."""
    shielded = QUOTED.sub(lambda quote: re.sub(r"\s", "\0", quote[0]), text)
    return [" ".join(part.replace("\0", " ").split()) for part in SENTENCE_END.split(shielded) if part.strip()]


def main_character(story: str) -> str | None:
    """Who the story is about: "Lily", "Tom and Anna", or "the cat" if the character has no name.

    It is the first character, if no other is mentioned more often.
    """
    narration = " ".join(QUOTED.sub(' "" ', story).split())
    if re.search(r"\b(I|I'm|we|my|We|My)\b", narration):
        return None  # a first-person narrator
    opening = " ".join(sentences(narration)[:3])
    counts = _names(narration)
    first = min(counts, key=lambda name: _first_at(name, narration), default=None)
    being = re.search(rf"\b[Aa]n? (?:[a-z-]+,? ){{0,4}}?({'|'.join(BEINGS)})\b(?!['’-])", opening)
    if being and (first is None or being.start() < _first_at(first, narration)):
        named = re.match(rf"[^.!?]*?,? (?:who (?:was|is) )?(?:named|called) ({NAME})\b", opening[being.end() :])
        named = named or re.search(rf"(?:[HhIi](?:is|er|ts)|[Tt]he {being[1]}'s) name was ({NAME})\b", opening)
        if not named or named[1] != first:
            return _unnamed(being[1], narration, counts)
    if first is None or _first_at(first, narration) >= len(opening):
        return None
    together = [first]
    several = LISTED.match(narration, _first_at(first, narration))
    if several:
        together = [*several[1].split(", "), several[2]]
    rivals = [count for name, count in counts.items() if name not in together]
    if len(together) == 1:
        companion = re.search(rf"\b{first} and (?:his|her|their|an?) [a-z -]+,? ({NAME})", opening)
        if companion and 2 * counts[companion[1]] > counts[first]:
            return None
    elif 3 * min(counts[name] for name in together) < max(counts.values()):
        return None
    if counts[first] < max([2, *rivals, 1 + _thing_mentions(narration)]):
        return None
    return " and ".join([", ".join(together[:-1]), together[-1]] if len(together) > 1 else together)


def _first_at(name: str, narration: str) -> int:
    found = re.search(rf"\b{re.escape(name)}\b", narration)
    return found.start() if found else len(narration)


def _names(narration: str) -> Counter[str]:
    """Names of persons and animals in a text without quotations, with the number of their mentions.

    Inside a sentence a capital letter shows a name. At its beginning it does if the word never occurs in lower case and
    either occurs again or begins the story.
    """
    inside = re.findall(rf"(?<=[a-z,;:] )({NAME})\b", narration)
    begin = re.findall(rf'(?:^|(?<=[.!?"] ))({NAME})\b', narration)
    plain = set(re.findall(r"\b[a-z]+\b", narration))
    found = {match[2] for match in NAMED.finditer(narration)} | {name for name in inside if _may_name(name)}
    found |= {
        name
        for name in begin
        if _may_name(name) and name.lower() not in plain and (begin.count(name) > 1 or narration.startswith(name))
    }
    nobody = {match[2] for match in NAMED.finditer(narration) if match[1] in PLACES}
    found = {name for name in found - nobody if not any(name != other and name in other.split() for other in found)}
    return Counter({name: len(re.findall(rf"\b{re.escape(name)}\b", narration)) for name in found})


def _may_name(name: str) -> bool:
    return name.split()[-1] not in NO_NAMES


def _unnamed(being: str, narration: str, counts: Counter[str]) -> str | None:
    """ "the cat", in the words that the story mostly uses, unless a name or another being comes up more often."""
    mentions = Counter(re.findall(rf"\b[Tt]he ((?:[a-z]+ )?(?:{'|'.join(BEINGS)}))\b(?!['’])", narration))
    if re.search(rf"\b(?:other|another|two) {being}|\b{being} and an? ", narration):
        return None
    own = Counter({phrase: count for phrase, count in mentions.items() if phrase.split()[-1] == being})
    others: Counter[str] = Counter()
    for phrase, count in (mentions - own).items():
        others[phrase.split()[-1]] += count
    if own.total() < max(
        [
            2,
            *(2 * count for count in counts.values()),
            *(count + 1 for count in others.values()),
            _thing_mentions(narration),
        ]
    ):
        return None
    return f"the {own.most_common(1)[0][0]}"


def _thing_mentions(narration: str) -> int:
    """How often the thing in "there was a big boat" at the story's beginning is mentioned; 0 without such a thing."""
    begin = re.match(
        r"[^.!?]*\b(?:was|lived|stood) an? (?:[a-z-]+,? )*?([a-z]+)(?: (?:that|which|who|in|on|at|near)|[.,!?])",
        narration,
    )
    if not begin or begin[1] in BEINGS | PLACES:
        return 0
    return len(re.findall(rf"\b[Tt]he (?:[a-z]+ )?{begin[1]}\b(?!['’])", narration))


def speaks(story: str) -> bool | None:
    """Whether anyone speaks: true with a quotation and a verb of speech, false with neither, else `None`."""
    quoted, told = QUOTED.search(story), SPEECH.search(QUOTED.sub("", story))
    if quoted and told:
        return True
    return None if quoted or told or re.search(r'["“”]', story) else False


def moral(story: str) -> str | None:
    """The sentence that states the story's moral, word for word."""
    for sentence in reversed(sentences(story)):
        if '"' not in sentence and "“" not in sentence and MORAL.search(sentence):
            return sentence
    return None


def happenings(story: str, character: str | None) -> str | None:
    """What happened: the sentence with which the events begin ("One day, ...") and the last one.

    A pronoun at the beginning becomes the main `character`, if it can only mean that one.
    """
    told = [s for s in sentences(story) if not MORAL.search(s) and not CLOSED.fullmatch(s)]
    at = next((i for i, sentence in enumerate(told[:-1]) if EVENT.match(sentence)), None)
    if at is None or any(re.search(r'["“”]', sentence) for sentence in (told[at], told[-1])):
        return None
    event = told[at]
    pronoun = re.match(rf"({EVENT.pattern},? )(she|he|it|they|her|his|its|their)\b", event)
    if pronoun:
        plural = pronoun[2] in ("they", "their")
        known = set(re.split(r", | and ", character or ""))
        if character is None or plural != (" and " in character) or set(_names(" ".join(told[: at + 1]))) - known:
            return None
        owner = "" if pronoun[2] in ("she", "he", "it", "they") else "'s"
        event = f"{pronoun[1]}{character}{owner}{event[pronoun.end() :]}"
    return f"{event} {told[-1]}"


def ends_happily(story: str, sad_by_record: bool) -> bool | None:
    """Whether the story ends happily. The record and the words of the last three sentences must agree."""
    told = [s for s in sentences(story) if not MORAL.search(s) and not CLOSED.fullmatch(s)]
    close = " ".join(told[-3:])
    bad, good = len(BAD_TURN.findall(close)), len(GOOD_TURN.findall(close))
    if sad_by_record:
        return False if bad > good else None
    return True if good > bad else None
