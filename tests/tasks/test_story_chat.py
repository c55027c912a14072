import random
from collections import Counter

import pytest

from fledge.messages import INPUT_MARK, Answer
from fledge.tasks import RejectedRecord, load_task
from fledge.tasks.story_chat import CAPABILITIES, KINDS, PHRASINGS, SYSTEM

TASK = load_task("story_chat")
STORY = (
    "Once upon a time, there was a little girl named Lily. Lily had a red ball. One day, she lost it in the park. "
    '"Where is my ball?" Lily asked. A dog brought the ball back. Lily was happy and hugged the dog. '
    "The moral of the story is to take care of your things."
)
SAD = (
    "Tom was a boy. One day, Tom went to the sea. Tom threw his boat into the water. The boat was gone. "
    "Tom was sad and cried."
)
RECORD = {
    "Summary": "Lily loses her ball\nand a dog finds it.",
    "Words": "lose, ball, bring, volcano",
    "Features": "Dialogue, MoralValue",
    "Story": STORY,
}


def made_of(record: dict, draws: int = 40) -> list[dict]:
    return [example for seed in range(draws) for example in TASK.examples(record, random.Random(seed))]


def answers_to(record: dict, kind: str) -> set[str]:
    made = made_of(record)
    return {row["messages"][-1]["content"] for row in made if row["kind"] == kind and row["form"] == "single"}


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("summary", "Lily loses her ball and a dog finds it."),
        ("moral", "The moral of the story is to take care of your things."),
        ("words", STORY),
        ("who", "Lily."),
        ("what", "One day, Lily lost it in the park. Lily was happy and hugged the dog."),
        ("happy", "Yes."),
        ("talk", "Yes."),
    ],
)
def test_each_kind_is_answered_from_the_record(kind, answer):
    assert answers_to(RECORD, kind) == {answer}


def test_a_sad_silent_story_gives_the_other_answers():
    record = {"Features": "BadEnding", "Story": SAD}

    assert answers_to(record, "happy") == {"No."}
    assert answers_to(record, "talk") == {"No."}
    assert answers_to(record, "moral") == answers_to(record, "summary") == answers_to(record, "words") == set()


def test_an_answer_that_the_story_denies_is_not_given():
    """A record that says BadEnding of a happy end, or Dialogue of a silent story, is not believed."""
    assert answers_to(RECORD | {"Features": "BadEnding"}, "happy") == set()
    assert answers_to({"Story": SAD}, "happy") == set()
    asked = [row for row in made_of({"Features": "Dialogue", "Words": "boat", "Story": SAD}) if row["kind"] == "words"]
    assert asked
    assert not any(row["features"] for row in asked)


@pytest.mark.parametrize(
    ("features", "last", "is_asked"),
    [
        ("MoralValue", "Tom learned that it is good to share.", True),
        ("", "Tom learned that it is good to share.", False),
        ("", "The moral of the story is to share your things.", True),
        ("MoralValue", "Tom went home.", False),
    ],
)
def test_a_moral_needs_the_record_or_the_word_and_a_sentence(features, last, is_asked):
    assert answers_to({"Features": features, "Story": f"{SAD} {last}"}, "moral") == ({last} if is_asked else set())


def test_the_prompt_of_a_single_turn_carries_the_story():
    for row in made_of(RECORD):
        if row["form"] == "single" and row["kind"] != "words":
            system, question, _ = row["messages"]
            assert system == SYSTEM
            asked, story = question["content"].split(INPUT_MARK)
            assert asked in PHRASINGS[row["kind"]]
            assert story == STORY


def test_only_words_that_the_story_uses_are_asked_for():
    for row in made_of(RECORD):
        assert row["words"] == (["lose", "ball", "bring"] if row["kind"] == "words" else [])
        if row["kind"] == "words":
            assert "lose, ball, bring" in row["messages"][-2]["content"]
            assert ("dialogue" in row["messages"][-2]["content"]) == (row["features"] == ["dialogue"])


def test_dialogue_is_asked_for_in_some_of_the_stories_that_have_it():
    asked = Counter(tuple(row["features"]) for row in made_of(RECORD) if row["kind"] == "words")
    assert set(asked) == {(), ("dialogue",)}


def test_every_phrasing_is_used_and_no_other():
    asked = {kind: set() for kind in KINDS}
    for row in made_of(RECORD, 80):
        if row["form"] == "single":
            first = row["messages"][1]["content"].split(INPUT_MARK)[0].split("\n")[0]
            asked[row["kind"]].add(first.replace("lose, ball, bring", "{words}"))
    assert asked == {kind: set(phrasings) for kind, phrasings in PHRASINGS.items()}


def test_a_conversation_is_about_one_story_that_stands_in_it_once():
    conversations = [row for row in made_of(RECORD) if row["form"] == "conversation"]
    begun = Counter()
    for row in conversations:
        turns = row["messages"][1:]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert 2 <= len(turns) // 2 <= 5
        assert sum(STORY in turn["content"] for turn in turns) == 1
        assert STORY in turns[0]["content"] or turns[1]["content"] == STORY
        begun["written" if turns[1]["content"] == STORY else "given"] += 1
        assert turns[-1]["content"] in answers_to(RECORD, row["kind"])
        questions = [turn["content"].split(INPUT_MARK)[0] for turn in turns[::2]]
        assert len(set(questions)) == len(questions)
    assert begun["written"] > 5
    assert begun["given"] > 5


def test_the_same_chance_makes_the_same_examples():
    assert TASK.examples(RECORD, random.Random(7)) == TASK.examples(RECORD, random.Random(7))


def test_examples_of_one_story_are_of_one_group():
    made = made_of(RECORD) + made_of({"Story": STORY.replace(". ", ".\n", 3)})
    assert len({row["group"] for row in made}) == 1
    assert made[0]["group"] != made_of({"Story": SAD})[0]["group"]


def test_rows_have_the_columns_that_the_task_declares():
    for row in made_of(RECORD):
        assert set(row) == {"messages", "group", *TASK.columns}
        assert row["kind"] in TASK.columns["kind"]
        assert row["form"] in TASK.columns["form"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"Summary": "A cat."}, "no story"),
        ({"Story": "A cat sat and"}, "the story breaks off"),
        ({"Story": "It said so."}, "no answer about the story is sure"),
    ],
)
def test_an_unusable_record_is_rejected_with_its_reason(record, reason):
    with pytest.raises(RejectedRecord, match=reason):
        TASK.examples(record, random.Random(0))


def row_of(kind: str, reference: str, **columns) -> dict:
    asked = PHRASINGS[kind][0] + INPUT_MARK + STORY
    messages = [SYSTEM, {"role": "user", "content": asked}, {"role": "assistant", "content": reference}]
    return {"messages": messages, "kind": kind, "form": "single", "words": [], "features": [], **columns}


def scored(row: dict, text: str, stopped: bool = True) -> dict[str, float]:
    return TASK.scorer([], []).score([row], [Answer(text, 1, stopped)])[0]


WORDS = row_of("words", STORY, words=["run", "happy"], features=["dialogue"])
SPOKEN = '"Hi," said Tom. Tom ran away. He was happier.'


@pytest.mark.parametrize(
    ("text", "stopped", "follows", "share", "dialogue"),
    [
        (SPOKEN, True, 1, 1, 1),
        (SPOKEN, False, 0, 1, 1),
        ("Tom ran away. He was happier. It rained.", True, 0, 1, 0),
        ('"Hi," said Tom. Tom ran away. It rained.', True, 0, 0.5, 1),
        ('"Run, happy!" he said.', True, 0, 1, 1),
        (f"{SPOKEN}\n<|user|>", True, 0, 1, 1),
        ("", True, 0, 0, 0),
    ],
)
def test_a_story_follows_with_all_words_dialogue_and_a_stop(text, stopped, follows, share, dialogue):
    scores = scored(WORDS, text, stopped)

    assert scores["instruction_following"] == follows
    assert scores["words_used"] == share
    assert scores["all_words_used"] == (share == 1)
    assert scores["dialogue"] == dialogue


def test_dialogue_is_scored_only_where_it_is_asked_for():
    assert "dialogue" not in scored(WORDS | {"features": []}, SPOKEN)
    assert scored(WORDS | {"features": []}, "Tom ran away. He was happier. It rained.")["instruction_following"] == 1


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "follows"),
    [
        ("who", "Lily.", "lily", 1),
        ("who", "Lily.", "Tom.", 0),
        ("who", "Lily.", "Lily.\nUser: And?", 0),
        ("happy", "Yes.", "Yes", 1),
        ("talk", "No.", "Yes.", 0),
        ("moral", "The moral of the story is to take care of your things.", "Take care of your things.", 1),
        ("moral", "The moral of the story is to take care of your things.", "Dogs are nice.", 0),
        ("summary", "Lily loses her ball.", "Lily lost a red ball in the park.", 1),
        ("summary", "Lily loses her ball.", "A dragon burned seventeen castles.", 0),
        ("summary", "Lily loses her ball.", STORY, 0),
        ("summary", "Lily loses her ball.", "", 0),
        ("what", "One day, Lily lost the ball.", "Lily lost the ball and hugged the dog.", 1),
    ],
)
def test_following_a_question(kind, reference, answer, follows):
    row = row_of(kind, reference)

    assert scored(row, answer)["instruction_following"] == follows
    assert scored(row, answer, stopped=False)["instruction_following"] == 0


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Lily.", False),
        ("Lily.<|user|>", True),
        ("<|assistant|> Lily.", True),
        ("Lily.\nassistant: Tom.", True),
        ("User: hello", True),
        ("Every user: happy.", False),
    ],
)
def test_role_tokens_are_found(text, leaks):
    assert scored(row_of("who", "Lily."), text)["no_role_leak"] == (not leaks)


def test_every_metric_has_a_meaning_and_occurs():
    rows = [WORDS, *(row_of(kind, "Yes.") for kind in KINDS if kind != "words")]
    seen = {name for row in rows for name in scored(row, "Yes.")}
    assert seen == set(TASK.meaning)
    assert TASK.scorer([], []).judge == {}


@pytest.mark.parametrize("kind", ["summary", "what"])
def test_a_copied_first_sentence_does_not_follow(kind):
    row = row_of(kind, "Lily loses her ball and a dog finds it.")
    (copied,) = TASK.baselines["first_sentence"].answers([row], [], TASK.kind)
    assert STORY.startswith(copied)
    assert scored(row, copied) | {"instruction_following": 0, "own_words": 0, "grounded": 1} == scored(row, copied)
    assert scored(row, "lily had a RED ball")["own_words"] == 0
    assert scored(row, "Lily had a ball.")["instruction_following"] == 1
    extract = row_of(kind, "Lily had a red ball.")  # what the source itself calls a summary
    assert "own_words" not in scored(extract, copied)


def test_always_yes_is_right_in_half_of_the_questions():
    rows = [row_of("happy", "Yes.")] * 166 + [row_of("happy", "No.")] * 4 + [row_of("who", "Lily.")] * 30
    weights = TASK.weights(rows)
    right = [weight * scored(row, "Yes.")["exact_match"] for row, weight in zip(rows, weights, strict=True)]
    assert sum(right[:170]) / sum(weights[:170]) == pytest.approx(0.5)
    assert sum(weights[:170]) == pytest.approx(170)  # the kind as a whole counts as before
    assert weights[170:] == [1.0] * 30
    assert TASK.weights([row_of("talk", "No.")] * 3) == [1.0] * 3


def test_the_capabilities_ask_with_the_plain_phrasing():
    assert list(CAPABILITIES) == ["summary", "words", "who", "what"]
    for kind, messages in CAPABILITIES.items():
        assert messages[0] == SYSTEM
        assert messages[-1]["content"].startswith(PHRASINGS[kind][0].split("{")[0])
        assert messages[-1]["role"] == "user"
    assert CAPABILITIES["words"] == TASK.example
