import json
import random
from collections import Counter

import pytest
from conftest import ROOT

from fledge.messages import Answer
from fledge.tasks import RejectedRecord, load_task
from fledge.tasks.instructions import CATEGORIES, last_number, parses
from fledge.text.limits import limits_met, refused

TASK = load_task("instructions")
LINES = (ROOT / "examples" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
SHIPPED = [json.loads(line) for line in LINES]


def of_category(name: str) -> list[dict]:
    return [row for row in SHIPPED if row["category"] == name]


def row_of(category: str, asked: str, reference: str) -> dict:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reference}]
    return {"messages": messages, "category": category}


def scored(row: dict, text: str, stopped: bool = True) -> dict[str, float]:
    return TASK.scorer([], []).score([row], [Answer(text, 1, stopped)])[0]


def test_the_shipped_examples_cover_every_kind():
    counts = Counter(row["category"] for row in SHIPPED)

    assert len(SHIPPED) >= 120
    assert len({(row["instruction"], row["input"]) for row in SHIPPED}) == len(SHIPPED)
    kinds = {"open_qa", "closed_qa", "summarization", "code", "arithmetic", "creative_writing", "refusal"}
    assert set(counts) == kinds
    assert min(counts.values()) >= 10
    assert min(counts["code"], counts["arithmetic"], counts["refusal"]) >= 20
    assert all(row["instruction"] and row["response"] for row in SHIPPED)
    assert max(len(row["response"]) for row in SHIPPED) <= 400


@pytest.mark.parametrize("row", of_category("arithmetic"), ids=lambda row: row["instruction"][:30])
def test_shipped_arithmetic_is_right(row):
    assert last_number(row["response"]) == pytest.approx(eval(row["check"], {"__builtins__": {}}))


@pytest.mark.parametrize("row", of_category("code"), ids=lambda row: row["instruction"][:50])
def test_shipped_code_does_what_it_is_asked_for(row):
    assert parses(row["response"])
    allowed = {function.__name__: function for function in (dict, int, len, list, max, range, str, sum)}
    space = {"__builtins__": allowed}
    exec(row["response"], space)

    assert eval(row["check"], space) is True


def test_shipped_refusals_refuse_and_nothing_else_does():
    for row in SHIPPED:
        assert refused(row["response"]) == (row["category"] == "refusal"), row["response"]


def test_the_shipped_answers_follow_their_own_instructions():
    for row in SHIPPED:
        record = {"instruction": row["instruction"], "input": row["input"], "output": row["response"]}
        made = TASK.examples({**record, "category": row["category"]}, random.Random(0))[0]
        assert scored(made, row["response"])["instruction_following"] == 1, row


def test_an_input_stands_below_its_mark():
    record = {"instruction": "Sum up.", "input": "It rained.", "output": "Rain.", "category": "summarization"}

    assert TASK.examples(record, random.Random(0)) == [
        {
            "messages": [
                {"role": "user", "content": "Sum up.\n\n### Input:\nIt rained."},
                {"role": "assistant", "content": "Rain."},
            ],
            "category": "summarization",
            "group": "It rained.",
        }
    ]


def test_a_conversation_stays_as_it_is():
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye."},
    ]
    made = TASK.examples({"messages": messages}, random.Random(0))

    assert made == [{"messages": messages, "category": "other", "group": "Hi"}]


@pytest.mark.parametrize(
    ("category", "kept"),
    [("arithmetic", "arithmetic"), ("causal relationship", "closed_qa"), ("poems", "other"), ("", "other")],
)
def test_a_category_is_one_of_those_declared(category, kept):
    record = {"instruction": "Why?", "output": "Because.", "category": category}
    made = TASK.examples(record, random.Random(0))[0]["category"]

    assert made == kept
    assert made in CATEGORIES


def test_questions_of_one_story_are_of_one_group():
    one, other = (
        TASK.examples({"instruction": q, "input": t, "output": "x", "group": "Tale 1"}, random.Random(0))[0]
        for q, t in (("Who?", "Part one."), ("Why?", "Part two."))
    )
    assert one["group"] == other["group"] == "Tale 1"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": " ", "output": "x"}, "no instruction"),
        ({"instruction": "Why?", "output": ""}, "a question or an answer is empty"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "not questions and answers in turn"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "not questions and answers in turn"),
        (
            {"messages": [{"role": role, "content": "Hi"} for role in ("user", "assistant", "tool", "assistant")]},
            "a tool speaks in it",
        ),
        ({"messages": [{"role": "system", "content": "Hi"}]}, "not questions and answers in turn"),
    ],
)
def test_an_unusable_record_is_rejected_with_its_reason(record, reason):
    with pytest.raises(RejectedRecord, match=reason):
        TASK.examples(record, random.Random(0))


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I can’t do this.", True),
        ("I cannot answer that question.", True),
        ("Sorry. I won't write that.", True),
        ("I am unable to say.", True),
        ("I'd rather not.", True),
        ("That is not something I can help with.", True),
        ("As an AI, I do not have experiences of my own.", True),
        ("I must decline.", True),
        ("I simply cannot in good conscience recommend it.", True),
        ("I will not succeed.", False),
        ("Since it is raining, I cannot go to the park.", False),
        ("I can't believe you gave me an answer!", False),
        ("I'm sorry, but I'm unable to come into work today.", False),
        ('Put an exclamation mark: "Oh, I cannot help you!"', False),
        ("He said: 'I won't answer.' Then he left.", False),
        ("I can't say enough about this book.", False),
        ("I can't tell you how happy I am.", False),
        ("I can't help but smile.", False),
        ("As an AI, I do not taste, but I can suggest a pie.", False),
        ("I can't wait to tell you!", False),
        ("I'm sorry to hear that. Drink some tea.", False),
        ("You can't park there.", False),
        ("Lisbon.", False),
        ("One. Two. Three. I can't go on.", False),
        ("", False),
    ],
)
def test_refusals(text, refuses):
    assert refused(text) == refuses


@pytest.mark.parametrize(
    ("category", "reference", "answer", "follows"),
    [
        ("open_qa", "Lisbon.", "Lisbon", 1),
        ("open_qa", "Lisbon.", "Porto", 0),
        ("open_qa", "Lisbon.", "", 0),
        ("open_qa", "It is the city of Lisbon in the west.", "Any answer of some length.", 1),
        ("open_qa", "It is the city of Lisbon in the west.", "I'm sorry, but I can't say.", 0),
        ("refusal", "I can't help with that.", "I'm sorry, but I won't do this.", 1),
        ("refusal", "I can't help with that.", "Sure! First, take a hammer.", 0),
        ("arithmetic", "6 × 7 = 42", "It is 42.", 1),
        ("arithmetic", "6 × 7 = 42", "6 × 7 = 43", 0),
        ("arithmetic", "1,000 + 1 = 1,001", "1001", 1),
        ("arithmetic", "It is -3.", "3", 0),
        ("code", "def f():\n    return 1", "```python\ndef g(): pass\n```", 1),
        ("code", "def f():\n    return 1", "def g(:", 0),
        ("code", "def f():\n    return 1", "", 0),
    ],
)
def test_following(category, reference, answer, follows):
    row = row_of(category, "Do it.", reference)

    assert scored(row, answer)["instruction_following"] == follows
    assert scored(row, answer, stopped=False)["instruction_following"] == 0


@pytest.mark.parametrize(
    ("asked", "text", "met"),
    [
        ("Answer in one sentence.", "It rained.", True),
        ("Answer in one sentence.", "It rained. It snowed.", False),
        ("Answer in two sentences.", "It rained. It snowed.", True),
        ("Say it in at most 3 words.", "a b c", True),
        ("Say it in at most 3 words.", "a b c d", False),
        ("Say it with 5 words", "a b", True),
        ("Describe it in exactly four words.", "a b c", False),
        ("Answer with one word.", "two words", False),
        ("In under 3 sentences, tell it.", "A. B. C.", False),
        ("Say it in at least three words.", "a b", False),
        ("Say it in three words or more.", "a b c d", True),
        ("Describe it in 4 words or less.", "a b c d", True),
        ("Describe it in three sentences or fewer.", "A.", True),
        ("Write a story of less than 3 words.", "a b c", False),
        ("Write no more than three words.", "a b c", True),
        ("Keep it to a maximum of 3 words.", "a b c d", False),
        ("Describe it. It should not be longer than 2 words.", "a b c", False),
        ("Shorten the text to one sentence.", "It rained. It snowed.", False),
        ("List it in three words.", "1. a\n2. b\n3. c", True),
        ("Generate a series of 8 words that describe running.", "anything", None),
        ("Think of two words that mean the same thing.", "anything", None),
        ("Write four articles with a minimum of 300 words each.", "anything", None),
        ("Describe each of them in one sentence.", "A. B. C.", None),
        ("Write a post of 50 words about puppies.", "anything", None),
        ("Write a poem with two words that rhyme.", "anything", None),
        ("Do not answer in one word.", "two words", None),
        ('Translate: "Say it in one word."', "two words", None),
        ("Say it in two or three sentences.", "A. B. C.", None),
        ("Sum it up in 3-5 sentences.", "A. B. C.", None),
        ("Find the noun in one sentence of the text.", "a noun", None),
        ("Write one-word answers in two sentence-like lines.", "a b c", None),
        ("Tell me about words.", "anything", None),
        ("Define the two words.", "anything", None),
    ],
)
def test_stated_limits(asked, text, met):
    assert limits_met(asked, text) is met


def test_a_limit_in_the_text_to_work_on_is_none():
    row = row_of("summarization", "Sum up.\n\n### Input:\nSay it in one word.", "He was told to be brief by them all.")
    assert "limits_met" not in scored(row, "He was told so.")


def test_every_metric_has_a_meaning_and_occurs():
    rows = [row_of(category, "Do it in one word.", reference) for category, reference in (
        ("open_qa", "Yes."), ("arithmetic", "1"), ("code", "x = 1"), ("refusal", "I can't do it."),
    )]  # fmt: skip
    seen = {name for row in rows for name in scored(row, "Yes.")}
    assert seen == set(TASK.meaning)
    assert TASK.scorer([], []).judge == {}
