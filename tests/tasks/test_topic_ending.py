import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.messages import Answer
from fledge.tasks import RejectedRecord, Scorer, load_task, task_names
from fledge.tasks.topic_ending import instruction, requested

TASK = load_task("topic_ending")


def test_the_task_is_opened_by_its_name():
    assert TASK.name == "topic_ending"

    with pytest.raises(UserError, match=f"'poem' is unknown; choose one of {', '.join(task_names())}"):
        load_task("poem")


def made_of(record: dict[str, str]) -> dict:
    (example,) = TASK.examples(record, random.Random(0))
    return example


def test_the_instruction_reads_literally():
    assert instruction("A cat finds a hat.", "sad") == "Write a story about: A cat finds a hat.\nWith: sad ending"
    assert requested(TASK.example[-1]["content"]) == ("A little boy found a red kite in the park.", "happy")


@pytest.mark.parametrize(
    ("features", "ending"),
    [
        ("Dialogue, BadEnding", "sad"),
        ("BadEnding", "sad"),
        ("Dialogue, Twist", "happy"),
        (None, "happy"),
    ],
)
def test_the_ending_comes_from_the_features(features, ending):
    record = {"Summary": "A cat.", "Story": "It slept."} | ({"Features": features} if features else {})

    assert made_of(record) == {
        "messages": [
            {"role": "user", "content": f"Write a story about: A cat.\nWith: {ending} ending"},
            {"role": "assistant", "content": "It slept."},
        ],
        "ending": ending,
        "group": "A cat.",
    }


def test_the_topic_is_one_line_and_the_story_stays_as_it_is():
    asked, answer = made_of({"Summary": "A cat\nin  a hat.\tOn a mat.", "Story": 'It slept.\n\n"Purr," it said.'})[
        "messages"
    ]

    assert requested(asked["content"]) == ("A cat in a hat. On a mat.", "happy")
    assert answer["content"] == 'It slept.\n\n"Purr," it said.'


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no summary"),
        ({"Story": "It slept."}, "no summary"),
        ({"Summary": " \n", "Story": "It slept."}, "no summary"),
        ({"Summary": "A cat."}, "no story"),
        ({"Summary": "A cat.", "Story": ""}, "no story"),
        ({"Summary": "A cat.", "Story": "It slept and"}, "the story breaks off"),
        ({"Summary": "A cat.", "Story": "It slept,"}, "the story breaks off"),
    ],
)
def test_an_unusable_record_is_rejected_with_its_reason(record, reason):
    with pytest.raises(RejectedRecord) as rejected:
        made_of(record)

    assert str(rejected.value) == reason


@pytest.mark.parametrize("story", ["It slept.", "It slept!", "Did it?", 'It said, "Purr"', "It said, “Purr”", "'No'"])
def test_a_story_that_ends_a_sentence_is_complete(story):
    assert made_of({"Summary": "A cat.", "Story": story})["messages"][-1]["content"] == story


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), st.sampled_from(TASK.classes["ending"])
)
def test_the_request_is_read_back_from_any_instruction(topic, ending):
    assert requested(instruction(topic, ending)) == (topic, ending)


@pytest.mark.parametrize("text", ["", "Write a story about: A cat.", "With: sad ending", "Tell me.\nWith: sad ending"])
def test_a_prompt_that_asks_for_no_ending_is_refused(text):
    with pytest.raises(UserError, match="asks for no ending"):
        requested(text)


TALE = (
    "Once upon a time, there was a boy named Tim. Tim had a red kite. One day, he took it to the park. The wind blew "
    "the kite up into a tall oak. Tim could not reach it. He asked his dad for help. His dad climbed up the oak and "
    "took the kite down. Tim was very happy. He hugged his dad and they played with the kite all day."
)
ROW = {"messages": [{"role": "user", "content": instruction("A red kite and an oak in the park.", "happy")}, {}]}
ALL_MET = {"ending_match": 1, "ending_match_second": 1, "topic": 1, "coherence": 0.05}


def scored(metrics: dict[str, float], stopped: bool) -> float:
    scorer = Scorer(TASK)
    scorer.metrics = lambda rows, answers: [metrics]
    return scorer.score([{}], [Answer("", 1, stopped)])[0]["instruction_following"]


@pytest.mark.parametrize(
    ("missing", "stopped", "follows"),
    [
        ({}, True, 1),
        ({}, False, 0),
        ({"ending_match": 0}, True, 0),
        ({"ending_match_second": 0}, True, 0),
        ({"topic": 0.49}, True, 0),
        ({"topic": 0.5}, True, 1),
        ({"coherence": 0.04}, True, 0),
    ],
)
def test_following_needs_both_judges_the_topic_coherence_and_the_stop(missing, stopped, follows):
    assert scored(ALL_MET | missing, stopped) == follows


@pytest.fixture(scope="module")
def scorer():
    train = [{"messages": [{"role": "assistant", "content": TALE}]}] * 4
    unseen = [{"messages": [{"role": "assistant", "content": TALE}], "ending": "happy"}]
    return TASK.scorer(train, unseen)


def test_a_story_is_scored_against_what_its_prompt_asks(scorer):
    other = {"messages": [{"role": "user", "content": instruction("A frog in the mud.", "sad")}, {}]}
    own, others = scorer.metrics([ROW, other], [Answer(TALE, 9, True)] * 2)

    assert (own["ending_match"], own["ending_match_second"], own["topic"]) == (1, 1, 1)
    assert (others["ending_match"], others["ending_match_second"], others["topic"]) == (0, 0, 0)
    assert own["coherence"] == others["coherence"] == 1


def test_the_judges_are_measured_on_rows_that_they_have_not_seen(scorer):
    judge = scorer.judge

    assert (judge["accuracy"], judge["second_accuracy"], judge["n"], judge["errors"]) == (1, 1, 1, [])
    assert judge["coherence"].keys() <= {"shuffled", "name", "foreign", "verb"}
    assert TASK.scorer([ROW | {"messages": [{"content": TALE}]}], []).judge == {}
