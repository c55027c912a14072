"""How many characters speak in a story: each quotation is assigned to a speaker, or the result is `None`.

Case does not matter, so a name is recognised by its position ("said Tom", "Tom said") and not by its capital letter.
`tests/text/speakers.jsonl` has stories whose speakers were counted by a reader.
"""

import re

from fledge.text.beings import BEINGS, FEMALE, MALE, STANDARD
from fledge.text.spelling import straight
from fledge.text.words import FUNCTION_WORDS

VERB = (
    r"(?:said|says|asked|asks|replied|replies|answered|answers|shouted|yelled|whispered|cried|exclaimed|called|told"
    r"|begged|screamed|explained|laughed|responded|warned|suggested|added|repeated)"
)
PRONOUN = dict.fromkeys(FEMALE, "she") | dict.fromkeys(MALE, "he")
CROWDS = ("everyone", "everybody", "nobody", "someone", "both")
BEING = "|".join(sorted(BEINGS | set(STANDARD) | set(PRONOUN) | {"neighbor"}, key=len, reverse=True))
DETERMINER = r"(?:the|an?|his|her|their|its|my|our|another|[\w-]+'s)"
WHO = rf"(?:{DETERMINER} (?:[\w'-]+,? ){{0,3}}?(?:{BEING})(?!')|(?:mr|mrs|ms|miss|dr)\.? \w+|(?!{DETERMINER}\b)[\w-]+)"
ADVERBS = r"(?: (?:\w+ly|then|also|just|still|always|finally))*"
AFTER = re.compile(rf" ?(?:{VERB} (?P<verb_first>{WHO})\b|(?P<who_first>{WHO}){ADVERBS} {VERB}\b)")
BEFORE = re.compile(rf"(?:^|.*\W)(?P<who>{WHO}){ADVERBS} {VERB}\b[^\"]*$")
JOINED = re.compile(rf"(?:^|.*\W)and{ADVERBS} {VERB}\b[^\"]*$")
OPENING = re.compile(rf"(?:(?:then|so|but|and|suddenly|finally|later|soon|one day|the next day),? )*(?P<who>{WHO})\b")
NAMED = re.compile(rf"\b({BEING}|friend),? (?:(?:who|that) (?:was|is) )?(?:named|called) (\w+)")
SENTENCE = re.compile(r"(?<!\bmr)(?<!\bmrs)(?<!\bms)(?<!\bdr)[.!?]+(?= |$)")


def speakers(story: str) -> int | None:
    """How many characters speak; 0 if there is no quotation, `None` if it is not certain who says what."""
    text = straight(story).lower()
    parts = text.split('"')
    if len(parts) == 1:
        return 0
    if len(parts) % 2 == 0:
        return None  # a quotation is not closed
    narration = " ".join(parts[::2])
    names = {name: STANDARD.get(being, being) for being, name in NAMED.findall(narration)}
    found, previous = set(), None
    for at in range(1, len(parts), 2):
        previous = _speaker(parts, at, previous)
        if previous is None:
            return None
        found.add(previous)
    return _different(found, names, narration)


def _speaker(parts: list[str], at: int, previous: str | None) -> str | None:
    """Who says the quotation `parts[at]`, in the story's words; `previous` said the one before it."""
    before, after = parts[at - 1], parts[at + 1]
    sentence = _last_sentence(before)
    if before.rstrip().endswith((",", ":")) or JOINED.match(sentence):  # Tom said, "No."
        found = OPENING.match(sentence) if JOINED.match(sentence) else BEFORE.match(sentence)
        if found and not re.search(rf"\band {re.escape(found['who'])}\b", sentence):
            return found["who"]
        return previous if AFTER.match(before) else None  # "No," said Tom, "not me."
    told = AFTER.match(after)
    leads_on = after.rstrip().endswith(",") and parts[at].rstrip().endswith(".")  # "No." Tom said, "Not me."
    if told and not leads_on:  # "No," said Tom.
        return told["verb_first"] or told["who_first"]
    # "No," said Tom. "Not me."
    return previous if AFTER.match(before) and len(SENTENCE.findall(before)) == 1 else None


def _last_sentence(narration: str) -> str:
    return SENTENCE.split(narration.strip())[-1].strip()


def _different(found: set[str], names: dict[str, str], narration: str) -> int | None:
    """The number of different characters in a set of speakers; `None` if it is not certain."""
    beings, pronouns = set(), set()
    named = {being: [name for name, of in names.items() if of == being] for being in names.values()}
    for who in found:
        *others, head = who.split()
        head = STANDARD.get(head, head)
        head = f"{others[-1]} {head}" if others and others[-1] in BEINGS else head  # the queen bee
        if head in ("he", "she"):
            pronouns.add(head)
        elif head in FUNCTION_WORDS or head in CROWDS or (head == "friend" and head not in named):
            return None
        else:
            beings.add(named[head][0] if len(named.get(head, ())) == 1 else head)
    everyone = {STANDARD.get(word, word) for word in re.findall(rf"\b(?:{BEING})\b", narration)} | beings | set(names)
    everyone -= {being for being in named if len(named[being]) == 1}
    for pronoun in pronouns:
        possible = {who for who in everyone if PRONOUN.get(names.get(who, who), pronoun) == pronoun}
        if len(possible) != 1:
            return None
        beings |= possible
    return len(beings)
