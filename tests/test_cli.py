import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fledge.cli import UserError, check_output_dir, parse, read_json, run, staged, write_json

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
        pytest.param(RECIPE, ["--oil", "3"], "--oil", id="unknown key on the command line"),
        pytest.param(RECIPE, ["--min", "3"], "--min", id="no abbreviations"),
        pytest.param(RECIPE, ["stray"], "stray", id="stray word"),
        pytest.param("dishes: [pie]\n", [], "required: --cook", id="missing key"),
        pytest.param(RECIPE, ["--minutes", "soon"], "--minutes: invalid int value: 'soon'", id="word for a number"),
        pytest.param(RECIPE + "minutes: soon\n", [], "--minutes: invalid int value: 'soon'", id="word in the recipe"),
        pytest.param(RECIPE + "minutes: 1.5\n", [], "minutes", id="fraction for a whole number in the recipe"),
        pytest.param(RECIPE + "minutes: [1, 2]\n", [], "minutes", id="list for a number in the recipe"),
        pytest.param(RECIPE + "heat: high\n", [], "--heat: invalid float value: 'high'", id="word for a fraction"),
        pytest.param(RECIPE + "fan: perhaps\n", [], "--fan: .* got perhaps", id="no switch"),
        pytest.param(RECIPE, ["--cook"], "--cook: expected one argument", id="value missing"),
        pytest.param("dishes: [pie\n", [], "not valid YAML: .* line 1", id="bad YAML"),
        pytest.param("- pie\n", [], "must contain a YAML mapping", id="a list"),
        pytest.param("", [], "must contain a YAML mapping", id="empty"),
        pytest.param(b"cook: \xff\n", [], "can't decode byte 0xff", id="not UTF-8"),
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


MARK = "mark.json"


def write_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (folder / f"{stem}.json").write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_may_be_written(tmp_path, overwrite):
    (tmp_path / "empty" / "inside").mkdir(parents=True)

    for name in ("new", "deep/new", "empty"):
        assert check_output_dir(tmp_path / name, overwrite, MARK) == tmp_path / name
    assert not (tmp_path / "new").exists()


def test_a_folder_with_content_needs_overwrite(tmp_path):
    folder = write_folder(tmp_path / "out", mark="{}")

    with pytest.raises(UserError, match=r"already has content; .*--overwrite"):
        check_output_dir(folder, False, MARK)
    assert check_output_dir(folder, True, MARK) == folder


def test_content_deep_inside_counts(tmp_path):
    write_folder(tmp_path / "out" / "a" / "b", notes="mine")

    with pytest.raises(UserError, match="already has content"):
        check_output_dir(tmp_path / "out", False, MARK)


def test_a_folder_that_fledge_did_not_write_is_never_replaced(tmp_path):
    folder = write_folder(tmp_path / "home", thesis="mine")

    with pytest.raises(UserError, match=r"holds no mark\.json"):
        check_output_dir(folder, True, MARK)
    with pytest.raises(UserError, match=r"holds no mark\.json"), staged(folder, True, MARK):
        pytest.fail("the block ran")
    assert contents(tmp_path) == {"home/thesis.json": "mine"}


def test_any_one_of_several_marks_is_enough(tmp_path):
    folder = write_folder(tmp_path / "out", mark="{}")

    assert check_output_dir(folder, True, "other.json", MARK) == folder
    with pytest.raises(UserError, match=r"holds no other\.json"):
        check_output_dir(folder, True, "other.json", "third.json")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_output_folder(tmp_path, overwrite):
    file = tmp_path / "out"
    file.write_text("mine")

    with pytest.raises(UserError, match="is a file; name a folder"):
        check_output_dir(file, overwrite, MARK)
    with pytest.raises(UserError, match="is a file"), staged(file, overwrite, MARK):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match="cannot be written"), staged(file / "inside", overwrite, MARK):
        pytest.fail("the block ran")
    assert file.read_text() == "mine"


def test_an_output_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with staged(target, False, MARK) as folder:
        write_folder(folder, mark="{}")
        write_folder(folder / "inner", more="1")
        assert not target.exists()

    assert contents(tmp_path) == {"deep/out/mark.json": "{}", "deep/out/inner/more.json": "1"}


def test_overwriting_replaces_everything(tmp_path):
    target = write_folder(tmp_path / "out", mark="old", left="over")
    with staged(target, True, MARK) as folder:
        write_folder(folder, mark="new")
        assert contents(target) == {"mark.json": "old", "left.json": "over"}

    assert contents(tmp_path) == {"out/mark.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (UserError("the data ran out"), UserError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), UserError),
    ],
)
@pytest.mark.parametrize("was_there", [False, True])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, failure, seen, was_there):
    if was_there:
        write_folder(tmp_path / "out", mark="old")
    before = contents(tmp_path)

    def write_half():
        with staged(tmp_path / "out", True, MARK) as folder:
            write_folder(folder, mark="half")
            raise failure

    with pytest.raises(seen):
        write_half()

    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if was_there else [])


def test_a_full_disk_is_named_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="out cannot be written: No space left"), staged(tmp_path / "out", False, MARK):
        raise OSError(28, "No space left on device")


def test_an_output_named_by_a_link_is_replaced_without_leftovers(tmp_path):
    write_folder(tmp_path / "real", mark="old")
    (tmp_path / "link").symlink_to("real")
    with staged(tmp_path / "link", True, MARK) as folder:
        write_folder(folder, mark="new")

    assert contents(tmp_path / "link") == {"mark.json": "new"}
    assert {path.name for path in tmp_path.iterdir()} <= {"real", "link"}


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_one_finishes(tmp_path):
    with staged(tmp_path / "out", False, MARK) as folder:
        write_folder(folder, mark="first")
        with (
            pytest.raises(UserError, match=r"Another run is writing .*out at this moment"),
            staged(tmp_path / "out", False, MARK),
        ):
            pytest.fail("the block ran")
        with staged(tmp_path / "other", False, MARK) as other:
            write_folder(other, mark="other")

    assert contents(tmp_path) == {"out/mark.json": "first", "other/mark.json": "other"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


KILLED = """
import os, signal, sys
from pathlib import Path
from fledge.cli import staged

real = Path.replace
def replace(self, target):
    if sys.argv[2] == self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
with staged(sys.argv[1], True, "mark.json") as folder:
    (folder / "mark.json").write_text("half")
    if sys.argv[2] == "block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("moment", ["block", "out", ".out.building"])
def test_after_a_kill_there_is_the_old_output_or_none_and_a_rerun_completes(tmp_path, moment, was_there):
    if was_there:
        write_folder(tmp_path / "out", mark="old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), moment]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)

    is_killed = moment != "out" or was_there  # without an old output there is none to move away
    assert done.returncode == (-9 if is_killed else 0)
    if is_killed:
        assert {file.read_text() for file in (tmp_path / "out").glob("*")} <= {"old"}
        with staged(tmp_path / "out", True, MARK) as folder:
            assert list(folder.iterdir()) == []
            assert contents(tmp_path / "out") == ({"mark.json": "old"} if was_there else {})
            write_folder(folder, mark="new")
        assert contents(tmp_path) == {"out/mark.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    assert done.stdout.startswith(f"usage: {script}.py")
    assert "--config RECIPE.yaml" in done.stdout
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    assert imported.isdisjoint({"torch", "transformers", "datasets", "sklearn", "matplotlib"})
