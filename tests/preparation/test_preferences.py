"""A model's own rewarded answers → pairs, or the best answer to each prompt."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from fledge.encoding import IGNORED, open_prepared, open_rows
from fledge.errors import UserError
from fledge.evaluation.prompts import open_prompts
from fledge.preparation.preferences import Choice, is_done
from fledge.rewards.functions import weights_of
from fledge.scripts import prepare_dataset
from fledge.tasks import RejectedRecord, load_task
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer

TASK = load_task("topic_ending")
PROMPT = "Write a story about: A dog.\nWith: sad ending"


def answer(text: str, topic: float = 1.0, stopped: bool = True, ending: float = 1.0) -> dict:
    rewards = {"ending": ending, "topic": topic, "stopped": float(stopped), "usual": 0.9, "varied": 1.0}
    return {"text": text, "tokens": 5, "stopped": stopped, "rewards": rewards}


def record(answers: list[dict], prompt: str = PROMPT, **changes) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {
        "task": "topic_ending",
        "split": "train",
        "messages": messages,
        "ending": "sad",
        "answers": answers,
    } | changes


def choice(keep: str = "pairs", pairs: int = 8, margin: float = 0.1, **weights: float) -> Choice:
    return Choice(keep, weights or weights_of(TASK), margin, pairs)


def pairs_of(answers: list[dict], *arguments, **changes) -> list[tuple[str, str]]:
    made = choice("pairs", *arguments, **changes).examples(record(answers), TASK)
    return [(example["messages"][-1]["content"], example["rejected"]) for example in made]


def test_the_best_is_paired_with_the_worst_and_no_answer_twice():
    answers = [answer("worst", 0.0), answer("good", 0.5), answer("bad", 0.1), answer("poor", 0.3)]
    assert pairs_of(answers) == [("good", "worst"), ("poor", "bad")]
    assert pairs_of(answers, pairs=1) == [("good", "worst")]
    assert pairs_of(answers, margin=0.3) == [("good", "worst")]
    assert pairs_of([answer("a", 0.5), answer("b", 1.0, ending=0.3)], topic=1.0, ending=0.5) == [("b", "a")]
    with pytest.raises(RejectedRecord, match="all answers to the prompt are worth the same"):
        pairs_of([answer("a", 0.5), answer("b", 0.59)])


def test_only_what_ended_by_itself_is_preferred():
    cut = answer("on and on", stopped=False)
    assert pairs_of([cut, answer("done", ending=0.0, topic=0.0), answer("right")]) == [("right", "done")]
    assert pairs_of([cut, answer("done")]) == [("done", "on and on")]
    with pytest.raises(RejectedRecord, match="no answer to the prompt ended by itself"):
        pairs_of([cut, answer("and on", 0.0, stopped=False)])
    with pytest.raises(RejectedRecord, match="there is one answer to the prompt"):
        pairs_of([answer("alone")])


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans(), st.sampled_from([0.0, 1.0])),
        min_size=2,
        max_size=9,
    )
)
def test_a_pair_is_never_a_tie_and_shares_no_answer(drawn):
    answers = [answer(str(number), *values) for number, values in enumerate(drawn)]
    values = [choice().value(one) for one in answers]
    if max((value for value, one in zip(values, answers, strict=True) if one["stopped"]), default=0) <= min(values):
        with pytest.raises(RejectedRecord):
            pairs_of(answers)
        return
    made = pairs_of(answers)
    used = [int(text) for pair in made for text in pair]
    assert len(used) == len(set(used))
    for chosen, rejected in made:
        assert values[int(chosen)] > values[int(rejected)]
        assert answers[int(chosen)]["stopped"]


def test_the_best_answer_did_what_is_asked_or_there_is_none():
    wrong = [answer("off topic", 0.4), answer("endless", stopped=False), answer("happy", ending=0)]
    answers = [*wrong, answer("right", 0.5)]
    (made,) = choice("best").examples(record(answers), TASK)
    assert made["messages"][-1] == {"role": "assistant", "content": "right"}
    assert (made["ending"], "rejected" in made) == ("sad", False)
    with pytest.raises(RejectedRecord, match="no answer did what the prompt asks"):
        choice("best").examples(record(wrong), TASK)


@pytest.mark.parametrize(
    ("one", "done"),
    [
        (answer("right"), True),
        (answer("right", topic=0.5), True),
        (answer("off topic", topic=0.49), False),
        (answer("happy", ending=0.99), False),
        (answer("endless", stopped=False), False),
        (answer(" \n"), False),
    ],
)
def test_an_answer_is_done_that_stopped_says_something_and_is_right(one, done):
    assert is_done(one, TASK) is done


def test_answers_of_another_task_are_refused():
    other = record([answer("a"), answer("b")], task="constraints")
    with pytest.raises(UserError, match="to prompts of the task constraints; pass --task constraints"):
        choice().examples(other, TASK)
    del other["ending"]
    with pytest.raises(UserError, match="The answers lack ending, which rows of the task topic_ending have; ask"):
        choice().examples(other | {"task": "topic_ending"}, TASK)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tokenizer of a model that was tuned with the template `story`."""
    folder = tmp_path_factory.mktemp("answers") / "model"
    tokenizer = load_tokenizer(str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json"), context_length=128)
    add_template(tokenizer, "story")
    tokenizer.save_pretrained(folder)
    return folder


def write_answers(file: Path, of_prompts: list[list[dict]]) -> None:
    lines = []
    for number, answers in enumerate(of_prompts):
        row = record([], PROMPT.replace("dog", f"dog with {number} hats"))
        del row["answers"]
        lines += [{**row, "prompt": number, "model": one} for one in answers]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def prepare(data: Path, model: Path, output_dir: Path, *arguments: object) -> dict:
    given = ("--source", "answers", "--data", data, "--tokenizer", model, "--output_dir", output_dir, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, given)])
        prepare_dataset.main()
    return json.loads((output_dir / "budget.json").read_text(encoding="utf-8"))


ANSWERS = [
    *([answer("The dog fell.", 0.6), answer("No", 0.0), answer("It ran and", 0.6, False)] for _ in range(38)),
    [answer("A dog."), answer("The dog.")],  # a tie
    [answer("It ran", stopped=False), answer("The dog", stopped=False)],
    [answer("A dog."), answer("dog " * 200, 0.0)],  # longer than the context
]


def test_a_folder_of_pairs(tmp_path, model, capsys):
    write_answers(tmp_path / "samples.jsonl", ANSWERS)
    budget = prepare(tmp_path / "samples.jsonl", model, tmp_path / "pairs", "--show", 1)
    assert (budget["rows_read"], budget["rows_kept"], budget["template"]) == (41, 38, "story")
    assert budget["rejected"] == {
        "all answers to the prompt are worth the same": 1,
        "no answer to the prompt ended by itself": 1,
        "longer than 128 tokens": 1,
    }
    said = capsys.readouterr().out
    assert "Read 41 prompts and kept 38 pairs" in said
    assert "| all answers to the prompt are worth the same | 1 |" in (tmp_path / "pairs" / "budget.md").read_text()
    assert "rejected\nIt ran and\n" in said
    assert "Preference pairs" in (tmp_path / "pairs" / "README.md").read_text()

    _, tokenizer, rows = open_prepared(tmp_path / "pairs")
    assert {name: len(split) for name, split in rows.items()} == {"train": 35, "validation": 3}
    row = rows["train"][0]
    assert tokenizer.decode([token for token in row["labels"] if token != IGNORED]) == "The dog fell.<|endoftext|>"
    assert tokenizer.decode(row["rejected_ids"]) == "It ran and"  # it ran into the limit
    published = load_dataset("parquet", data_dir=str(tmp_path / "pairs" / "data"), cache_dir=tmp_path / "cache")
    assert published["train"][0]["chosen"] == [{"role": "assistant", "content": "The dog fell."}]
    assert published["train"][0]["rejected"] == [{"role": "assistant", "content": "It ran and"}]
    assert published["train"][0]["prompt"][0]["content"].startswith("Write a story about: A dog with ")
    assert open_rows(tmp_path / "pairs")["train"][0]["messages"][-1]["content"] == "The dog fell."
    with pytest.raises(UserError, match="a model's own answers to training prompts; evaluate on the dataset"):
        open_prompts(tmp_path / "pairs", None, "validation", 1, 1)


def test_a_folder_of_the_best_answers(tmp_path, model):
    write_answers(tmp_path / "samples.jsonl", ANSWERS)
    budget = prepare(tmp_path / "samples.jsonl", model, tmp_path / "best", "--keep", "best")
    assert (budget["rows_read"], budget["rows_kept"]) == (41, 40)
    assert budget["rejected"] == {"no answer did what the prompt asks": 1}
    assert set(
        load_dataset("parquet", data_dir=str(tmp_path / "best" / "data"), cache_dir=tmp_path / "c")["train"][0]
    ) == {
        "instruction",
        "response",
        "ending",
    }


@pytest.mark.parametrize(
    ("answers", "arguments", "message"),
    [
        (ANSWERS[38:39] * 5, (), r"No prompt of .* can be used \(all answers to the prompt are worth the same: 5\)"),
        (ANSWERS, ("--task", "constraints"), "to prompts of the task topic_ending; pass --task topic_ending"),
        (ANSWERS, ("--keep", "worst"), "--keep worst is unknown; choose pairs or best"),
        (ANSWERS, ("--overflow", "cut_completion"), "--overflow cut_completion does not go with --source answers"),
        (ANSWERS, ("--rewards", "rhyme"), "rhyme is not among the rewards that answers have"),
        (
            ANSWERS,
            ("--rewards", "my.py:shorter"),
            "my.py:shorter is not among the rewards that answers have: ending, topic,",
        ),
        (ANSWERS, ("--split", "source"), "--split source does not go with --source answers"),
        (ANSWERS, ("--source", "alpaca", "--keep", "best"), "--keep goes with --source answers; alpaca has no answers"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(tmp_path, model, answers, arguments, message):
    write_answers(tmp_path / "samples.jsonl", answers)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "samples.jsonl", model, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_template_gave_no_answers(tmp_path):
    load_tokenizer(str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json"), 128).save_pretrained(tmp_path / "base")
    write_answers(tmp_path / "samples.jsonl", ANSWERS)
    with pytest.raises(UserError, match=r"base has no chat template; name the model that gave the answers"):
        prepare(tmp_path / "samples.jsonl", tmp_path / "base", tmp_path / "out")
