"""Fledge as people install it: a wheel, in an environment of its own, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ("fledge", "model_card", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BEFORE = """
import fledge
base = fledge.convert(checkpoint={checkpoint!r}, tokenizer={tokenizer!r}, output_dir="base")
fledge.prepare(data={records!r}, tokenizer=base, split="80/10/10", output_dir="data")
"""
AFTER = """
import sys
import fledge
run = dict(model="model", output_dir="evaluation", num_prompts=2, max_new_tokens=4)
metrics = fledge.evaluate(base="base", dataset="data", **run).record
fledge.publish(
    model="model", evaluation="evaluation", repo_id="someone/tales", license="mit", space_repo_id="someone/demo",
    dry_run=True, output_dir="repository",
)
fledge.export(model="model", to="gguf", output="model.gguf")
print(sorted(metrics), fledge.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and of ours all but Fledge."""
    work = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # setuptools builds in the tree, and would also pack what an earlier build has left there
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / "source" / name if copy is shutil.copytree else (work / "source"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", work / "source", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", work]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = work.glob("fledge_gpt-*.whl")
    venv.create(work / "venv", with_pip=False)
    programs = work / "venv" / ("Scripts" if os.name == "nt" else "bin")
    install = ["install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, "--python", programs / "python", *install], check=True)
    where = sysconfig.get_path("purelib", "venv", {"base": str(work / "venv")})
    # A path in a .pth file is searched last, and the .pth files there, an editable Fledge among them, are not read.
    (Path(where) / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    if shutil.which("git"):  # people keep an environment in a repository of their own
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "init", "-q", work], check=True)
        subprocess.run(["git", *author, "-C", work, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    return programs


def start(*command: object, cwd: Path) -> str:
    """What `command` prints, run in `cwd` and without the checkout's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_goes_the_whole_way_without_the_checkout(installed, tiny, tmp_path):
    python, given = installed / "python", {"checkpoint": tiny.checkpoint, "tokenizer": tiny.tokenizer_file}
    before = BEFORE.format(**{name: str(path) for name, path in (given | {"records": tiny.records}).items()})
    assert "Next: fledge.prepare\n" in start(python, "-c", before, cwd=tmp_path)
    launch = (python, "-m", "accelerate.commands.launch", "--num_processes", 1, "--cpu", "-m", "fledge", "train")
    keys = ("--model_name_or_path", "base", "--dataset", "data", "--output_dir", "model", "--max_steps", 2)
    assert "Next: fledge evaluate\n" in start(*launch, *keys, cwd=tmp_path)
    made_by = start(python, "-c", AFTER, cwd=tmp_path).splitlines()[-1]
    assert "'model'" in made_by
    assert made_by.endswith(str(Path("site-packages", "fledge", "__init__.py")))
    assert str(installed.parent) in made_by
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 10_000
    assert {"README.md", "app.py", "requirements.txt"} <= {
        path.name for path in (tmp_path / "repository" / "space").iterdir()
    }
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    # The repository that the environment lies in is not the one that Fledge's code comes from.
    assert json.loads((tmp_path / "model" / "run.json").read_text(encoding="utf-8"))["commit"] is None


def test_the_console_command_lists_the_stages_and_runs_one(installed, tmp_path):
    listed = start(installed / "fledge", "--help", cwd=tmp_path)
    assert "\n  train " in listed
    assert "usage: fledge train [-h]" in start(installed / "fledge", "train", "--help", cwd=tmp_path)


def test_each_file_that_is_no_code_is_in_the_wheel(installed):
    (package,) = installed.parent.rglob("site-packages/fledge")
    data = [path for path in (ROOT / "fledge").rglob("*") if path.suffix not in (".py", ".pyc") and path.is_file()]
    wanted = {path.relative_to(ROOT / "fledge") for path in data}
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "model_card").rglob("*") if path.suffix != ".pyc"}
    assert {path for path in wanted if not (package / path).exists() and path.name != "__pycache__"} == set()
