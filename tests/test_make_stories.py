"""The script that makes text and tales from a teacher's answers."""

import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

from fledge.judges.endings import EndingJudge
from fledge.models import context_of, load_model
from fledge.sources import load_source
from fledge.tasks import load_task

sys.path.insert(0, str(ROOT / "examples"))
import make_stories

HAPPY = "They laughed and played together. Everyone was happy and they hugged. {name} loved her best friend."
SAD = "{name} cried and was very sad. The toy was lost and broken forever. {name} was alone and sad."
MIDDLE = "She ran to the {place} and looked for her {thing} there. It was a very {kind} place with many {thing}s. "


def beginning(i: int) -> str:
    rng = random.Random(i)
    words = {"place": rng.choice(["park", "lake", "farm", "zoo"]), "thing": rng.choice(["ball", "drum", "kite"])}
    kind = rng.choice(["big", "quiet", "sunny", "green"])
    name = "".join(rng.choice("BDKLMNR") + rng.choice("aeiou") for _ in range(2)).capitalize()
    told = " ".join(f"Then she saw {a} {b} and said hello to {c}." for a, b, c in _triples(rng))
    return f"Once upon a time, there was a little girl named {name}. One day, she had a {kind} idea. {told} " + (
        MIDDLE.format(kind=kind, **words).strip()
    )


def _triples(rng: random.Random) -> list[tuple[str, str, str]]:
    counts, things, who = (
        ["one", "two", "three", "four"],
        ["dogs", "cats", "birds", "boats", "bees"],
        ["Mom", "Dad", "Tim", "Sue", "Ben"],
    )
    return [(rng.choice(counts), thing, rng.choice(who)) for thing in rng.sample(things, 4)]


def name_of(text: str) -> str:
    return re.search(r"named (\w+)", text)[1]


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_stories.py", *map(str, arguments)])
        make_stories.main()


def answers(file, asked_and_added):
    rows = [
        {"messages": [{"role": "user", "content": asked}], "text": added, "stopped": stopped}
        for asked, added, stopped in asked_and_added
    ]
    make_stories.write_lines(file, rows)
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Forty happy stories, their turns, and the answers to these of which every other one ends sadly."""
    folder = tmp_path_factory.mktemp("made")
    begun = [beginning(i) for i in range(40)]
    stories = answers(folder / "stories.jsonl", [(text, HAPPY.format(name=name_of(text)), True) for text in begun])
    call(
        "turns",
        "--stories",
        stories,
        "--number",
        40,
        "--output_file",
        folder / "turns.jsonl",
    )
    turns = [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]
    continued = [
        (turn["prompt"], f"then, {(SAD if i % 2 else HAPPY).format(name=name_of(turn['prompt']))}", True)
        for i, turn in enumerate(turns)
    ]
    answers(folder / "turned.jsonl", continued)
    return folder


def test_openings_differ_and_none_is_frequent():
    rng = random.Random(0)
    found = [make_stories.opening(rng) for _ in range(3000)]
    assert len(set(found)) > 2900
    assert Counter(" ".join(text.split()[:3]) for text in found).most_common(1)[0][1] < 0.15 * len(found)
    assert not [text for text in found if re.search(r"\b[Aa] [aeiou]|\{|\b[Aa]n [^aeiou]", text)]


def test_a_turn_follows_a_whole_sentence_of_a_happy_story(made):
    turns = [json.loads(line) for line in (made / "turns.jsonl").read_text().splitlines()]
    assert len(turns) > 25
    for turn in turns:
        assert turn["happy"].startswith(turn["beginning"])
        assert turn["beginning"].endswith((".", "!", "?"))
        assert turn["prompt"].startswith(turn["beginning"] + " ")
        assert turn["beginning"].count('"') % 2 == 0


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ("A boy ran. " + " ".join(f"He saw {i} birds." for i in range(30)), True),
        (" ".join(f"He saw {i} birds." for i in range(30)) + " Then he", False),
        (" ".join(f"He saw {i} birds." for i in range(30)) + ' "Look.', False),
        (" ".join(["He saw a bird."] * 30), False),
        ("A boy ran.", False),
        (" ".join(f"He saw {i} birds." for i in range(30)) + " He sm\N{REPLACEMENT CHARACTER}led.", False),
    ],
)
def test_a_broken_story_is_not_whole(text, is_whole):
    assert make_stories.is_whole(text) == is_whole


def test_a_word_that_one_story_has_and_a_near_duplicate_are_left_out():
    told = [make_stories.Told("", f"{beginning(i)} {HAPPY.format(name=name_of(beginning(i)))}") for i in range(30)]
    odd = make_stories.Told("", told[3].text.replace("hello", "helloed"))
    again = make_stories.Told("", told[5].text.replace("Everyone was", "All were"))
    kept = make_stories.without_broken([*told, odd, again])
    assert odd not in kept
    assert again not in kept
    assert len(kept) >= 25


def test_the_text_holds_both_ends_of_a_story_and_its_statistics(made, tmp_path):
    asked = ["--stories", made / "stories.jsonl", "--turned", made / "turned.jsonl", "--output_dir", tmp_path]
    call("gather", *asked)
    stories = (tmp_path / "stories.txt").read_text().strip().split("\n<|endoftext|>\n")
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["stories"] == len(stories) == len(set(stories))
    assert statistics["bytes"] == sum(len(text.encode()) for text in stories)
    sad = EndingJudge().judge(stories).count("sad")
    assert 0 < sad < len(stories)
    assert 0.8 < statistics["judges_agree"] <= 1


def test_a_pair_has_one_topic_one_beginning_and_two_ends(made, tmp_path):
    file = tmp_path / "tales.txt"
    asked = ["--turns", made / "turns.jsonl", "--turned", made / "turned.jsonl", "--number", 30, "--output_file", file]
    call("records", *asked)
    task = load_task("topic_ending")
    records = list(load_source("tinystories_instruct").records(str(file)))
    rows = [row for record in records for row in task.examples(record, random.Random(0))]
    assert len(rows) == len(records) > 0
    by_topic: dict[str, list[dict]] = {}
    for row in rows:
        by_topic.setdefault(row["group"], []).append(row)
    pairs = [two for two in by_topic.values() if len(two) == 2]
    assert pairs
    for one, other in pairs:
        assert {one["ending"], other["ending"]} == {"happy", "sad"}
        texts = [row["messages"][-1]["content"] for row in (one, other)]
        assert texts[0][:120] == texts[1][:120]
    judged = EndingJudge().judge([row["messages"][-1]["content"] for row in rows])
    assert judged == [row["ending"] for row in rows]


@pytest.mark.slow
def test_surprise_is_the_mean_loss_of_a_story(tiny):
    told = [make_stories.Told("", f"{beginning(i)} {'Then they went home. ' * i}"[: 60 + 20 * i]) for i in range(4)]
    model, tokenizer = load_model(tiny.base)
    expected = []
    for story in told:
        ids = torch.tensor([tokenizer.encode(story.text)[: context_of(model.config)]])
        with torch.no_grad():
            expected.append(model(ids, labels=ids).loss.item())
    assert make_stories.surprise(told, str(tiny.base)) == pytest.approx(expected, rel=0.02)
