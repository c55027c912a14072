import json
import re
import subprocess
import sys

import pytest
from conftest import run_script
from hub import Hub
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from fledge.cli import UserError
from fledge.encoding import encode_prompt
from fledge.publishing import refuse_local_paths, render

INSTRUCTION = "Write a story about: Lily took a ball to the park number 3.\nWith: sad ending"

PIPELINE_ALONE = """
import json, sys
from transformers import pipeline
assert not any(name.startswith("fledge") for name in sys.modules)
writer = pipeline("text-generation", model=sys.argv[1])
chat = [{"role": "user", "content": sys.argv[2]}]
raw = sys.argv[2] + "\\n\\n### Story:\\n"
greedy = {"do_sample": False, "max_new_tokens": 40}
print(json.dumps({
    "raw": writer(raw, return_full_text=False, **greedy)[0]["generated_text"],
    "chat": writer(chat, **greedy)[0]["generated_text"][-1]["content"],
    "raw_ids": writer.tokenizer(raw)["input_ids"],
    "chat_ids": writer.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"],
}))
"""


@pytest.fixture(scope="module")
def card(tiny) -> ModelCard:
    return ModelCard.load(tiny.repository / "README.md")


def test_a_new_process_with_transformers_alone_answers_raw_and_chat_alike(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE_ALONE, tiny.repository, INSTRUCTION],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(tiny.data / "tokenizer")
    trained_on = encode_prompt(tokenizer, [{"role": "user", "content": INSTRUCTION}])
    assert found["raw_ids"] == found["chat_ids"] == trained_on
    assert found["raw"] == found["chat"]
    assert found["chat"].strip()


def test_metadata_is_what_the_hub_accepts(card, tiny):
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for name, metric in tiny.metrics["model"].items():
        assert results[name] == pytest.approx(metric["value"], abs=1e-4)


def test_widget_examples_carry_real_outputs(card, tiny):
    samples = [
        json.loads(line) for line in (tiny.evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [example["output"]["text"] for example in card.data.widget] == [s["model"]["text"] for s in samples[:2]]
    assert card.data.widget[0]["text"] == samples[0]["instruction"] + "\n\n### Story:\n"


def test_the_usage_snippet_runs(card, tiny):
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "someone/tiny-tales" in snippet
    snippet = snippet.replace("someone/tiny-tales", str(tiny.repository)).replace(
        "max_new_tokens=300", "max_new_tokens=20"
    )
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_figures_and_hyperparameters_on_the_card_are_the_records(card, tiny):
    run = json.loads((tiny.model / "run.json").read_text(encoding="utf-8"))
    assert f"{run['steps']} steps of {run['effective_batch_size']} rows" in card.text
    assert "| `learning_rate` | 0.01 |" in card.text
    assert f"{tiny.metrics['model']['ending_match']['value']:.1%}" in card.text
    assert "None" not in card.content
    assert str(tiny.model.parent) not in card.content


def test_without_an_evaluation_the_card_says_so(tiny, tmp_path):
    done = run_script(
        "publish.py", "--model", tiny.model, "--repo_id", "a/b", "--dry_run", "--output_dir", tmp_path / "out"
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Not evaluated." in card.text
    assert card.data.eval_results is None
    assert "--evaluation" in done.stdout
    assert "--license" in done.stdout


def test_a_local_path_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "run.json").write_text('{"data": "/home/somebody/data"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"run.json names /home/somebody"):
        refuse_local_paths(tmp_path)


def test_a_value_that_nobody_gives_is_an_error_not_a_blank():
    with pytest.raises(Exception, match="'budget' is undefined"):
        render("dataset.md.jinja", metadata="")


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def publish_to(hub: Hub, tiny, output_dir, check: bool):
    return run_script(
        "publish.py", "--model", tiny.model, "--evaluation", tiny.evaluation, "--repo_id", "someone/tiny-tales",
        "--private", "--output_dir", output_dir, check=check,
        HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret", HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0",
    )  # fmt: skip


def test_the_hub_gets_the_folder_in_one_commit_and_nobody_sees_the_token(hub, tiny, tmp_path):
    done = publish_to(hub, tiny, tmp_path / "out", check=True)
    on_disk = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    received = hub.repos["someone/tiny-tales"]
    assert {name: received[name] for name in on_disk} == on_disk
    assert len(hub.commits) == 1
    assert hub.private == [True]
    assert "Published at" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_refusal_of_the_hub_is_one_sentence(hub, tiny, tmp_path):
    hub.refuse = True
    done = publish_to(hub, tiny, tmp_path / "out", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no write access" in done.stderr
    assert hub.commits == []


@pytest.mark.parametrize(
    "arguments", [["--repo_id", "no-slash"], ["--repo_id", "a/b", "--evaluation", "nowhere"], ["--repo_id", "a/b"]]
)
def test_bad_input_leaves_nothing_behind(arguments, tiny, tmp_path):
    model = tiny.base if len(arguments) == 2 else tiny.model
    done = run_script(
        "publish.py", "--model", model, "--dry_run", "--output_dir", tmp_path / "out", *arguments, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
