"""A tiny system that the end-to-end tests share: a hand-written checkpoint, records, and the scripts run on them."""

import contextlib
import gc
import gzip
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from filelock import FileLock
from hypothesis import settings
from processes import fork_script

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
gc.disable()  # while tests are collected: next to nothing of what is imported is garbage
settings.register_profile("fledge", deadline=None)  # a busy machine is no failure
settings.load_profile("fledge")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NAMES = ("Lily", "Tim", "Sara", "Ben", "Anna", "Tom", "Mia", "Max")
THINGS = ("ball", "kite", "boat", "hat", "cake", "drum", "doll", "book", "tree", "stone", "cup", "fish")
PLACES = ("park", "garden", "house", "forest", "shop", "river")


def write_records(file: Path, count: int) -> None:
    """TinyStories-Instruct records whose endings a classifier can tell; fields also follow the story."""
    rng = random.Random(1)
    records = []
    for number in range(count):
        name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
        sad = number % 3 == 0
        end = "The end was bad and all were sad." if sad else "They were happy and hugged."
        story = f"{name} had a {thing}. {name} went to the {place}.\n{name} saw number {number}. {end}"
        fields = [f"Summary: {name} took a {thing} to the {place} number {number}.", f"Words: {thing}, {place}"]
        fields += ["Features: Dialogue, BadEnding"] if sad else []
        rng.shuffle(fields)
        fields.insert(rng.randrange(len(fields) + 1), f"Story: \n\n{story}")
        records.append("\n".join(fields))
    file.write_text("".join(f"{record}\n<|endoftext|>\n" for record in records), encoding="utf-8")


def load_module(file: Path) -> ModuleType:
    """Runs a file as a module and leaves no bytecode beside it, where other tests compare the files of a folder."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(module)
    return module


def load_scratch_gpt() -> ModuleType:
    return load_module(ROOT / "examples" / "scratch_gpt.py")


def call_script(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script of the repository to its end in this process, without the seconds that importing torch takes."""
    import torch

    from fledge.cli import run

    main = importlib.import_module(f"fledge.scripts.{script.removesuffix('.py')}").main
    out, err, status = io.StringIO(), io.StringIO(), 0
    given = [script, *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        torch.random.fork_rng(),
    ):
        patched.setattr(sys, "argv", given)
        try:
            run(main)
        except SystemExit as left:
            status = left.code
    assert not check or status == 0, err.getvalue()
    return subprocess.CompletedProcess(given, status, out.getvalue(), err.getvalue())


def run_script(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Starts a script as a person would, with environment `variables` of the test's own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def build_for_gpus(patched: pytest.MonkeyPatch) -> None:
    """Makes torch one that is built for GPUs, on a machine without one; PyPI's torch for Linux often is.

    `current_accelerator` then names a GPU that cannot be used, unless it is told to check.
    """
    import torch

    found = {True: None, False: torch.device("cuda")}
    patched.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found[check_available])


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in random order")


def pytest_collection_modifyitems(config, items):
    """A test that needs the folders of five scripts is slow, and one that needs a browser is marked so.

    Files with slow tests come first: what two processes still do at the end is short. The very first needs `tiny`, and
    the others that do come last of these: while one process makes it, the other has work without it.
    """
    for item in items:
        for fixture, mark in (("tiny", pytest.mark.slow), ("browser", pytest.mark.browser)):
            if fixture in item.fixturenames:
                item.add_marker(mark)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    of_tiny = list(dict.fromkeys(item.path for item in items if "tiny" in item.fixturenames))
    items.sort(key=lambda item: (item.path not in of_tiny[:1], item.path not in slow, item.path in of_tiny))
    if (seed := config.getoption("shuffle")) is not None:
        rng = random.Random(seed)
        places = {path: rng.random() for path in dict.fromkeys(item.path for item in items)}
        rng.shuffle(items)
        items.sort(key=lambda item: places[item.path])


def pytest_collection_finish():
    """Imports torch here, and not above: the process that only hands out tests to others needs none of it."""
    import torch

    torch.set_num_threads(1)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _freeze():
    """What was imported so far stays, and each of the many trainings would otherwise look through it for garbage.

    Once a file, because tests import more, and torch's exporter keeps much in memory.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch):
    """A picture takes as long as such a run, and is drawn by the tests of pictures, by `tiny` and by shared runs."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: Path(file).touch())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Folders `base`, `data`, `model`, `evaluation`, `repository`, each written by the script whose work it is.

    `repository` holds what the Hub would get: `model`, `dataset` and `space`.
    """
    work = tmp_path_factory.getbasetemp() / "tiny"
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first worker that needs the system makes it for all
        work = work.parents[1] / "tiny"
    with FileLock(f"{work}.lock"):
        if not (work / "made.json").exists():
            (work / "made.json").write_text(json.dumps(make_tiny(work)), encoding="utf-8")
    made = json.loads((work / "made.json").read_text(encoding="utf-8"))
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    paths = {name: Path(path) for name, path in made["paths"].items()}
    return SimpleNamespace(**paths, trained=made["trained"], evaluated=made["evaluated"], metrics=metrics)


def make_tiny(work: Path) -> dict:
    """Runs the stages; the paths of what they wrote, and what training and evaluation printed."""
    import torch

    work.mkdir()
    paths = {name: work / name for name in ("base", "data", "model", "evaluation", "repository")}
    records, checkpoint, tokenizer_file = work / "records.txt", work / "model.pt", work / "tokenizer.json"
    write_records(records, 240)
    scratch = load_scratch_gpt()
    torch.manual_seed(0)
    tokenizer = scratch.train_tokenizer(scratch.read_documents([records]), 420)
    tokenizer.save(str(tokenizer_file))
    config = {
        "vocab_size": tokenizer.get_vocab_size(),
        "context_length": 128,
        "emb_dim": 48,
        "n_heads": 3,
        "n_layers": 2,
    }
    torch.save({"model_state_dict": scratch.ScratchGPT(**config).state_dict(), "config": config}, checkpoint)

    call_script(
        "convert_checkpoint.py", "--checkpoint", checkpoint, "--tokenizer", tokenizer_file,
        "--output_dir", paths["base"],
    )  # fmt: skip
    call_script(
        "prepare_dataset.py", "--data", records, "--tokenizer", paths["base"], "--balance", "ending",
        "--split", "80/10/10", "--output_dir", paths["data"],
    )  # fmt: skip
    trained = fork_script(
        "train_sft.py", "--model_name_or_path", paths["base"], "--dataset", paths["data"],
        "--output_dir", paths["model"], "--num_train_epochs", 12, "--learning_rate", 0.01,
        "--per_device_train_batch_size", 8,
    )  # fmt: skip
    evaluated = call_script(
        "evaluate_model.py", "--model", paths["model"], "--base", paths["base"], "--dataset", paths["data"],
        "--output_dir", paths["evaluation"], "--max_new_tokens", 60, "--batch_size", 8,
    )  # fmt: skip
    call_script(
        "publish.py", "--model", paths["model"], "--evaluation", paths["evaluation"], "--dataset", paths["data"],
        "--repo_id", "someone/tiny-tales", "--dataset_repo_id", "someone/data", "--space_repo_id", "someone/demo",
        "--license", "apache-2.0", "--dry_run", "--output_dir", paths["repository"],
    )  # fmt: skip
    paths |= {"checkpoint": checkpoint, "tokenizer_file": tokenizer_file, "records": records}
    return {
        "paths": {name: str(path) for name, path in paths.items()},
        "trained": trained.stdout,
        "evaluated": evaluated.stdout,
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> SimpleNamespace:
    """Raw text as a `file`, and a `tokenizer` folder that train_tokenizer.py wrote from it."""
    file = tmp_path_factory.mktemp("corpus") / "records.txt"
    write_records(file, 120)
    folder = file.parent / "tokenizer"
    call_script(
        "train_tokenizer.py", "--data", file, "--vocab_size", 400, "--output_dir", folder,
        "--special_tokens", "<|user|>", "<|assistant|>",
    )  # fmt: skip
    return SimpleNamespace(file=file, tokenizer=folder)


@pytest.fixture(scope="module")  # a longer one would keep its event loop running in other files' tests
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here; install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def run_node():
    """Runs JavaScript that uses transformers.js and returns its last line, read as JSON; skips where it is missing."""
    found = shutil.which("node") and subprocess.run(
        ["node", "-e", 'require.resolve("@huggingface/transformers")'], capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("Node finds no @huggingface/transformers; npm install it and set NODE_PATH to its node_modules")

    def run(script: str, *arguments: str):
        done = subprocess.run(["node", "-e", script, *arguments], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def yardsticks() -> list[dict]:
    """Stories that people read, with what they found."""
    lines = (ROOT / "tests" / "judges" / "yardsticks.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tales(yardsticks) -> list[str]:
    """A thousand shipped tales that no reader labelled."""
    from fledge.sources.tinystories_instruct import END, parse_record

    with gzip.open(ROOT / "examples" / "tales.txt.gz", "rt", encoding="utf-8") as file:
        stories = [parse_record("\n" + part).get("Story", "") for part in file.read().split(END)]
    read = {row["story"] for row in yardsticks}
    return [story for story in stories if story.endswith(".") and story not in read][:1000]


@pytest.fixture(scope="session")
def coherence(tales):
    from fledge.judges.coherence import CoherenceJudge

    return CoherenceJudge(tales[100:])
