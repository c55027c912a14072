import json
import random
from collections import Counter

import pytest
from conftest import ROOT, call_script
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.messages import Answer
from fledge.sources import load_source
from fledge.tasks import RejectedRecord, load_task
from fledge.tasks.constraints import OPENINGS, instruction, parse
from fledge.text import checks
from fledge.text.constraint_kinds import KINDS
from fledge.text.rhymes import COUPLETS
from fledge.text.words import in_order

TASK = load_task("constraints")
SCORER = TASK.scorer([], [])
STORY = (
    "Once there was a boy named Sam. Sam had a red kite. One day, the wind took the kite away. "
    '"Where is my kite?" Sam asked. His mom found it in a tree. Sam was brave and climbed up. They were glad.'
)
RECORD = {"Words": "kite, brave, volcano", "Features": "Dialogue", "Story": STORY}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    records = list(load_source("tinystories_instruct").records(ROOT / "examples" / "tales.txt.gz"))[::12]
    return [row for number, record in enumerate(records) for row in TASK.examples(record, random.Random(number))]


def follows(row: dict, text: str, stopped: bool = True) -> float:
    return SCORER.score([row], [Answer(text, 1, stopped)])[0]["instruction_following"]


def row_of(*constraints: str) -> dict:
    return {"messages": [{"role": "user", "content": instruction(list(constraints))}, {}], "constraints": constraints}


def test_every_reference_keeps_what_is_asked(rows):
    assert len(rows) > 880  # three of nearly every story
    answers = [Answer(row["messages"][-1]["content"], 1, True) for row in rows]
    for row, scores in zip(rows, SCORER.score(rows, answers), strict=True):
        assert scores["instruction_following"] == 1, row
        asked = {constraint.split(":")[0] for constraint in row["constraints"]}
        assert asked == {kind for kind in KINDS if kind in scores}
        assert len(asked) == 1 + ("one", "two", "three").index(row["number"])


def test_no_kind_is_rare_and_none_has_one_value(rows):
    """What is asked for must vary, or a single answer would do for all."""
    asked = [constraint.split(": ", 1) for row in rows for constraint in row["constraints"]]
    kinds = Counter(kind for kind, _ in asked)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.03 * len(asked)
    assert max(kinds.values()) < 0.15 * len(asked)
    for kind in set(KINDS) - {"rhyme"}:
        values = Counter(value for of_kind, value in asked if of_kind == kind)
        assert max(values.values()) < 0.65 * values.total(), kind


def test_what_is_to_be_quoted_is_short(rows):
    asked = [parse(constraint) for row in rows for constraint in row["constraints"]]
    words = [value.count(",") + 1 for kind, value in asked if kind == "words"]
    quoted = [len(in_order(value)) for kind, value in asked if kind in ("begin", "end")]
    assert max(words) == 3
    assert min(quoted) >= 3
    assert max(quoted) == 14


HACKS = {
    "nothing": lambda row: "",
    "a copied prompt": lambda row: row["messages"][0]["content"],
    "what is asked for, listed": lambda row: " ".join(f"{line.split(': ')[1]}." for line in row["constraints"]),
    "one word": lambda row: "Yes. Yes. Yes. Yes.",
    "one sentence again": lambda row: "It was too late. " * 12,
}


@pytest.mark.parametrize("hack", HACKS)
def test_what_is_no_story_never_follows(rows, hack):
    assert not any(follows(row, HACKS[hack](row)) for row in rows[::3])


def test_an_answer_that_does_not_end_does_not_follow(rows):
    for row in rows[:20]:
        assert follows(row, row["messages"][-1]["content"], stopped=False) == 0


def test_one_story_for_all_prompts_does_badly(rows):
    """Memorised, with or without the requested things listed behind it, or written for another prompt."""
    asked, told = rows[::4], [row["messages"][-1]["content"] for row in rows]
    one = max(told[1:30:3], key=lambda text: sum(follows(row, text) for row in asked[::6]))
    listed = [f"{one} {' '.join(line.split(': ')[1].title() + '.' for line in row['constraints'])}" for row in asked]
    for texts in ([one] * len(asked), listed, told[100::4] + told[:100:4]):
        scores = SCORER.score(asked, [Answer(text, 1, True) for text in texts])
        assert sum(score["instruction_following"] for score in scores) < 0.2 * len(scores)
        assert sum(score["kept"] for score in scores) < 0.4 * len(scores)


@pytest.mark.parametrize(
    ("constraints", "text", "kept"),
    [
        (["words: kite, brave"], STORY, True),
        (["words: kite, volcano"], STORY, False),
        (["words: kite, brave"], "Kite, brave. Brave kite. Kite, kite, brave.", False),
        (["without: dog"], STORY, True),
        (["without: climb"], STORY, False),
        (["sentences: 7"], STORY, True),
        (["sentences: 8"], STORY, False),
        (["sentences: 1"], "Once there was a boy named Sam.", True),
        (["begin: Once there was"], STORY, True),
        (["begin: One day"], STORY, False),
        (["end: They were glad."], STORY, True),
        (["end: They were sad."], STORY, False),
        (["name: Sam"], STORY, True),
        (["name: Tom"], STORY, False),
        (["speakers: 1"], STORY, True),
        (["speakers: 2"], STORY, False),
        (["question: yes"], STORY, True),
        (["question: no"], STORY, False),
        (["dialogue: yes"], STORY, True),
        (["dialogue: no"], STORY, False),
        (["title: any"], STORY, False),
        (["title: any"], f"Sam and the Kite\n\n{STORY}", True),
        (["title: The Kite"], f"Sam and the Kite\n\n{STORY}", False),
        (["title: The Kite"], f"The Kite\n\n{STORY}", True),
        (["length: at most 60"], STORY, True),
        (["length: at most 40"], STORY, False),
        (["length: at least 40"], STORY, True),
        (["length: at least 60"], STORY, False),
        (["rhyme: yes"], STORY, False),
        (["rhyme: yes"], f"{STORY}\nThey went to the sea. It was me.", True),
        (["title: any", "begin: Once there was"], f"The Kite\n\n{STORY}", True),  # a title is not part of the story
        (["title: any", "sentences: 7"], f"The Kite\n\n{STORY}", True),
        (["title: any", "words: dog"], f"The Dog and the Kite\n\n{STORY}", False),
    ],
)
def test_each_kind_is_kept_or_not(constraints, text, kept):
    scores = SCORER.score([row_of(*constraints)], [Answer(text, 1, True)])[0]
    assert scores["instruction_following"] == scores["all_kept"] * scores["story"] == kept
    assert scores["kept"] == 1 or not kept


def test_a_share_tells_how_near_an_answer_is():
    scores = TASK.score(row_of("words: kite, brave, dog", "sentences: 10"), Answer(STORY, 1, True))
    assert scores["words"] == pytest.approx(2 / 3)
    assert scores["sentences"] == pytest.approx(0.7)
    assert scores["words_kept"] == scores["sentences_kept"] == scores["kept"] == 0


VALUES = {"sentences": "12", "speakers": "2", "length": "at most 70", "title": "The Kite"}
EACH_VALUE = [(name, value or VALUES.get(name, "kite")) for name, kind in KINDS.items() for value in kind.phrasings]


@given(st.lists(st.sampled_from(EACH_VALUE), min_size=1, max_size=3), st.integers(0, 99))
def test_an_instruction_names_each_value_in_every_phrasing(values, seed):
    constraints = [f"{kind}: {value}" for kind, value in dict(values).items()]
    lines = instruction(constraints, random.Random(seed)).split("\n")
    assert len(lines) == 1 + len(constraints)
    for line, constraint in zip(lines[1:], constraints, strict=True):
        kind, value = parse(constraint)
        phrasings = KINDS[kind].phrasings.get(value) or KINDS[kind].phrasings[""]
        said = {"sentences": "twelve", "speakers": "two characters speak"}.get(kind, value)
        assert line in [phrasing.format(said) for phrasing in phrasings]


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ("colour: red", "no kind"),
        ("red", "no kind"),
        ("words:", "give words words"),
        ("sentences: few", "a number above 0"),
        ("sentences: 0", "a number above 0"),
        ("speakers: -1", "a number above 0"),
        ("question: maybe", "yes or no"),
        ("length: 100", "'at most 100'"),
        ("length: at most 0", "'at most 100'"),
        ("rhyme: no", "yes"),
        ("title: ?!", "words"),
    ],
)
def test_a_constraint_that_cannot_be_checked_is_refused(constraint, named):
    with pytest.raises(UserError, match=named):
        parse(constraint)


def test_a_kind_is_asked_for_once():
    with pytest.raises(UserError, match="twice"):
        instruction(["words: kite", "words: boat"])


@pytest.mark.parametrize(("features", "ending"), [("Twist, BadEnding", "sad"), ("Twist", "happy")])
def test_what_is_added_to_a_story_is_of_that_story(features, ending):
    """A couplet ends it as it ends; a title names its first thing, with its main character or alone."""
    record = RECORD | {"Features": features, "Words": "brave, kite, tree"}
    made = [row for seed in range(24) for row in TASK.examples(record, random.Random(seed))]
    told = {
        name: [row["messages"][-1]["content"] for row in made if f"{name}:" in str(row["constraints"])]
        for name in ("rhyme", "title")
    }
    assert {text.splitlines()[-1] for text in told["rhyme"]} <= set(COUPLETS[ending])
    assert {text.splitlines()[0] for text in told["title"]} == {"The Kite", "Sam and the Kite"}
    assert told["rhyme"]


def test_examples_of_a_story_are_of_one_group_and_depend_only_on_rng():
    made = [TASK.examples(RECORD, random.Random(seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert len({row["group"] for rows in made for row in rows}) == 1
    assert all(STORY in row["messages"][-1]["content"] for rows in made for row in rows)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"Summary": "A cat."}, "no story"),
        ({"Story": "A cat sat and"}, "breaks off"),
        ({"Story": "A cat sat down. It slept."}, "fewer than three whole sentences"),
    ],
)
def test_an_unusable_record_is_rejected_with_its_reason(record, reason):
    with pytest.raises(RejectedRecord, match=reason):
        TASK.examples(record, random.Random(0))


PIECES = (
    "Tom ran home.", "“Why?” asked Mia.", '"Go!" Tom said, "go."', "He saw a {cat}: it sat; it ran", "Mr. Fox: no!",
    "She said 'yes'.", "They ran... and ran.", "\n", "What? Why?", '"', "Été, naïve Zoë sang.", "THE END.", "a b c.",
)  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), min_size=3, max_size=14),
    st.sampled_from(["", "ran, Tom", "cat: it, {cat}", ",, ,", "sang; ?, fox"]),
    st.integers(0, 5),
)
def test_whatever_a_story_is_like_its_own_references_follow(pieces, words, seed):
    try:
        made = TASK.examples({"Story": " ".join([*pieces, "So it was."]), "Words": words}, random.Random(seed))
    except RejectedRecord:
        return
    assert made
    for row in made:
        assert follows(row, row["messages"][-1]["content"]) == 1


def test_the_closing_rhymes_rhyme():
    for couplet in sum(COUPLETS.values(), ()):
        assert checks.ends_in_rhyme(couplet) == 1, couplet
        assert len(checks.parts(couplet)) == 2


def test_a_model_is_trained_and_scored_on_it(tiny, tmp_path):
    data, model, evaluation = (tmp_path / name for name in ("data", "model", "evaluation"))
    prepared = call_script(
        "prepare_dataset.py", "--data", tiny.records, "--task", "constraints", "--tokenizer", tiny.base,
        "--split", "80/10/10", "--output_dir", data, "--num_proc", 1, "--show", 1,
    )  # fmt: skip
    assert any(opening in prepared.stdout for opening in OPENINGS)
    call_script(
        "train_sft.py", "--model_name_or_path", tiny.base, "--dataset", data, "--output_dir", model,
        "--max_steps", 2, "--per_device_train_batch_size", 8,
    )  # fmt: skip
    call_script(
        "evaluate_model.py", "--model", model, "--base", tiny.base, "--dataset", data, "--output_dir", evaluation,
        "--num_prompts", 12, "--max_new_tokens", 20,
    )  # fmt: skip
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["reference"]["instruction_following"]["value"] == 1
    assert metrics["baselines"]["copied_prompt"]["instruction_following"]["value"] == 0
    asked = {kind: found["n"] for kind, found in metrics["reference"].items() if kind in KINDS}
    assert 12 <= sum(asked.values()) <= 36
    told = call_script("generate.py", "--model", model, "--constraints", "words: kite", "--max_new_tokens", 3)
    assert not told.stderr
