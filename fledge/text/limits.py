"""Limits that an instruction states (words, sentences), and whether an answer is a refusal.

A limit or a refusal is found only where its meaning is certain.
"Think of two words that mean the same" names what is asked for, not its length.
"""

import re

from fledge.text.stories import sentences

_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: number for number, word in enumerate(_WORDS, 1)}
NUMBER = rf"\d+|{'|'.join(NUMBER_WORDS)}"
UNIT = r"(?:(?:short|simple|single|complete|full) )?(?P<unit>word|sentence)s?"
BOUNDS = {
    "below": r"under|below|fewer than|less than",
    "most": r"at most|no more than|not more than|not (?:be )?(?:more|longer) than|up to|(?:a )?maximum of|within",
    "least": r"at least|no (?:fewer|less) than|not (?:fewer|less) than|(?:a )?minimum of",
    "more": r"more than|over|above",
    "exactly": r"exactly|precisely",
}
BOUND = "|".join(f"(?P<{name}>{pattern})" for name, pattern in BOUNDS.items())
AFTER = r"(?P<or_less> or (?:less|fewer|under)| at most| max(?:imum)?\b)?(?P<or_more> or more| at least)?"
NOT_FOLLOWED = r"(?![-\w])(?! (?:each|per|for each|from|of|below|above)\b)"
ASKS = r"(?:answer|reply|respond|explain|describe|summari[sz]e|say|put|shorten|reduce|limit|cut|sum)"
LIMIT = re.compile(
    r"(?:"
    # "in two sentences", "in under 20 words"; "of exactly 5 words", but not "of 5 words", which may name anything
    rf"\bin (?:only |just |about )?(?:(?:{BOUND}) )?(?P<in>{NUMBER}) {UNIT}"
    rf"|(?:{BOUND.replace('(?P<', '(?P<b_')}) (?P<bounded>{NUMBER}) {UNIT.replace('(?P<', '(?P<b_')}"
    # "answer with one word", "shorten it to one sentence"
    rf"|\b{ASKS}\b[^.!?]*? (?:with|to|using) (?:only |just )?(?P<asked>{NUMBER}) {UNIT.replace('(?P<', '(?P<a_')}"
    rf")\b{AFTER}{NOT_FOLLOWED}",
    re.IGNORECASE,
)
NEGATED = re.compile(r"(?:\b(?:not|never|without|avoid|don't)\b|n't\b)[^.!?]{0,30}$", re.IGNORECASE)
EACH = re.compile(r"\b(?:each|every)\b[^.!?]{0,20}$", re.IGNORECASE)
QUOTED = re.compile(r'"[^"]*"?|“[^”]*”?|(?<!\w)\'(?:[^\'\n]|(?<=\w)\'(?=\w))*\'(?!\w)')
LIST_MARK = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+", re.MULTILINE)

# What one declines to do. "I cannot go to the park" and "I will not succeed" are answers like any other.
DONE = (
    r"help\b(?! (?:but|feeling|it)\b)|assist|answer|provide|write|give|tell you (?!how\b)|share|create|generate"
    r"|complete|fulfil|support|discuss|comply|engage|recommend|offer|retrieve|access|estimate|describe|judge|make|show"
    r"|continue|advise|browse|produce|respond|perform|summari[sz]e|review|process|teach|encourage|promote|pretend"
    r"|send|open|guess|diagnose|speculate|draw|display|disclose|reveal|hand out|participate"
    r"|do (?:this|that|it|so)\b|say\b(?! (?:enough|no|that I)\b)|talk about|take part in|be (?:of help|part of)|go into"
    r"|look up|verify|confirm"
)
REFUSAL = re.compile(
    rf"\b(?:I|we) (?:simply |really |just |therefore |also )*(?:can(?:not|'t| not)|won't|will not|could not|couldn't"
    rf"|am not able to|am unable to|refuse to|decline to) (?:\w+ly |in good \w+ )?(?:{DONE})"
    rf"|\b(?:I'm|I am) (?:not able|unable|not going) to (?:\w+ly )?(?:{DONE})"
    r"|\b(?:I|we) (?:must|have to) (?:decline|refuse)\b"
    r"|\b(?:do not|don't) feel comfortable\b|\bI(?:'d| would) rather not\b"
    r"|\bnot something I (?:can|will) (?:help|do|assist)\b"
    r"|\bI'm sorry, but (?:that|this) is (?:not something|beyond|outside)"
    r"|\bAs an AI\b(?![^.!?]*\b(?:but|however)\b)[^.!?]*(?:n't|\bnot|\bunable|\bcannot)\b"
    r"|\bI (?:do not|don't) have access to\b",
    re.IGNORECASE,
)


def refused(text: str) -> bool:
    """Whether an answer refuses in its first two sentences. Quotations do not count."""
    own = QUOTED.sub(" ", text.replace("’", "'"))
    return any(REFUSAL.search(sentence.rstrip(".!?")) for sentence in sentences(own)[:2])


def limits_met(instruction: str, text: str) -> bool | None:
    """Whether `text` keeps the number of words or sentences that an instruction states; None if it states none.

    A bare number of sentences, or "one word", is an exact limit; any other bare number of words is an upper limit.
    Numbers for a part of the answer ("in two sentences each") and numbers in a quotation are no limits.
    """
    asked = QUOTED.sub(" ", instruction.replace("’", "'"))
    found = LIMIT.search(asked)
    if not found or NEGATED.search(asked[: found.start()]) or EACH.search(asked[: found.start()]):
        return None
    stated = {name.removeprefix("b_").removeprefix("a_"): value for name, value in found.groupdict().items() if value}
    number = next(stated[name] for name in ("in", "bounded", "asked") if name in stated).lower()
    unit, allowed = stated["unit"].lower(), NUMBER_WORDS.get(number) or int(number)
    count = len(LIST_MARK.sub("", text).split()) if unit == "word" else len(sentences(text))
    if "below" in stated:
        return 0 < count < allowed
    if "more" in stated:
        return count > allowed
    if "least" in stated or "or_more" in stated:
        return count >= allowed
    if "most" in stated or "or_less" in stated:
        return 0 < count <= allowed
    if "exactly" in stated or unit == "sentence" or allowed == 1:
        return count == allowed
    return 0 < count <= allowed
