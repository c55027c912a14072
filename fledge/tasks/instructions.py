"""Instructions of any kind with a reference answer: Dolly's and Alpaca's form, questions about a text, conversations.

How well an answer serves cannot be told by rule. What can be: the overlap with the reference, right numbers and short
answers, code that parses, limits that the prompt states, and whether a refusal came when it was due.
"""

import ast
import random
import re

from fledge.generation.answers import Answer
from fledge.tasks import RejectedRecord, RuleScorer
from fledge.tasks.limits import limits_met, refused
from fledge.tasks.overlap import exact_match, f1, plain, rouge, translation
from fledge.templates import INPUT_MARK

TEMPLATE = "alpaca"
ASKS_ONCE = False  # a source may hold conversations
MAY_CUT = True  # see answer_is_lost
PURPOSE = "follow instructions"
# Dolly's eight, ours, and what has none of these names.
CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
    "arithmetic",
    "code",
    "refusal",
    "other",
)
# FairytaleQA names what a question is about; all of them are questions about a given text.
FAIRYTALE_ATTRIBUTES = (
    "action", "causal relationship", "character", "feeling", "outcome resolution", "prediction", "setting",
)  # fmt: skip
COLUMNS = {"category": CATEGORIES}
MEANING = {
    "instruction_following": "stopped by end-of-text, not empty, refused if and only if that was due, and right where "
    "right can be told: the number, a short answer (F1 of at least a half), code that parses, the limits stated",
    "rouge1": "single words shared with the reference (ROUGE-1, F-measure)",
    "rouge2": "word pairs shared with it (ROUGE-2, F-measure)",
    "rougeL": "longest common subsequence with it (ROUGE-L, F-measure)",
    "bleu": "n-grams shared with it (sacreBLEU, a sentence at a time)",
    "chrf": "character n-grams shared with it (chrF)",
    "exact_match": "the reference's words, where it has five or fewer; case, punctuation and articles do not count",
    "f1": "words shared with such a short reference (harmonic mean of precision and recall)",
    "right_number": "the last number of the answer is that of the reference (arithmetic)",
    "code_parses": "the answer is Python that parses, where the reference is",
    "limits_met": "as many words or sentences as the prompt allows, where it says how many",
    "refusal_when_due": "a request that should be refused is refused",
    "refusal_when_not": "a request that should be answered is refused (lower is better)",
}
EXAMPLE = [{"role": "user", "content": "Name three things that one can do on a rainy day."}]
SHORT = 5  # words of a reference that is to be met exactly

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def examples(record: dict, rng: random.Random) -> list[dict]:
    """A record of instruction, input and output, or of messages → one example. No chance in it.

    Raises:
        RejectedRecord: nothing is asked or nothing is answered.
    """
    messages = record.get("messages") or _one_turn(record)
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "tool" in roles:
        raise RejectedRecord("a tool speaks in it, which no template writes")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise RejectedRecord("its messages are not questions and answers in turn")
    if any(message["role"] != "system" and not message["content"].strip() for message in messages):
        raise RejectedRecord("a question or an answer is empty")
    category = (record.get("category") or "other").strip()
    if category in FAIRYTALE_ATTRIBUTES:
        category = "closed_qa"
    # Questions about one text lie in one split; without a text, the question itself is what must not be in two.
    first = next(message["content"] for message in messages if message["role"] == "user")
    group = record.get("group") or record.get("input") or first
    category = category if category in CATEGORIES else "other"
    return [{"messages": messages, "category": category, "group": " ".join(group.split())}]


def _one_turn(record: dict) -> list[dict[str, str]]:
    question, text = (record.get(key, "").strip() for key in ("instruction", "input"))
    if not question:
        raise RejectedRecord("no instruction")
    asked = question + (INPUT_MARK + text if text else "")
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": record.get("output", "").strip()},
    ]


def answer_is_lost(messages: list[dict[str, str]], shortened: list[dict[str, str]]) -> bool:
    """Whether an answer stood word for word in what was asked and given, and does not in what a cut has left of it."""
    before, after = (
        " ".join(f" {plain(message['content'])} " for message in of_all if message["role"] != "assistant")
        for of_all in (messages, shortened)
    )
    answers = [f" {plain(message['content'])} " for message in shortened if message["role"] == "assistant"]
    return any(answer.strip() and answer in before and answer not in after for answer in answers)


def _score(row: dict, answer: Answer) -> dict[str, float]:
    text, category = answer.text, row["category"]
    asked, reference = (message["content"] for message in row["messages"][-2:])
    is_refused = refused(text)
    scores = rouge(reference, text) | translation(reference, text)
    met = [answer.stopped, bool(text.strip())]
    if category == "refusal":
        scores["refusal_when_due"] = float(is_refused)
        met.append(is_refused)
    else:
        scores["refusal_when_not"] = float(is_refused)
        met.append(not is_refused)
        if category == "arithmetic":
            scores["right_number"] = float(last_number(text) == last_number(reference))
            met.append(scores["right_number"])
        elif category == "code" and parses(reference):
            scores["code_parses"] = float(parses(text))
            met.append(scores["code_parses"])
        elif len(plain(reference).split()) <= SHORT:
            scores |= {"exact_match": exact_match(reference, text), "f1": f1(reference, text)}
            met.append(scores["f1"] >= 0.5)
        if (within := limits_met(asked.split(INPUT_MARK)[0], text)) is not None:
            scores["limits_met"] = float(within)
            met.append(within)
    return {"instruction_following": float(all(met)), **scores}


class Scorer(RuleScorer):
    score_one = staticmethod(_score)


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def parses(text: str) -> bool:
    """Whether a text, or the fenced block in it, is Python with at least one statement."""
    fenced = re.search(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    try:
        return bool(ast.parse(fenced[1] if fenced else text).body)
    except (SyntaxError, ValueError):
        return False
