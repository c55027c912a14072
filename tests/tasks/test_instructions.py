import json
import random
from collections import Counter

import pytest
from conftest import ROOT

from fledge.messages import Answer
from fledge.tasks import RejectedRecord, load_task
from fledge.tasks.instructions import CATEGORIES, last_number, parses
from fledge.text.limits import refused

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


@pytest.mark.parametrize(
    ("given", "category"),
    [
        ("Closed QA", "closed_qa"),
        (" creative-writing", "creative_writing"),
        ("feeling", "closed_qa"),
        ("math", "other"),
    ],
)
def test_a_category_is_known_in_any_spelling(given, category):
    record = {"instruction": "Sing.", "output": "La.", "category": given}
    assert TASK.examples(record, random.Random(0))[0]["category"] == category


@pytest.mark.parametrize("nothing", ["", " \n", "\u200b", "\ufeff\u00a0", "\0"])
def test_what_nobody_sees_is_no_answer(nothing):
    with pytest.raises(RejectedRecord, match="a question or an answer is empty"):
        TASK.examples({"instruction": "Sing.", "output": nothing}, random.Random(0))


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
