import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.cli import UserError
from fledge.messages import Answer
from fledge.tasks import RejectedRecord, Scorer, load_task, task_names
from fledge.tasks.topic_ending import EndingJudge, instruction, requested, score
from fledge.text.words import content_words

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


FULL, HALF, NONE = "The red kite flew over a park with an oak.", "A kite in a park.", "A frog sat in mud."


@pytest.mark.parametrize(
    ("answer", "stopped", "judged", "follows", "match", "share"),
    [
        (FULL, True, "happy", 1, 1, 1),
        (FULL, True, "sad", 0, 0, 1),
        (FULL, False, "happy", 0, 1, 1),
        (FULL, False, "sad", 0, 0, 1),
        (HALF, True, "happy", 1, 1, 0.5),
        ("A kite.", True, "happy", 0, 1, 0.25),
        (NONE, True, "happy", 0, 1, 0),
        (NONE, True, "sad", 0, 0, 0),
        (NONE, False, "sad", 0, 0, 0),
        ("", True, "happy", 0, 1, 0),
    ],
)
def test_following_needs_the_ending_the_topic_and_the_stop(answer, stopped, judged, follows, match, share):
    asked = instruction("A red kite and an oak in the park.", "happy")

    assert scored(asked, answer, stopped, judged) == {
        "instruction_following": follows,
        "ending_match": match,
        "topic_words": share,
    }


def scored(asked: str, answer: str, stopped: bool, judged: str) -> dict[str, float]:
    """The scores of an answer whose ending is judged so."""
    scorer = Scorer(TASK)
    scorer.metrics = lambda rows, answers: [score(asked, answer.text, judged) for answer in answers]
    return scorer.score([{}], [Answer(answer, 1, stopped)])[0]


def test_the_sad_ending_is_matched_as_the_happy_one():
    assert scored(instruction("A kite.", "sad"), "The kite tore.", True, "sad")["instruction_following"] == 1
    assert scored(instruction("A kite.", "sad"), "The kite tore.", True, "happy")["instruction_following"] == 0


def test_a_topic_without_content_words_is_always_met():
    assert score(instruction("What she had.", "happy"), NONE, "happy")["topic_words"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The red ball", {"red", "ball"}),
        ("She was very, very HAPPY!", {"happy"}),
        ("dogs dog Dog", {"dog"}),
        ("boxes box", {"box"}),
        ("jumped jumping jumps jump", {"jump"}),
        ("bus red sing", {"bus", "red", "sing"}),
        ("Lily's ball", {"lily", "ball"}),
        ("and then they were", set()),
        ("", set()),
    ],
)
def test_content_words(text, words):
    assert content_words(text) == words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cake", "cakes"),
        ("horse", "horses"),
        ("smile", "smiled"),
        ("tree", "trees"),
        ("toy", "toys"),
        ("Lily’s dog", "Lily's dog"),
    ],
)
def test_plural_past_and_apostrophe_make_no_other_word(one, other):
    assert content_words(one) == content_words(other)


HAPPY = [f"{name} lost a toy. {name} looked. They found it. Everyone smiled and was happy." for name in ("Tom", "Ann")]
SAD = [f"{name} lost a toy. {name} looked. It was gone. Everyone cried and was sad." for name in ("Tom", "Ann")]


@pytest.fixture(scope="module")
def judge():
    return EndingJudge(HAPPY * 5 + SAD * 5, ["happy"] * 10 + ["sad"] * 10)


def test_obvious_endings_are_told_apart(judge):
    stories = ["Ben ate cake. Everyone smiled and was happy.", "Ben ate cake. Everyone cried and was sad."]

    assert judge.judge(stories) == ["happy", "sad"]
    assert judge.accuracy(stories, ["happy", "sad"]) == 1


def test_only_the_last_four_sentences_count(judge):
    end = "Then it rained. It was gone. They went home. Everyone cried and was sad."

    assert judge.judge([f"Everyone smiled and was happy. They found it. {end}", end]) == ["sad", "sad"]


def test_a_rare_ending_weighs_as_much_as_a_frequent_one():
    """Two sad and three happy stories end alike: a fifth of all sad ones, a fortieth of the happy ones."""
    unclear = "Then it rained. It was gone. They went home. It was late."
    stories = HAPPY * 60 + [unclear] * 3 + SAD * 4 + [unclear] * 2

    judge = EndingJudge(stories, ["happy"] * 123 + ["sad"] * 10)
    assert judge.judge([unclear, HAPPY[0], SAD[0]]) == ["sad", "happy", "sad"]


def test_accuracy_is_the_mean_of_the_recalls(judge):
    """7 of 8 happy and 1 of 2 sad stories are recognised: (7/8 + 1/2) / 2, not 8/10."""
    stories = [HAPPY[0]] * 7 + [SAD[0]] + [SAD[1], HAPPY[1]]

    assert judge.accuracy(stories, ["happy"] * 8 + ["sad"] * 2) == pytest.approx(0.6875)


def test_accuracy_on_one_ending_alone_is_its_recall(judge):
    assert judge.accuracy([HAPPY[0], HAPPY[1], SAD[0], SAD[1]], ["sad"] * 4) == 0.5


def test_the_judge_reports_what_it_is_worth(judge):
    """One of four stories carries the wrong label; the judge is sure of all four."""
    stories, endings = [HAPPY[0], HAPPY[1], SAD[0], SAD[1]], ["happy", "happy", "sad", "happy"]
    sadness = judge.sadness(stories)
    measured = judge.measure(stories, endings)

    assert measured["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["n"] == 4
    wanted = (sadness[0] ** 2 + sadness[1] ** 2 + (1 - sadness[2]) ** 2 + sadness[3] ** 2) / 4
    assert measured["brier"] == pytest.approx(wanted)
    assert [(part["n"], part["was_sad"]) for part in measured["calibration"]] == [(2, 0), (2, 0.5)]
    assert measured["calibration"][0]["said_sad"] == pytest.approx(sadness[:2].mean())
    assert measured["errors"] == [
        {"ends": "Ann lost a toy. Ann looked. It was gone. Everyone cried and was sad.", "label": "happy"}
        | {"said_sad": pytest.approx(sadness[3])}
    ]


def test_a_scorer_learns_from_train_and_is_measured_on_the_rest():
    def row(story: str, ending: str) -> dict:
        asked = {"role": "user", "content": instruction("A toy.", ending)}
        return {"messages": [asked, {"role": "assistant", "content": story}], "ending": ending}

    train = [row(story, "happy") for story in HAPPY * 5] + [row(story, "sad") for story in SAD * 5]
    scorer = TASK.scorer(train, [row(HAPPY[0], "happy"), row(SAD[0], "sad")])

    assert (scorer.judge["accuracy"], scorer.judge["n"], scorer.judge["errors"]) == (1, 2, [])
    asked = [row(HAPPY[0], "happy"), row(HAPPY[0], "sad")]
    scores = scorer.score(asked, [Answer(HAPPY[1], 9, True)] * 2)
    assert [part["ending_match"] for part in scores] == [1, 0]
    assert [part["instruction_following"] for part in scores] == [1, 0]


def test_a_judge_needs_both_endings():
    with pytest.raises(UserError, match="has happy endings only"):
        EndingJudge(["They were happy.", "They smiled."], ["happy", "happy"])
