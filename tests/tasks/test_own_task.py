"""A task is one file: the page's example, taken the whole way, and files that are no task."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.messages import Answer
from fledge.scripts import evaluate_model, generate, prepare_dataset, publish, train_sft
from fledge.tasks import load_task, open_task, task_names

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
SHOUT = re.search(r'```python\n("""Shout.*?)```', PAGE, re.DOTALL)[1]
ASKED = {"role": "user", "content": "Shout: A cat sat."}


def write(folder: Path, text: str, name: str = "shout.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.fixture(autouse=True)
def forget():
    """No test knows the tasks of another, whose files have the same name."""
    yield
    load_task.cache_clear()
    open_task.cache_clear()
    sys.modules.pop("fledge.tasks.shout", None)


@pytest.fixture
def run(monkeypatch):
    """Runs a script's `main` in this process."""

    def run(script, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()

    return run


def test_a_task_of_ones_own_goes_the_whole_way(tiny, run, tmp_path, capsys):
    task = write(tmp_path, SHOUT)
    data, model, evaluation, out = (tmp_path / name for name in ("data", "model", "evaluation", "out"))
    run(prepare_dataset, "--task", task, "--data", tiny.records, "--tokenizer", tiny.base, "--output_dir", data)
    run(
        train_sft, "--model_name_or_path", tiny.base, "--dataset", data, "--output_dir", model, "--max_steps", 2,
        "--per_device_train_batch_size", 2, "--eval_strategy", "no", "--bf16", "False", "--use_cpu",
    )  # fmt: skip
    asked = ("--model", model, "--base", tiny.base, "--dataset", data, "--num_prompts", 2, "--max_new_tokens", 8)
    with pytest.raises(UserError, match="prepared for 'shout', which is no shipped task; name its file with --task"):
        run(evaluate_model, *asked, "--output_dir", evaluation)
    assert not evaluation.exists()
    run(evaluate_model, *asked, "--output_dir", evaluation, "--task", task)
    metrics = read_json(evaluation / "metrics.json", "evaluate_model.py")
    assert metrics["task"] == "shout"
    assert {"capitals", "instruction_following"} <= metrics["model"].keys()

    # Nothing after this needs the file, and nothing runs it.
    Path(task).write_text("raise SystemExit", encoding="utf-8")
    open_task.cache_clear()
    run(
        publish, "--model", model, "--evaluation", evaluation, "--dataset", data, "--repo_id", "a/model",
        "--dataset_repo_id", "a/data", "--space_repo_id", "a/space", "--dry_run", "--output_dir", out,
    )  # fmt: skip
    assert "say a sentence in capitals" in (out / "model" / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "space" / "settings.json").read_text(encoding="utf-8"))["chat"]
    capsys.readouterr()
    run(generate, "--model", model, "--ask", ASKED["content"], "--max_new_tokens", 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"group": sentence', '"group": len(sentence)', r"made the group 10; give a text"),
        ("sentence.upper()}", "None}", "made the messages .*; give a list of messages"),
        ('"role": "assistant"', '"role": "user"', "made the messages .*the last is an answer"),
        ('"role": "user"', '"role": "human"', "made the messages .*role .system, user, assistant."),
        ("columns = {}", 'columns = {"group": "string", "tags": "strings"}', "declares group, messages, tags"),
        ("columns = {}", 'columns = {"group": "strings"}', "made the group 'A cat sat.'; give a list of texts"),
    ],
)
def test_an_example_that_is_none_is_refused(tmp_path, old, new, message):
    task = open_task(write(tmp_path, SHOUT.replace(old, new)))
    with pytest.raises(UserError, match=message):
        task.checked_examples({"Summary": "A cat sat."}, random.Random(0))


def test_examples_may_be_yielded(tmp_path):
    task = open_task(write(tmp_path, SHOUT.replace("return [{", "yield from [{")))
    made = task.checked_examples({"Summary": "A cat sat."}, random.Random(0))
    assert [example["messages"][-1]["content"] for example in made] == ["A CAT SAT."]


def test_one_file_in_the_folder_is_a_task(tmp_path, monkeypatch):
    write(tmp_path, SHOUT)
    assert "shout" not in task_names()
    monkeypatch.setattr("fledge.tasks.__path__", [str(tmp_path)])
    assert task_names() == ["shout"]
    assert open_task("shout").name == "shout"


def test_the_tasks_import_nothing_heavy():
    code = "import sys; from fledge.tasks import load_task, task_names; list(map(load_task, task_names())); "
    code += "print({'torch', 'transformers', 'datasets'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("answer", "stopped", "follows", "share"),
    [("A CAT.", True, 1, 1), ("A CAT.", False, 0, 1), ("A Cat.", True, 0, 0.5), ("", True, 0, 0)],
)
def test_following_is_every_constraint_met_and_stopped(answer, stopped, follows, share, tmp_path):
    scorer = open_task(write(tmp_path, SHOUT)).scorer([], [])
    (scores,) = scorer.score([{}], [Answer(answer, 1, stopped)])
    assert scores == {"instruction_following": follows, "capitals": share}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "import nothing_of_the_kind\n" + text, "cannot be run: ModuleNotFoundError"),
        (lambda text: text + "\nclass", "cannot be run: SyntaxError"),
        (lambda text: "x = 1\n", "defines no tasks"),
        (lambda text: text + "\n\nclass Whisper(Shout):\n    pass\n", "defines 2 tasks"),
        (lambda text: text.replace("    purpose =", "    aim ="), "lacks purpose"),
        (lambda text: text.replace("def examples", "def samples"), "lacks examples"),
        (lambda text: text.replace("def score", "def rate"), "lacks score"),
        (lambda text: text.replace("columns = {}", "columns = {'age': int}"), "column age of shout.py is"),
        (lambda text: text.replace('{"capitals": 1.0}', '{"loud": 1.0}'), "does not say what loud means"),
        (lambda text: text.replace('"instruction_following"', '"follows"'), "say what instruction_following means"),
    ],
)
def test_a_file_that_is_no_task_is_refused(change, sentence, tmp_path):
    assert change(SHOUT) != SHOUT
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_task(write(tmp_path, change(SHOUT)))


def test_a_file_needs_a_name_of_its_own(tmp_path):
    for name in ("topic_ending.py", "my-task.py"):
        with pytest.raises(UserError, match="needs another name"):
            open_task(write(tmp_path, SHOUT, name))
    with pytest.raises(UserError, match="is no file"):
        open_task(str(tmp_path / "none.py"))


def test_what_a_task_makes_and_scores_is_checked(tmp_path):
    task = open_task(write(tmp_path, SHOUT.replace('"group": sentence', '"groups": sentence')))
    with pytest.raises(UserError, match="made an example of groups, messages; it declares group, messages"):
        task.checked_examples({"Summary": "A cat."}, random.Random(0))
    classes = SHOUT.replace("columns = {}", 'columns = {"mood": ("glad", "sad")}')
    task = open_task(
        write(tmp_path, classes.replace('"group": sentence', '"mood": "cross", "group": sentence'), "b.py")
    )
    with pytest.raises(UserError, match="made the mood 'cross'"):
        task.checked_examples({"Summary": "A cat."}, random.Random(0))
    for number, wrong in enumerate(('{"loud": 1.0}', '{"capitals": 3}', '{"capitals": float("nan")}')):
        text = re.sub(r"return \{\"capitals.*", f"return {wrong}", SHOUT)
        scorer = open_task(write(tmp_path, text, f"c{number}.py")).scorer([], [])
        with pytest.raises(UserError, match="scored an answer"):
            scorer.score([{}], [Answer("A", 1, True)])


@pytest.mark.parametrize("name", task_names())
def test_a_shipped_task_makes_what_it_declares(name):
    story = "Once there was a boy named Tim. Tim had a red kite. One day, Tim lost the kite. Tim was sad and cried."
    record = {"Summary": "Tim loses a kite.", "Words": "kite, lose", "Features": "BadEnding", "Story": story}
    record |= {"instruction": "Add 2 and 3.", "output": "5", "category": "arithmetic"}
    task = load_task(name)
    made = task.checked_examples(record, random.Random(0))
    assert made == task.examples(record, random.Random(0)) != []
