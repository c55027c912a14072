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
import torch
from conftest import ROOT, load_scratch_gpt

SOURCES = ("fledge", "model_card", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# The cells of the notebook, small; and what it leaves out.
CELLS = """
import json, os, sys
os.chdir("examples")
cells = json.load(open("quickstart.ipynb", encoding="utf-8"))["cells"]
known = {}
for cell in cells:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), known)
    if "parameters" in cell["metadata"].get("tags", ()):
        known |= dict(folder="../runs", limit=120, max_steps=2, num_prompts=2)
known["fledge"].export(model=known["model"], to="gguf", output_dir="../runs/gguf")
print(known["fledge"].__file__)
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
def test_a_wheel_runs_the_notebook_without_the_checkout(installed, tmp_path):
    python, runs = installed / "python", tmp_path / "runs"
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    scratch = load_scratch_gpt()
    config = scratch.CONFIG | {"emb_dim": 32, "n_heads": 2, "n_layers": 1}  # the shipped one takes long to answer
    checkpoint = {"model_state_dict": scratch.ScratchGPT(**config).state_dict(), "config": config}
    torch.save(checkpoint, tmp_path / "examples" / "scratch_gpt" / "checkpoint.pt")
    said = start(python, "-c", CELLS, cwd=tmp_path)
    assert "Next: fledge.prepare(tokenizer='../runs/base', data='RECORDS'" in said
    assert said.splitlines()[-1].startswith(str(installed.parent))
    assert (runs / "evaluation" / "report.html").stat().st_size > 10_000
    assert {"README.md", "app.py", "requirements.txt"} <= {path.name for path in (runs / "repository/space").iterdir()}
    assert (runs / "gguf" / "runs-f32.gguf").exists()
    # The repository that the environment lies in is not the one that Fledge's code comes from.
    assert json.loads((runs / "model" / "run.json").read_text(encoding="utf-8"))["commit"] is None


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)


@pytest.mark.slow
def test_the_console_command_lists_the_stages_and_runs_one(installed, tmp_path):
    listed = start(installed / "fledge", "--help", cwd=tmp_path)
    assert "\n  train " in listed
    config = ROOT / "recipes" / "accelerate" / "cpu.yaml"
    launched = (installed / "python", "-m", "accelerate.commands.launch", "--config_file", config, "-m", "fledge")
    for started in ((installed / "fledge",), launched):
        assert "usage: fledge train --model_name_or_path" in start(*started, "train", "--help", cwd=tmp_path)


def test_each_file_that_is_no_code_is_in_the_wheel(installed):
    (package,) = installed.parent.rglob("site-packages/fledge")
    data = [path for path in (ROOT / "fledge").rglob("*") if path.suffix not in (".py", ".pyc") and path.is_file()]
    wanted = {path.relative_to(ROOT / "fledge") for path in data}
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "model_card").rglob("*") if path.suffix != ".pyc"}
    assert {path for path in wanted if not (package / path).exists() and path.name != "__pycache__"} == set()
