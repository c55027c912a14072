"""How answers end, and what it costs to end as too many others do."""

import pytest

from fledge.messages import Answer
from fledge.rewards.usual import Usual, Varied
from fledge.tasks import load_task

LATE, BACK = "But it was too late.", "He never came back home."


def row(prompt: str, answer: str = "", kind: str = "words") -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "kind": kind}


def rewards(answers: list[tuple[str, str]], trained: list[str]) -> list[float]:
    """The reward of each answer, which is a prompt and a text, after training on the answers `trained`."""
    varied = Varied(load_task("story_chat"), [row("", text) for text in trained])
    rows = [row(prompt) for prompt, _ in answers]
    endings = varied.endings(rows, [Answer(text, 9, True) for _, text in answers])
    return varied.rewards(endings, endings)


def other(number: int) -> str:
    return f"Animal {number} ran number {number} home."


@pytest.mark.parametrize(
    ("late", "trained", "reward"),
    [
        (1, 0, 1.0),  # no other answer ends so
        (2, 0, 0.6),  # one of ten others, and a quarter is too many
        (3, 0, 0.2),
        (4, 0, 0.0),
        (11, 0, 0.0),
        (4, 2, 0.6),  # three of ten others, two of ten training answers
        (4, 3, 1.0),
        (4, 9, 1.0),
    ],
)
def test_an_ending_may_be_as_common_as_in_training(late, trained, reward):
    texts = [LATE] * late + [other(i) for i in range(11 - late)]
    found = rewards([(f"prompt {i}", text) for i, text in enumerate(texts)], [LATE] * trained + [BACK] * (10 - trained))
    assert found == pytest.approx([reward] * late + [1.0] * (11 - late))


def test_answers_to_one_prompt_may_end_alike():
    alike = [("Tell of a dog.", LATE)] * 8 + [(f"prompt {i}", other(i)) for i in range(8)]
    assert rewards(alike, [BACK]) == [1.0] * 16


def test_an_answer_too_short_to_have_an_ending_is_varied():
    assert (
        rewards([(f"prompt {i}", text) for i, text in enumerate(["", "Yes.", "He ran home."] * 3)], [BACK]) == [1.0] * 9
    )


def test_a_kind_of_prompt_that_training_lacks_has_no_usual_answer():
    usual = Usual(load_task("story_chat"), [row("", BACK)])
    for text in ("", BACK, f"{BACK} " * 9):
        assert usual.reward(row("", kind="who"), Answer(text, 9, True)) == 1
        assert usual.reward(row("", kind="words"), Answer(text, 9, True)) == (text == BACK)


def test_few_prompts_do_not_tell_what_is_common():
    answers = [(f"prompt {i}", LATE) for i in range(7)]
    assert rewards(answers[:6], [BACK]) == [1.0] * 6
    assert rewards(answers, [BACK]) == [0.0] * 7


def test_an_ending_is_common_among_answers_of_its_kind():
    varied = Varied(load_task("story_chat"), [row("", BACK)])
    rows = [row(f"prompt {i}", kind=kind) for kind in ("words", "summary") for i in range(8)]
    answers = [Answer(LATE, 9, True)] * 8 + [Answer(other(i), 9, True) for i in range(7)] + [Answer(LATE, 9, True)]
    endings = varied.endings(rows, answers)
    assert varied.rewards(endings, endings) == [0.0] * 8 + [1.0] * 8
    assert varied.rewards(endings[:5], endings) == [0.0] * 5  # the part of one process


@pytest.mark.parametrize(("words", "reward"), [(36, 0.0), (37, 1.0), (40, 1.0)])
def test_the_last_forty_words_are_how_an_answer_ends(words, reward):
    def text(number: int) -> str:
        return f"It was too late. {' '.join(f'word{number}x{i}' for i in range(words))}"

    assert rewards([(f"prompt {i}", text(i)) for i in range(8)], [BACK]) == [reward] * 8
