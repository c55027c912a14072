"""No file that Fledge did not write ever disappears or changes, whatever lies in a folder and whenever a run ends."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.folders import check_inputs, claimed
from fledge.marks import MARK, WORK

STAGES = (
    "convert_checkpoint.py",
    "prepare_dataset.py",
    "train_sft.py",
    "pretrain.py",
    "evaluate_model.py",
    "publish.py",
)
TRAIN = "train_sft.py"


def contents(folder: Path) -> dict[str, str]:
    """Path → text, a link → where it leads."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in folders + files):
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
            elif path.is_file():
                found[str(path.relative_to(folder))] = path.read_text()
    return found


def without_mark(folder: Path) -> dict[str, str]:
    return {path: text for path, text in contents(folder).items() if Path(path).name != MARK}


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (folder / f"{stem}.json").write_text(text)


def finish(folder: Path, stage: str = TRAIN, overwrite: bool = False, **files: str) -> None:
    """A run of `stage` that succeeds."""
    with claimed(folder, stage, overwrite) as output:
        if stage in WORK:
            output.begin_work(None)
        with output.staged() as building:
            write(building, **files)


def leave_unfinished(folder: Path, stage: str = TRAIN) -> None:
    """A run of `stage` that has saved a checkpoint or an answer and was then stopped."""
    with claimed(folder, stage, True) as output:
        output.begin_work(None)
        if "checkpoints" in WORK[stage]:
            (output.work / "checkpoint-3" / "shards").mkdir(parents=True)
            for name in ("model.safetensors", "trainer_state.json", "shards/__0_0.distcp"):
                (output.work / "checkpoint-3" / name).write_text("half")
        else:
            (output.work / "answers.jsonl").write_text("{}")


NAMES = [
    "thesis.tex",
    "run.json",
    "config.json",
    "metrics.json",
    "budget.json",
    "model.safetensors",
    MARK,
    ".hidden",
    "a",
]
FOLDERS = ["", "src", "checkpoints", "checkpoints/checkpoint-3", "unfinished", "data", "runs/deep"]
foreign_paths = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)).map(lambda parts: Path(*parts))
foreign_files = st.dictionaries(
    foreign_paths, st.sampled_from(["file", "link to a file", "link to a folder"]), max_size=4
)


@settings(max_examples=75)
@given(
    stage=st.sampled_from(STAGES),
    earlier=st.lists(st.tuples(st.sampled_from(["finished", "unfinished"]), st.sampled_from(STAGES)), max_size=2),
    foreign=foreign_files,
    beside=st.sets(st.sampled_from([".out.fledge-building", ".out.fledge-replaced", ".out.fledge-holder"]), max_size=2),
    during=st.dictionaries(foreign_paths, st.just("file"), max_size=2),
    overwrite=st.sampled_from([None, False, True]),
    resume=st.booleans(),
    ends=st.sampled_from([None, UserError, OSError, KeyboardInterrupt]),
)
def test_no_file_of_others_disappears_or_changes(stage, earlier, foreign, beside, during, overwrite, resume, ends):
    with tempfile.TemporaryDirectory() as place:
        folder, elsewhere = Path(place) / "work" / "out", Path(place) / "elsewhere"
        write(elsewhere / "inner", kept="mine")
        for how, of_stage in earlier:
            # Another stage was first, or this one has no folder of unfinished work.
            with contextlib.suppress(UserError, KeyError):
                finish(folder, of_stage, True, run=how) if how == "finished" else leave_unfinished(folder, of_stage)
        theirs = {}

        def put(path: Path, kind: str) -> None:
            if (path.exists() or path.is_symlink()) or any(part.is_file() for part in path.parents):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_text("theirs")
            else:
                path.symlink_to(elsewhere / "inner" / "kept.json" if kind == "link to a file" else elsewhere)
            theirs[str(path.relative_to(place))] = contents(Path(place))[str(path.relative_to(place))]

        for path, kind in foreign.items():
            # What has the very name of a trainer's file in Fledge's own folder of checkpoints cannot be told apart.
            is_theirs = not (folder / path).parent.exists() or not any(how == "unfinished" for how, _ in earlier)
            if is_theirs or path.name in ("thesis.tex", ".hidden", "a"):
                put(folder / path, kind)
        for name in beside:
            put(folder.parent / name / "theirs" if name.endswith(("g", "d")) else folder.parent / name, "file")
        before = contents(Path(place))
        began = False
        with contextlib.suppress(UserError, KeyboardInterrupt), claimed(folder, stage, overwrite) as output:
            if overwrite is None:
                output.check(resume)
            began = True
            if stage in WORK:
                output.begin_work(output.work / "checkpoint-3" if resume else None)
            for path, kind in during.items():
                if path.name in ("thesis.tex", ".hidden", "a"):
                    put(folder / path, kind)
            with output.staged() as building:
                write(building, run="new", config="new")
                (building / "a").write_text("new")
                if ends is not None:
                    raise ends
            output.add("metrics.json", lambda folder: (folder / "metrics.json").write_text("new"))
        if not began:
            assert contents(Path(place)) == before
        after = contents(Path(place))
        assert {path: after.get(path) for path in theirs} == theirs
        assert after["elsewhere/inner/kept.json"] == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_may_be_written(tmp_path, overwrite):
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    for name in ("new", "deep/new", "empty"):
        with claimed(tmp_path / name, TRAIN, overwrite):
            pass
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["empty", "empty/inside"]


def test_what_is_there_is_named_and_stays(tmp_path):
    finish(tmp_path / "model", run="1")
    finish(tmp_path / "data", "prepare_dataset.py", budget="1")
    finish(tmp_path / "mixed", run="1", config="1")
    (tmp_path / "mixed" / "src").mkdir()
    (tmp_path / "mixed" / "src" / "thesis.tex").write_text("mine")
    finish(tmp_path / "edited", run="1")
    (tmp_path / "edited" / "run.json").write_text("edited by hand")
    write(tmp_path / "proj" / "checkpoints" / "checkpoint-3", trainer_state="mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name, overwrite, message in [
        ("model", False, r"already has content; name another --output_dir or pass --overwrite"),
        ("data", True, r"was written by prepare_dataset.py, not by train_sft.py"),
        ("mixed", True, r"mixed/src/thesis.tex was not written by train_sft.py, or was changed since; move it away"),
        ("edited", True, r"edited/run.json was not written by train_sft.py, or was changed"),
        ("proj", True, r"holds checkpoints/checkpoint-3/trainer_state.json and no mark of train_sft.py"),
        ("file", True, r"is a file; name a folder"),
        ("file/inside", True, r"cannot be written"),
    ]:
        with pytest.raises(UserError, match=message), claimed(tmp_path / name, TRAIN, overwrite):
            pytest.fail("the block ran")
    assert contents(tmp_path) == before


def test_an_output_appears_whole_at_the_end_and_replaces_everything(tmp_path):
    target = tmp_path / "deep" / "out"
    finish(target, run="old", left="over")
    leave_unfinished(target.with_name("other"))
    with claimed(target, TRAIN, True) as output:
        output.begin_work(None)
        (output.work / "checkpoint-3").mkdir()
        (output.work / "checkpoint-3" / "optimizer.pt").write_text("half")
        with output.staged() as folder:
            write(folder / "inner", run="new")
            assert without_mark(target)["run.json"] == "old"
    assert without_mark(target) == {"inner/run.json": "new"}
    assert {path.name for path in target.parent.iterdir()} == {"out", "other"}


def test_a_link_to_an_output_is_followed(tmp_path):
    finish(tmp_path / "real", run="old")
    (tmp_path / "link").symlink_to("real")
    finish(tmp_path / "link", overwrite=True, run="new")
    assert without_mark(tmp_path / "link") == {"run.json": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_what_others_put_there_meanwhile_stays_and_the_result_is_kept(tmp_path):
    with claimed(tmp_path / "out", TRAIN) as output:
        output.begin_work(None)
        (output.work / "emissions.txt").write_text("mine")
        with output.staged() as folder:
            write(folder, run="new")
    assert without_mark(tmp_path / "out") == {"run.json": "new", "checkpoints/emissions.txt": "mine"}

    def race():
        with claimed(tmp_path / "other", TRAIN) as output, output.staged() as folder:
            write(folder, run="new")
            write(tmp_path / "other", run="mine")

    with pytest.raises(UserError, match=r"run.json was put there meanwhile.*lies in .*other-finished"):
        race()
    assert without_mark(tmp_path / "other") == {"run.json": "mine"}
    assert without_mark(tmp_path / "other-finished") == {"run.json": "new"}


def test_a_record_that_fails_costs_nothing_else(tmp_path, capsys):
    def fail(folder):
        (folder / "curve.png").write_text("half")
        raise RuntimeError("no font")

    with claimed(tmp_path / "out", TRAIN) as output:
        with output.staged() as folder:
            write(folder, run="new")
        output.add("curve.png", fail)
        output.add("log.json", lambda folder: write(folder, log="new"))
        mark = (tmp_path / "out" / MARK).read_text()
        (tmp_path / "out" / MARK).unlink()
        output.add("late.json", lambda folder: write(folder, late="new"))
        (tmp_path / "out" / MARK).write_text(mark)
    told = capsys.readouterr().err
    assert "curve.png failed and is left out (RuntimeError: no font)" in told
    assert f"late.json failed and is left out (UserError: {tmp_path / 'out'} has lost its mark" in told
    assert without_mark(tmp_path / "out") == {"run.json": "new", "curve.png": "half", "log.json": "new"}
    finish(tmp_path / "out", overwrite=True, run="newer")  # all of it is Fledge's
    assert without_mark(tmp_path / "out") == {"run.json": "newer"}


@pytest.mark.parametrize("output", ["in", "in/deeper", "in/../in", "link", "link/new", ".", "hard/b"])
def test_an_output_that_is_an_input_or_holds_it_is_refused(tmp_path, output):
    write(tmp_path / "in", data="mine")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "a").write_text("mine")
    os.link(tmp_path / "hard" / "a", tmp_path / "hard" / "b")
    read = tmp_path / ("hard/a" if output == "hard/b" else "in")
    message, inputs = r"--output_dir .*(is|lies in|holds) --data .*, which is read|is a file", ["nowhere", str(read)]
    with pytest.raises(UserError, match=message), claimed(tmp_path / output, TRAIN, True, {"--data": inputs}):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match=r"--x .*(is|lies in|holds) --data"):
        check_inputs(tmp_path / output, "--x", {"--data": str(read)})


HOLD = """
import signal, sys, time
from fledge.folders import claimed
with claimed(sys.argv[1], "train_sft.py", True) as output, output.staged():
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path):
    process = hold(tmp_path / "out")
    try:
        told = rf"Another run is writing .*out at this moment \(-c, process {process.pid} on .*, since 20.* UTC\)"
        with pytest.raises(UserError, match=told), claimed(tmp_path / "out", TRAIN, True):
            pytest.fail("the block ran")
        finish(tmp_path / "other", run="other")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(tmp_path / "out", run="new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


KILLED = """
import os, signal, sys
from pathlib import Path
from fledge.folders import claimed

real, unlink = Path.rename, Path.unlink
def die(self, name):
    if sys.argv[2] == name and self.name != ".fledge.json.new":
        os.kill(os.getpid(), signal.SIGKILL)
def rename(self, target):
    die(self, f"rename {self.name}")
    return real(self, target)
def remove(self, **keys):
    die(self, f"unlink {self.name}")
    return unlink(self, **keys)
Path.rename, Path.unlink = rename, remove
with claimed(sys.argv[1], "train_sft.py", True) as output, output.staged() as folder:
    (folder / "run.json").write_text("half")
    if sys.argv[2] == "block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("moment", ["block", "rename out", "rename .out.fledge-building", "unlink left.json"])
def test_after_a_kill_an_output_is_whole_and_a_rerun_completes(tmp_path, moment, was_there):
    if was_there:
        finish(tmp_path / "out", run="old", left="over")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), moment]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == (-9 if was_there or moment in ("block", "rename .out.fledge-building") else 0)
    found = without_mark(tmp_path / "out")
    assert found in ({}, {"run.json": "old", "left.json": "over"}, {"run.json": "half"})
    finish(tmp_path / "out", overwrite=True, run="new")
    assert without_mark(tmp_path / "out") == {"run.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    finish(tmp_path / "out", run="old")
    with (
        pytest.raises(UserError, match="out cannot be written: No space left on device"),
        claimed(tmp_path / "out", TRAIN, True) as output,
        output.staged(),
    ):
        raise OSError(28, "No space left on device")
    assert without_mark(tmp_path / "out") == {"run.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_work_yet_is_not_left_behind(tmp_path):
    with contextlib.suppress(UserError), claimed(tmp_path / "deep" / "out", TRAIN) as output:
        output.begin_work(None)
        raise UserError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with claimed(tmp_path / "out", TRAIN) as output:
        output.check_room(3_000_000)
        with pytest.raises(UserError, match=r"out needs 4.0 MB and its disk has 3.0 MB free; make room first"):
            output.check_room(4_000_000)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_whoever_may_read_a_record_may_read_the_weights(tmp_path):
    with claimed(tmp_path / "out", TRAIN, False) as output, output.staged() as building:
        write(building, weights="as safetensors writes them")
        (building / "weights.json").chmod(0o600)
    assert (tmp_path / "out" / "weights.json").stat().st_mode == (tmp_path / "out" / MARK).stat().st_mode
