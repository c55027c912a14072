import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fledge.evaluation.wording import (
    Wording,
    continues_prompt,
    copied,
    distinct_2,
    instruction_openings,
    repetition,
    same_ending,
    template_marks,
    unique,
)
from fledge.messages import INPUT_MARK, Answer
from fledge.templates import load_template
from fledge.text.words import as_written

TEXTS = st.lists(st.text(alphabet="ab .\n", max_size=60), min_size=1, max_size=8)


def turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 1 / 5),  # of abcd bcda cdab dabc abcd the last
        ("no no no no no no no", 3 / 4),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


def test_copied_is_the_share_of_words_in_a_run_of_eight():
    training = ["Once upon a time there was a little dog named Max.", "He ran home."]
    texts = [
        "Once upon a time there was a little dog named Max.",
        "Once upon a time, there was a LITTLE cat named Max who ran",  # eight of its thirteen words
        "a b c d e f g h i j",
        "he ran home",
    ]
    assert copied(texts, iter(training)) == [1.0, pytest.approx(8 / 13), 0.0, None]


def test_runs_do_not_cross_from_one_training_text_to_the_next():
    assert copied(["a b c d e f g h"], ["a b c d", "e f g h"]) == [0.0]


@given(TEXTS)
def test_distinct_2_is_different_pairs_over_all_pairs(texts):
    parts = distinct_2(texts)
    pairs = [pair for text in texts for pair in zip(as_written(text), as_written(text)[1:], strict=False)]
    assert sum(share for share, _ in parts) == pytest.approx(len(set(pairs)))
    assert sum(count for _, count in parts) == len(pairs)


@given(TEXTS)
def test_unique_answers(texts):
    for text, is_unique in zip(texts, unique(texts), strict=True):
        assert is_unique == (sum(as_written(other) == as_written(text) for other in texts) == 1)


def test_the_ending_that_most_texts_share():
    middle = " and the dog ran on" * 9  # 45 words
    texts = [
        "It was too late. She cried.",
        "The cat ran home. But it was too late!",
        f"It was too late.{middle}",  # not at its end
        "He was never seen again.",
        "",
    ]
    assert same_ending(texts) == [True, True, False, False, False]
    assert same_ending(texts[2:]) == [False, False, False]
    assert same_ending(["The cat ran back home.", "A dog ran back home."]) == [False, False]  # three words
    assert same_ending([]) == []


@given(TEXTS, st.randoms())
def test_the_order_of_texts_does_not_change_which_ending_is_shared(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    found = same_ending([texts[i] for i in order])
    assert found == [same_ending(texts)[i] for i in order]


def test_openings_are_those_of_prompts_and_not_those_of_stories():
    stories = ["Once upon a time there was a dog.\nOne day, he ran.", "One day, a cat sat."]
    conversations = [
        *(turn(f"Write a story about: thing {i}\nWith: sad ending", stories[i % 2]) for i in range(60)),
        *(turn(f"Sum this story up.{INPUT_MARK}{stories[0]}\nMax number {i} ran.", "A dog ran.") for i in range(60)),
        turn("Only asked once, here.", "Yes."),
    ]
    assert instruction_openings(conversations) == {"write a story", "with sad ending", "sum this story"}


@pytest.mark.parametrize(
    ("answer", "goes_on"),
    [
        ("Once upon a time.", False),
        ("She wanted to write a story about it.", False),
        ("He ran.\nWrite a story about: a cat", True),
        ("He ran.\n\n### Story:\nShe ran.", True),
    ],
)
def test_going_on_with_the_prompts_form(answer, goes_on):
    assert continues_prompt(answer, {"### Story:"}, {"write a story"}) is goes_on


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny.data / "tokenizer")


def test_marks_are_what_a_template_puts_around_messages(tokenizer):
    assert template_marks(tokenizer, [turn("Write it.", "Yes.")]) == {"### Story:"}
    tokenizer.chat_template = load_template("alpaca")
    marks = template_marks(tokenizer, [turn("Write it.", "Yes."), turn(f"Sum it up.{INPUT_MARK}A text.", "Yes.")])
    assert {"### Instruction:", "### Input:", "### Response:"} <= marks
    assert not any("Sum" in mark or "Yes" in mark for mark in marks)


def test_an_empty_answer_is_no_answer(tokenizer):
    rows = [{"messages": turn("Write a story about: a cat", "It sat.")}]
    scores = Wording(tokenizer, rows, rows).score(
        [Answer("", 1, True), Answer("It sat.", 3, True), Answer("x\n### Story:\nx", 9, False)]
    )
    assert [score["answered"] for score in scores] == [0.0, 1.0, 0.0]
    assert [score["eos_rate"] for score in scores] == [1.0, 1.0, 0.0]
    assert all("copied" not in score for score in scores)


def test_only_what_training_answers_say_counts_as_copied(tokenizer):
    asked, told = "Write me a story about a cat that can fly.", "There was a cat that flew over the old town."
    scores = Wording(tokenizer, [], [{"messages": turn(asked, told)}]).score(
        [Answer(text, 9, True) for text in (asked, told, told)]
    )
    assert [score["copied"] for score in scores] == [0, 1, 1]
    assert [score["distinct_answers"] for score in scores] == [1, 0, 0]
