"""Publishing from end to end: folders, a Hub on loopback that gets them, and strangers who load them from there."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, call_script
from hub import TOKEN, Hub
from processes import fork_script
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fledge.encoding import encode_prompt
from fledge.publishing.spaces import GRADIO, About, space_settings
from fledge.publishing.static_space import one_question
from fledge.sampling import Sampling
from fledge.tasks import load_task, task_names

pytestmark = [pytest.mark.slow, pytest.mark.network]

INSTRUCTION = "Write a story about: Lily took a ball to the park number 3.\nWith: sad ending"
ABOUT = About("b", "a/b", None, None, None, "en")
ALL = ("--repo_id", "someone/tiny-tales", "--dataset_repo_id", "someone/data", "--space_repo_id", "someone/demo")

STRANGER = """
import contextlib, io, json, sys
from datasets import load_dataset
from transformers import pipeline
writer = pipeline("text-generation", "someone/tiny-tales")
chat = [{"role": "user", "content": sys.argv[1]}]
raw = sys.argv[1] + "\\n\\n### Story:\\n"
greedy = {"do_sample": False, "max_new_tokens": 40}
printed = []
for snippet in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet, {})
    printed.append(out.getvalue())
data = load_dataset("someone/data")
assert not any(name.startswith("fledge") for name in sys.modules)
print(json.dumps({
    "raw": writer(raw, return_full_text=False, **greedy)[0]["generated_text"],
    "chat": writer(chat, **greedy)[0]["generated_text"][-1]["content"],
    "raw_ids": writer.tokenizer(raw)["input_ids"],
    "chat_ids": writer.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"],
    "rows": {name: len(split) for name, split in data.items()},
    "columns": data["test"].column_names,
    "printed": printed,
}))
"""


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def online(hub: Hub, cache: Path, **variables: str) -> dict[str, str]:
    """The environment of a machine that has seen nothing yet and knows one Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        **variables,
    }


def publish(hub: Hub, tiny, cache: Path, *arguments: object, token: str = TOKEN, check: bool = True):
    return fork_script(
        "publish.py", "--model", tiny.model, "--evaluation", tiny.evaluation, "--dataset", tiny.data,
        "--license", "apache-2.0", *arguments, check=check, **online(hub, cache, HF_TOKEN=token),
    )  # fmt: skip


@pytest.fixture(scope="module")
def published(hub, tiny, tmp_path_factory):
    return publish(hub, tiny, tmp_path_factory.mktemp("publisher"), *ALL)


def snippets(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_each_repository_holds_its_folder_and_nobody_sees_the_token(published, hub, tiny):
    for kind, repo_id in (("model", "tiny-tales"), ("dataset", "data"), ("space", "demo")):
        repo = hub.repos[kind, f"someone/{repo_id}"]
        folder = tiny.repository / kind
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        assert {name: content for name, content in repo.files.items() if name != ".gitattributes"} == files
        assert len(repo.messages) == 1
        assert f"{repo_id}: {len(files)} files sent" in published.stdout
    assert TOKEN not in published.stdout + published.stderr
    assert not any(TOKEN.encode() in content for repo in hub.repos.values() for content in repo.files.values())


def test_a_stranger_with_an_empty_cache_runs_the_snippets(published, hub, tiny, tmp_path):
    card = hub.repos["model", "someone/tiny-tales"].files["README.md"].decode()
    python = snippets(card, "python")
    assert len(python) == 2
    done = fork_script("-c", STRANGER, INSTRUCTION, *python, folder=tmp_path, **online(hub, tmp_path))
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(tiny.data / "tokenizer")
    trained_on = encode_prompt(tokenizer, [{"role": "user", "content": INSTRUCTION}])
    assert found["raw_ids"] == found["chat_ids"] == trained_on
    assert found["raw"] == found["chat"]
    assert found["chat"].strip()
    budget = json.loads((tiny.data / "budget.json").read_text(encoding="utf-8"))
    assert found["rows"] == {name: split["rows"] for name, split in budget["splits"].items()}
    assert found["columns"] == ["instruction", "response", "ending"]
    assert all(text.strip() for text in found["printed"])


def test_the_command_on_the_card_runs(published, hub, tmp_path):
    card = hub.repos["model", "someone/tiny-tales"].files["README.md"].decode()
    (command,) = snippets(card, "bash")
    program, *given = shlex.split(command)
    assert program == "fledge"
    done = fork_script("-m", "fledge", *given, folder=tmp_path, **online(hub, tmp_path))
    assert done.stdout.strip().splitlines()[-1]


def test_a_second_publication_sends_nothing(published, hub, tiny, tmp_path):
    before = {key: dict(repo.refs) for key, repo in hub.repos.items()}
    hub.requests.clear()
    done = publish(hub, tiny, tmp_path, *ALL)
    assert done.stdout.count("nothing changed, nothing sent") == 3
    assert hub.uploads == []
    alone = fork_script(
        "publish.py", "--model", "someone/tiny-tales", "--evaluation", tiny.evaluation, "--license", "apache-2.0",
        "--space_repo_id", "someone/demo", **online(hub, tmp_path, HF_TOKEN=TOKEN),
    )  # fmt: skip
    assert "nothing changed, nothing sent" in alone.stdout
    assert {key: dict(repo.refs) for key, repo in hub.repos.items()} == before


def test_a_refusal_of_the_hub_is_one_sentence_and_the_folders_stay(published, hub, tiny, tmp_path):
    before = {key: dict(repo.refs) for key, repo in hub.repos.items()}
    done = publish(
        hub, tiny, tmp_path, *ALL, "--language", "de", "--output_dir", tmp_path / "out", check=False,
        token="hf_" + "o" * 34,
    )  # fmt: skip
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("publish.py:")]) == 1
    assert "must be allowed to write to someone" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model" / "README.md").exists()
    assert {key: dict(repo.refs) for key, repo in hub.repos.items()} == before


def test_a_dry_run_lists_what_would_be_sent(tiny):
    listed = json.loads((tiny.repository / "publication.json").read_text(encoding="utf-8"))
    for kind, of in listed.items():
        folder = tiny.repository / kind
        on_disk = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        assert of["files"] == on_disk
    assert {of["repo_id"] for of in listed.values()} == {"someone/tiny-tales", "someone/data", "someone/demo"}


def test_what_is_missing_is_said(tiny, tmp_path):
    done = call_script(
        "publish.py", "--model", tiny.model, "--repo_id", "a/b", "--dry_run", "--output_dir", tmp_path / "out"
    )
    assert "--evaluation" in done.stdout
    assert "--license" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".fledge.json", "model", "publication.json"}


def test_figures_of_other_weights_are_not_published(tiny, tmp_path):
    model = shutil.copytree(tiny.model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * values for name, values in weights.items()}, model / "model.safetensors", {"format": "pt"})
    keys = ("--model", model, "--repo_id", "a/b", "--dry_run", "--output_dir", tmp_path / "out")
    done = call_script("publish.py", *keys, "--evaluation", tiny.evaluation, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{tiny.evaluation} measured other weights than those of {model}" in done.stderr

    (model / "budget.json").unlink()
    done = call_script("publish.py", *keys, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "has no budget.json" in done.stderr
    assert list(tmp_path.iterdir()) == [model]


def test_a_dataset_that_nobody_trained_on_and_an_odd_licence_are_told(tiny, tmp_path):
    data = shutil.copytree(tiny.data, tmp_path / "data")
    budget = json.loads((data / "budget.json").read_text(encoding="utf-8"))
    (data / "budget.json").write_text(json.dumps(budget | {"seed": 9}), encoding="utf-8")
    done = call_script(
        "publish.py", "--model", tiny.model, "--repo_id", "a/b", "--license", "apache2", "--dry_run",
        "--output_dir", tmp_path / "out", "--dataset", data, "--dataset_repo_id", "a/c",
    )  # fmt: skip
    assert f"{data} is not the dataset that {tiny.model} was trained on" in done.stdout
    assert "--license apache2 is not among the Hub's identifiers; perhaps apache-2.0 is meant" in done.stderr


def test_the_space_runs_the_tested_gradio_without_fledge(tiny):
    space = tiny.repository / "space"
    metadata = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert metadata["sdk_version"] == GRADIO == pinned
    assert metadata["models"] == ["someone/tiny-tales"]
    app = (space / "app.py").read_text(encoding="utf-8")
    assert not re.search(r"import fledge|from fledge|trust_remote_code=True", app)
    assert json.loads((space / "settings.json").read_text(encoding="utf-8"))["trust_remote_code"] is False


@pytest.mark.parametrize("task", task_names())
def test_every_task_has_a_page_in_the_space(task, tmp_path):
    (tmp_path / "budget.json").write_text(
        json.dumps({"task": task, "about_task": load_task(task).about}), encoding="utf-8"
    )
    settings = space_settings(tmp_path, [], ABOUT, Sampling(temperature=0.7))
    assert settings["story"] or settings["chat"]
    assert settings["temperature"] == 0.7
    if settings["story"]:
        assert settings["story"]["instruction"].count("{topic}") == 1
        columns = 2 if settings["story"]["endings"] else 1
        assert all(len(example) == columns for example in settings["story"]["examples"])
    assert settings["chat"] is None or all(settings["chat"]["examples"])
    form = settings["story"] or one_question(settings["chat"])  # of the static Space
    assert {"label", "placeholder", "empty", "instruction", "endings", "examples"} <= form.keys()
    assert all(isinstance(field, str) for example in form["examples"] for field in example)


def test_an_example_of_the_space_stands_alone(tmp_path):
    budget = {"task": "story_chat", "about_task": load_task("story_chat").about}
    (tmp_path / "budget.json").write_text(json.dumps(budget), encoding="utf-8")
    turns = [("user", "Tell a story."), ("assistant", "Once."), ("user", "Who is it about?")]
    talk, single = ([{"role": r, "content": c} for r, c in some] for some in (turns, turns[:1]))
    samples = [{"sample": 0, "messages": messages} for messages in (talk, single, talk)]
    assert space_settings(tmp_path, samples, ABOUT, Sampling())["chat"]["examples"] == ["Tell a story."]


def test_no_code_asks_to_run_a_models_own_code():
    for file in [*ROOT.glob("*.py"), *(ROOT / "fledge").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repo_id", "no-slash"], "not of the form user/name"),
        (["--repo_id", "a/b..c"], "--repo_id a/b..c is no name that the Hub takes: Cannot have -- or .. in repo_id"),
        (["--repo_id", f"a/{'b' * 97}"], "the maximum length is 96"),
        (["--repo_id", "a/b", "--license", "Apache 2.0"], "--license Apache 2.0 is no identifier; give one such as"),
        (["--repo_id", "a/b", "--language", "english"], "--language english is no ISO 639 code"),
        ([], "Nothing to publish"),
        (["--repo_id", "a/b", "--model", "nowhere"], "There is no model at nowhere"),
        (["--space_repo_id", "a/b"], "loads its model from the Hub"),
        (["--space_repo_id", "a/b", "--space", "docker"], "choose gradio or static"),
        (["--space_repo_id", "a/b", "--space", "static", "--base", "nowhere"], "There is no model at nowhere"),
        (["--repo_id", "a/b", "--space", "static"], "needs --space_repo_id"),
        (["--repo_id", "a/b", "--base", "base"], "goes with --space static"),
        (["--space_repo_id", "a/b", "--quantize", "int8"], "goes with --space static"),
        (["--space_repo_id", "a/b", "--space", "static", "--quantize", "q8_0"], "give int8, or leave it out"),
        (["--dataset_repo_id", "a/b"], "go together"),
        (["--repo_id", "a/b", "--create_pr", "--revision", "v2"], "leave out --revision"),
        (["--repo_id", "a/b", "--evaluation", "nowhere"], "metrics.json is missing"),
        (["--dataset_repo_id", "a/b", "--dataset", "nowhere"], "budget.json is missing"),
    ],
)
def test_bad_input_leaves_nothing_behind(arguments, said, tiny, tmp_path):
    model = [] if "--model" in arguments else ["--model", tiny.model]
    done = call_script("publish.py", *model, "--dry_run", "--output_dir", tmp_path / "out", *arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
