import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.evaluation.chance import against_others, chance_levels, dependent, permutations
from fledge.evaluation.intervals import interval, means
from fledge.messages import Answer
from fledge.tasks import load_task


class Echo:
    """Scores 1 for an answer that is the word asked for, and 1 for any answer's being there."""

    def score(self, rows, answers):
        return [
            {"right": float(row["messages"][0]["content"] == answer), "there": 1.0}
            for row, answer in zip(rows, answers, strict=True)
        ]


def the_other(row: dict, other: dict) -> dict:
    return other


def row(word: str) -> dict:
    return {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}


def chance_of(answers: list[str], words: list[str], weights=None) -> tuple[float, set[str]]:
    """The chance level of `right`, and the metrics that depend on the instruction."""
    rows = [row(word) for word in words]
    others = permutations(rows, ["one"] * len(rows))
    weights = np.ones(len(rows)) if weights is None else weights
    found, scored = against_others(Echo(), rows, answers, others, weights, the_other)
    own = Echo().score([rows[i] for i in range(len(answers))], answers)
    return interval(found["right"])["value"], dependent(own, scored)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), min_size=1, max_size=12),
    st.sampled_from([1, 20, 1000]),
)
def test_every_row_meets_others_of_its_kind_and_never_itself(drawn, pairs):
    kinds, rows = [kind for kind, _ in drawn], [row(f"{kind}{word}") for kind, word in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fledge.evaluation.chance.PAIRS", pairs)
        found = permutations(rows, kinds)
        assert (found == permutations(rows, kinds)).all()
    for number, kind in enumerate(kinds):
        met = [place for place in found[:, number] if place >= 0]
        assert all(kinds[place] == kind and place != number for place in met)
        assert len(set(met)) == len(met)
        asked = {rows[other]["messages"][0]["content"] for other in range(len(rows)) if kinds[other] == kind}
        assert bool(met) == (len(asked) > 1)
        assert len(met) == len(found) or len(met) == kinds.count(kind) - 1 or not met
    for places in found:
        kept = places[places >= 0]
        assert len(set(kept)) == len(kept)


def test_what_ignores_its_instruction_is_at_chance_and_others_above():
    words = ["happy", "sad"] * 50
    assert abs(chance_of(["happy"] * 100, words)[0] - 0.5) < 0.02
    chance, depends = chance_of(words, words)
    assert abs(chance - 0.5) < 0.1
    assert depends == {"right"}


def test_always_the_frequent_answer_is_at_chance_however_frequent_it_is():
    words = ["yes"] * 95 + ["no"] * 5
    assert abs(chance_of(["yes"] * 100, words)[0] - 0.95) < 0.01
    assert chance_of(["yes"] * 100, words, weights=np.array([0.5 / 0.95] * 95 + [0.5 / 0.05] * 5))[0] < 0.55


def test_every_sample_of_a_prompt_meets_another_prompt():
    rows = [row(word) for word in "abc"]
    found, scored = against_others(Echo(), rows, list("bbccaa"), np.array([[1, 2, 0]]), np.ones(3), the_other)
    assert sorted(number for number, _ in scored) == list(range(6))
    assert interval(found["right"])["value"] == 1.0
    assert interval(means(Echo().score([rows[i // 2] for i in range(6)], list("bbccaa")), 2)["right"])["value"] == 0.0


class TopicAndEnding:
    """Scores an answer `topic ending` by its two words."""

    def score(self, rows, answers):
        scores = []
        for row, answer in zip(rows, answers, strict=True):
            asked = row["messages"][0]["content"]
            topic, ending = (word in asked for word in answer.text.split())
            scores.append({"both": float(topic and ending), "topic": float(topic), "ending": float(ending)})
        return scores


def test_chance_is_what_is_reached_without_the_part_that_matters_least():
    task = load_task("topic_ending")
    asked = [(f"topic{number:03}", ("happy", "sad")[number % 2]) for number in range(100)]
    rows = [row(f"Write a story about: {topic}\nWith: {ending} ending") | {"ending": ending} for topic, ending in asked]
    answers = [Answer(f"{topic} happy", 2, True) for topic, _ in asked]  # about the topic, and always happy
    own = {"model": TopicAndEnding().score(rows, answers)}
    found, met = chance_levels(TopicAndEnding(), task, rows, {"model": answers}, own, np.ones(100))
    levels = {name: (part, round(float(level.value()), 1)) for name, (part, level) in found["model"].items()}
    assert levels == {"both": ("ending", 0.5), "topic": ("topic", 0.0), "ending": ("ending", 0.5)}
    assert met == {"both", "topic", "ending"}


def test_a_part_is_exchanged_alone():
    task = load_task("topic_ending")
    one, other = (
        row(f"Write a story about: {topic}\nWith: {ending} ending") | {"ending": ending}
        for topic, ending in (("A cat.", "sad"), ("A dog.", "happy"))
    )
    for part, topic, ending in (("topic", "A dog.", "sad"), ("ending", "A cat.", "happy")):
        exchanged = task.exchanged(part, one, other)
        assert exchanged["messages"][0]["content"] == f"Write a story about: {topic}\nWith: {ending} ending"
        assert exchanged["messages"][1] == one["messages"][1]
        assert exchanged["ending"] == ending
    assert load_task("story_chat").exchanged("instruction", one, other) == other


@pytest.mark.parametrize("words", [["a"], ["a", "a"]])
def test_without_another_instruction_there_is_no_chance_level(words):
    rows, answers = [row(word) for word in words], {"model": [Answer(word, 1, True) for word in words]}
    own = {"model": [{"right": 1.0} for _ in words]}
    task = load_task("constraints")
    rows = [of_word | {"number": "one"} for of_word in rows]
    assert chance_levels(Echo(), task, rows, answers, own, np.ones(len(rows))) == ({"model": {}}, set())
