"""Any instructions with a reference answer: Dolly's and Alpaca's form, questions about a text, conversations.

No rule can tell how good an answer is. Rules can measure its overlap with the reference, whether numbers and short
answers are right, whether code parses, whether limits of the prompt are met, and whether a refusal was due.
"""

import ast
import random
import re

from fledge.messages import INPUT_MARK, Answer, Messages
from fledge.reading.values import is_visible, why_unusable
from fledge.tasks import RejectedRecord, Task
from fledge.text.limits import limits_met, refused
from fledge.text.overlap import exact_match, f1, plain, rouge, translation

# Dolly's eight categories, four of this project, and "other" for any other name.
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
# FairytaleQA's attributes of questions: all are questions about a given text.
FAIRYTALE_ATTRIBUTES = (
    "action", "causal relationship", "character", "feeling", "outcome resolution", "prediction", "setting",
)  # fmt: skip
SHORT = 5  # words: a shorter reference must be matched exactly

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


class Instructions(Task):
    """A record of `instruction`, `input` and `output`, or of `messages`, gives one example."""

    template = "alpaca"
    purpose = "follow instructions"
    example = [{"role": "user", "content": "Name three things that one can do on a rainy day."}]
    columns = {"category": CATEGORIES}
    meaning = {
        "instruction_following": "stopped by end-of-text, not empty, refused if and only if that was due, and right "
        "where right can be told: the number, a short answer (F1 of at least a half), code that parses, the limits "
        "stated",
        "responds": "not empty, and a refusal if and only if one is due",
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
    constraints = {"responds": 1.0, "right_number": 1.0, "code_parses": 1.0, "f1": 0.5, "limits_met": 1.0}
    # Overlap does not measure quality, but it gives every answer a reward; without it most prompts would give none.
    rewards = {**dict.fromkeys(constraints, 1.0), "rougeL": 0.5}
    may_cut = True  # see answer_is_lost

    def examples(self, record: dict, rng: random.Random) -> list[dict]:
        """One example, the same for every `rng`. Its group is that of the record, or else its text or its question.

        Raises:
            RejectedRecord: the record has no question or no answer, or its messages cannot be used.
        """
        messages = record["messages"] if "messages" in record else _one_turn(record)
        if why := why_unusable(messages):
            raise RejectedRecord(why)
        category = (record.get("category") or "other").strip().lower()
        if category in FAIRYTALE_ATTRIBUTES:
            category = "closed_qa"
        category = re.sub(r"[\s-]+", "_", category)  # "Closed QA"
        category = category if category in CATEGORIES else "other"
        # Questions about one text must lie in one split; without a text, repetitions of a question must.
        first = next(message["content"] for message in messages if message["role"] == "user")
        group = record.get("group") or record.get("input") or first
        return [{"messages": messages, "category": category, "group": " ".join(group.split())}]

    def score(self, row: dict, answer: Answer) -> dict[str, float]:
        text, category = answer.text, row["category"]
        asked, reference = (message["content"] for message in row["messages"][-2:])
        is_refused, is_due = refused(text), category == "refusal"
        scores = rouge(reference, text) | translation(reference, text)
        scores["refusal_when_due" if is_due else "refusal_when_not"] = float(is_refused)
        scores["responds"] = float(is_visible(text) and is_refused == is_due)
        if is_due:
            return scores
        if category == "arithmetic":
            scores["right_number"] = float(last_number(text) == last_number(reference))
        elif category == "code" and parses(reference):
            scores["code_parses"] = float(parses(text))
        elif len(plain(reference).split()) <= SHORT:
            scores |= {"exact_match": exact_match(reference, text), "f1": f1(reference, text)}
        if (within := limits_met(asked.split(INPUT_MARK)[0], text)) is not None:
            scores["limits_met"] = float(within)
        return scores

    def kind(self, row: dict) -> str:
        return row["category"]

    def answer_is_lost(self, messages: Messages, shortened: Messages) -> bool:
        """Whether an answer occurred word for word in the prompt and no longer does."""
        before, after = (
            " ".join(f" {plain(message['content'])} " for message in of_all if message["role"] != "assistant")
            for of_all in (messages, shortened)
        )
        answers = [f" {plain(message['content'])} " for message in shortened if message["role"] == "assistant"]
        return any(answer.strip() and answer in before and answer not in after for answer in answers)


def _one_turn(record: dict) -> list[dict[str, str]]:
    question, text = (record.get(key, "").strip() for key in ("instruction", "input"))
    if not question:
        raise RejectedRecord("no instruction")
    asked = question + (INPUT_MARK + text if text else "")
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": record.get("output", "").strip()},
    ]


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
