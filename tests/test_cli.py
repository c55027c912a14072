import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from fledge.checkpoints.known_layouts import LAYOUTS
from fledge.cli import parse, read_json, run, write_json
from fledge.errors import UserError
from fledge.scripts.convert_checkpoint import ConvertArguments
from fledge.scripts.prepare_dataset import PrepareArguments
from fledge.sources import source_names
from fledge.tasks import task_names
from fledge.templates import names
from fledge.training.starting import run_name

ROOT = Path(__file__).parent.parent
SCRIPTS = ("convert_checkpoint", "export", "prepare_dataset", "train_sft", "evaluate_model", "generate", "publish")


@dataclass
class Oven:
    dishes: list[str] = field(metadata={"help": "what to bake"})
    cook: str = field(metadata={"help": "who bakes"})
    minutes: int = field(default=30, metadata={"help": "how long"})
    heat: float = field(default=180.0, metadata={"help": "how hot"})
    note: str | None = field(default=None, metadata={"help": "anything else"})
    guests: list[str] | None = field(default=None, metadata={"help": "who comes"})
    music: list[str] | str | None = field(default=None, metadata={"help": "what plays"})
    fan: bool = field(default=False, metadata={"help": "with the fan"})


@dataclass
class Table:
    seats: int = field(default=4, metadata={"help": "how many eat"})


RECIPE = "dishes: [bread, pie]\ncook: Ann\nheat: 220.5\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text: str | bytes = RECIPE) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def test_a_recipe_fills_the_keys_and_leaves_the_defaults(recipe):
    assert parse(["--config", recipe()], Oven, Table) == (
        Oven(dishes=["bread", "pie"], cook="Ann", minutes=30, heat=220.5, note=None, fan=False),
        Table(seats=4),
    )


def test_one_value_is_a_list_of_one_where_a_list_is_wanted(recipe):
    (oven,) = parse(["--config", recipe("dishes: pie\ncook: Ann\nguests: Ben\nmusic: jazz\n")], Oven)
    assert (oven.dishes, oven.guests, oven.music) == (["pie"], ["Ben"], "jazz")


@pytest.mark.parametrize("text", ["no", "on", "False", "007", "0x1F", "12:30", "1_000", "2024-01-01", "1e3", "'no'"])
def test_text_in_a_recipe_is_what_is_written_there(recipe, text):
    (oven,) = parse(["--config", recipe(f"dishes: [{text}, pie]\ncook: {text}\nguests: {text}\n")], Oven)
    written = text.strip("'")
    assert (oven.dishes, oven.cook, oven.guests) == ([written, "pie"], written, [written])


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_nothing_in_a_recipe_is_the_default(recipe, text):
    assert parse(["--config", recipe(f"{RECIPE}note: {text}\n")], Oven) == parse(["--config", recipe()], Oven)


def test_the_recipe_may_be_joined_by_an_equals_sign(recipe):
    assert parse([f"--config={recipe()}"], Oven) == parse(["--config", recipe()], Oven)


def test_the_command_line_overrides_the_recipe(recipe):
    arguments = ["--config", recipe(), "--dishes", "cake", "--heat", "90", "--fan", "--seats=6"]

    assert parse(arguments, Oven, Table) == (Oven(dishes=["cake"], cook="Ann", heat=90.0, fan=True), Table(seats=6))


def test_no_recipe_is_needed():
    assert parse(["--dishes", "pie", "--cook", "Ben", "--note", "crisp"], Oven) == (Oven(["pie"], "Ben", note="crisp"),)


@pytest.mark.parametrize(("value", "is_on"), [("true", True), ("no", False), ('"yes"', True), ('"false"', False)])
def test_a_switch_in_a_recipe(recipe, value, is_on):
    assert parse(["--config", recipe(f"{RECIPE}fan: {value}\n")], Oven)[0].fan is is_on


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        pytest.param(RECIPE + "oil: 3\n", [], "--oil", id="unknown key in the recipe"),
        pytest.param(RECIPE + "config: a.yaml\n", [], "^--config is unknown", id="recipe in the recipe"),
        pytest.param(RECIPE + "help: true\n", [], "^--help is unknown", id="help in the recipe"),
        pytest.param(RECIPE + "? [a, b]\n: 3\n", [], "has a key that is no word, in line 4", id="key of several"),
        pytest.param(RECIPE, ["--oil", "3"], "--oil", id="unknown key on the command line"),
        pytest.param(RECIPE, ["--min", "3"], "--min", id="no abbreviations"),
        pytest.param(RECIPE, ["stray"], "stray", id="stray word"),
        pytest.param("dishes: [pie]\n", [], "required: --cook", id="missing key"),
        pytest.param(RECIPE, ["--minutes", "soon"], "--minutes: invalid int value: 'soon'", id="word for a number"),
        pytest.param(RECIPE + "minutes: soon\n", [], "--minutes: invalid int value: 'soon'", id="word in the recipe"),
        pytest.param(RECIPE + "minutes: 1.5\n", [], "minutes", id="fraction for a whole number in the recipe"),
        pytest.param(RECIPE + "minutes: [1, 2]\n", [], "minutes", id="list for a number in the recipe"),
        pytest.param(
            "dishes: [pie]\ncook: Ann\nheat: high\n",
            [],
            "--heat: invalid float value: 'high'",
            id="word for a fraction",
        ),
        pytest.param(RECIPE + "fan: perhaps\n", [], "--fan: .* got perhaps", id="no switch"),
        pytest.param(RECIPE, ["--cook"], "--cook: expected one argument", id="value missing"),
        pytest.param(RECIPE + "cook: Ben\n", [], "recipe.yaml gives cook a second time, in line 4", id="key twice"),
        pytest.param(RECIPE + "env: {A: 1, A: 2}\n", [], "gives A a second time", id="key twice, deeper"),
        pytest.param("dishes: [pie\n", [], "not valid YAML: .* line 1", id="bad YAML"),
        pytest.param("- pie\n", [], "must contain a YAML mapping", id="a list"),
        pytest.param("", [], "must contain a YAML mapping", id="empty"),
        pytest.param(b"cook: \xff\n", [], "recipe.yaml is no text in UTF-8: invalid start byte", id="not UTF-8"),
        pytest.param(RECIPE + "\tfan: yes\n", [], 'recipe.yaml", line 4, column 1', id="tab"),
        pytest.param(RECIPE + "minuets: 3\n", [], "^--minuets is unknown; perhaps --minutes is", id="misspelled"),
        pytest.param(
            "dishes: [pie]\nCook: A\n", [], "^--Cook is unknown; perhaps --cook is", id="misspelled, required"
        ),
        pytest.param("cook: Ann\n", ["--dishs", "pie"], "^--dishs is unknown; perhaps --dishes is", id="typing error"),
        pytest.param("dishes: [pie]\ncook: {a: b}\n", [], "^--cook is {'a': 'b'}, not of the type str;", id="mapping"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(recipe, text, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        parse(["--config", recipe(text), *arguments], Oven, Table)

    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read: No such file"):
        parse(["--config", str(tmp_path / "nowhere.yaml")], Oven)


def test_config_without_a_path_says_so():
    with pytest.raises(UserError, match="--config needs the path of a recipe"):
        parse(["--dishes", "pie", "--cook", "Ben", "--config"], Oven)


def test_a_second_recipe_is_refused(recipe):
    with pytest.raises(UserError, match="--config"):
        parse(["--config", recipe(), "--config", recipe()], Oven)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for argument in ("p\udcffe", "--cook=\udcff"):
        with pytest.raises(UserError, match=r"\\udcff.*' has bytes that are no UTF-8") as error:
            parse(["--dishes", "pie", "--cook", "Ben", argument], Oven)
        str(error.value).encode()


def test_input_that_is_no_text_is_read_with_marks(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n"), encoding="utf-8"))
    run(lambda: print(ascii(input())))
    assert capsys.readouterr().out == "'a \\ufffd'\n"


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"topic": "Zoë’s kite", "rows": 3, "share": 0.25, "inner": {"none": None}}
    write_json(tmp_path / "file.json", content)

    assert read_json(tmp_path / "file.json", "prepare_dataset.py") == content
    assert "Zoë’s" in (tmp_path / "file.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"not json", b'{"a": "\xff"}'])
def test_damaged_json_names_the_stage_to_run_again(tmp_path, content):
    (tmp_path / "budget.json").write_bytes(content)

    with pytest.raises(UserError, match=r"budget\.json is damaged .*; run prepare_dataset\.py again"):
        read_json(tmp_path / "budget.json", "prepare_dataset.py")


def test_missing_json_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"budget\.json is missing; prepare_dataset\.py writes it"):
        read_json(tmp_path / "data" / "budget.json", "prepare_dataset.py")


def test_a_file_where_a_folder_should_be_is_a_mistake_too(tmp_path):
    (tmp_path / "data").write_text("no folder")

    with pytest.raises(UserError, match=r"budget\.json"):
        read_json(tmp_path / "data" / "budget.json", "prepare_dataset.py")


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (UserError("The file x is empty."), 2, "stage.py: The file x is empty.\n"),
        (KeyboardInterrupt(), 130, "stage.py: interrupted.\n"),
    ],
)
def test_a_mistake_becomes_one_line_and_a_status(monkeypatch, capsys, failure, status, message):
    def main():
        raise failure

    monkeypatch.setattr(sys, "argv", ["somewhere/stage.py", "--key"])
    with pytest.raises(SystemExit) as stopped:
        run(main)

    assert stopped.value.code == status
    assert capsys.readouterr() == ("", message)


def test_a_success_is_silent_and_a_bug_stays_a_bug(capsys):
    run(lambda: None)
    assert capsys.readouterr() == ("", "")

    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_a_reader_that_goes_away_ends_a_script_quietly(tmp_path):
    program = "from fledge.cli import run\nrun(lambda: [print('line', n) for n in range(100_000)])\n"
    script = tmp_path / "talk.py"
    script.write_text(program)
    talk = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    talk.stdout.readline()
    talk.stdout.close()
    assert (talk.stderr.read(), talk.wait()) == (b"", 141)


def test_help_may_be_cut_off():
    command = f"{sys.executable} prepare_dataset.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines()[-1], done.stderr) in (("0", ""), ("141", ""))


def test_a_broken_pipe_that_is_not_the_output_stays_a_bug():
    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(main)


def test_help_names_the_values_that_a_key_takes():
    helps = {
        entry.name: entry.metadata["help"] for kind in (ConvertArguments, PrepareArguments) for entry in fields(kind)
    }
    for key, values in {
        "layout": list(LAYOUTS),
        "template": names(),
        "task": task_names(),
        "source": source_names(),
    }.items():
        assert f": {', '.join(values)}" in helps[key]


def test_a_trackers_run_is_called_after_its_output_folder():
    for output_dir, name in {"runs/quickstart/model": "quickstart-model", "/model": "model", "../m": "m"}.items():
        assert run_name(output_dir) == name


SHOW_HELP = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_the_heavy_imports(script):
    command = [sys.executable, "-c", SHOW_HELP, f"{script}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "COLUMNS": "120"}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    usage, *_ = done.stdout.splitlines()
    assert usage.startswith(f"usage: {script}.py")
    assert "--config RECIPE.yaml" in done.stdout
    listed = re.findall(r"^  (?:-h, )?(--\w+)", done.stdout, re.MULTILINE)
    assert len(listed) == len(set(listed)) > 3
    assert not re.search(r"^  .*--\w+-\w", done.stdout, re.MULTILINE)  # no second spelling with hyphens
    required = done.stdout.partition("\nrequired:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (--\w+)", required, re.MULTILINE) == re.findall(r"(--[a-z_]+) ", usage)[:-1]
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    assert imported.isdisjoint({"torch", "transformers", "datasets", "sklearn", "matplotlib"})
