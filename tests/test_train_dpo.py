"""From a model's own answers to a model that prefers the better ones, by the scripts that people run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import CONTEXT_LENGTH, random_rows, small_gpt2, small_tokenizer, write_prepared
from transformers import AutoModelForCausalLM

import fledge
from fledge.cli import run
from fledge.scripts import train_dpo
from fledge.training.run_record import Progress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
QUIET = ("--bf16", "False", "--per_device_train_batch_size", "4", "--use_cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    """A model of random weights with a template, and pairs for it: the rejected answers all begin with token 5."""
    work = tmp_path_factory.mktemp("small")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    small_gpt2(n_layer=3).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    write_prepared(work / "pairs", [row | {"rejected_ids": [5, 7]} for row in random_rows(24)], tokenizer)
    return SimpleNamespace(model=work / "model", pairs=work / "pairs", tokenizer=tokenizer)


def train(small, output_dir: Path, *arguments: object, dataset: object = None) -> None:
    """train_dpo.py in this process, which has imported everything already."""
    given = ("--model_name_or_path", small.model, "--dataset", dataset or small.pairs, "--output_dir", output_dir)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_dpo.py", *map(str, (*given, *QUIET, *arguments))])
        run(train_dpo.main)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, float]:
    return {str(file): file.stat().st_mtime for file in folder.rglob("*")}


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_as_one_that_was_not(small, tmp_path, monkeypatch, capsys):
    keys = ("--num_train_epochs", 2, "--learning_rate", 1e-3, "--save_strategy", "steps", "--save_steps", 4)
    keys += ("--logging_steps", 1)
    before = files(small.pairs)
    train(small, tmp_path / "straight", *keys)
    said = capsys.readouterr().out
    assert "validation loss 0." in said
    assert "preferred" in said
    assert "Time: about" in said

    def stop(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_epoch_end", stop, raising=False)
        with pytest.raises(Killed):
            train(small, tmp_path / "torn", *keys)
    train(small, tmp_path / "torn", *keys, "--resume", "auto")
    assert "Going on from" in capsys.readouterr().out
    for name, weight in weights(tmp_path / "straight").items():
        assert torch.equal(weight, weights(tmp_path / "torn")[name]), name
    assert files(small.pairs) == before  # the reference's log-probabilities are kept in memory

    steps = [entry for entry in logged(tmp_path / "straight") if "loss" in entry]
    wanted = {"rewards/accuracies", "rewards/margins", "logps/chosen", "num_tokens", "grad_norm", "tokens_per_second"}
    assert all(wanted <= entry.keys() for entry in steps)
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert steps[-1]["loss"] < 0.68
    record = json.loads((tmp_path / "straight" / "run.json").read_text(encoding="utf-8"))
    assert (record["rows"], record["steps"]) == ({"train": 24, "validation": 4}, 12)
    assert record["validation_loss"] < 0.68
    assert {"loss_curve.png", "run.json", "training_log.jsonl"} <= {
        path.name for path in (tmp_path / "straight").iterdir()
    }


def test_adapters_frozen_parts_and_smoke(small, tmp_path):
    train(small, tmp_path / "frozen", "--freeze_layers", 2, "--max_steps", 2, "--learning_rate", 1e-2)
    old, new = weights(small.model), weights(tmp_path / "frozen")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(".h.2." in name or "ln_f" in name for name in changed)
    train(small, tmp_path / "lora", "--use_peft", "--smoke", "--save_strategy", "steps")
    out = tmp_path / "lora-smoke"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["trained"]["adapter"]["kind"] == "LoRA"
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("answers", "holds answers without rejected ones, on which train_sft.py trains; make pairs"),
        ("ids", "has another id there; run prepare_dataset.py with this model's folder as --tokenizer"),
        ("length", f"The dataset has rows of 45 tokens and the model's context is {CONTEXT_LENGTH}; prepare it again"),
        ("template", "The dataset was prepared with another chat template than the model's"),
        ("beta", "--beta 0.0 is out of range"),
        ("nothing", "There is no data file at"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(small, tmp_path, capsys, case, message):
    rows = [row | {"rejected_ids": [5, 7]} for row in random_rows(6)]
    data, arguments, tokenizer = tmp_path / "data", (), small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if case == "answers":
        rows = random_rows(6)
    elif case == "ids":
        tokenizer = small_tokenizer(90)
        tokenizer.chat_template = TEMPLATE
    elif case == "length":
        rows[0] = {"input_ids": [3] * 8, "labels": [-100] * 5 + [3] * 3, "rejected_ids": [4] * 40}
    elif case == "template":
        tokenizer.chat_template = "{{ messages[0].content }}!"
    elif case == "beta":
        arguments = ("--beta", "0.0")
    if case != "nothing":
        write_prepared(data, rows, tokenizer)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(small, tmp_path / "out", *arguments, dataset=data)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert message in said[0]
    assert not (tmp_path / "out").exists()


def test_answers_become_pairs_and_pairs_a_model(tiny, tmp_path):
    """Through the functions of `fledge`, which run the scripts."""
    asked = {"num_prompts": 24, "num_samples": 4, "max_new_tokens": 60, "split": "train"}
    answers = fledge.evaluate(
        model=tiny.model, dataset=tiny.data, answers_only=True, output_dir=tmp_path / "answers", **asked
    )
    made = {"source": "answers", "data": answers, "tokenizer": tiny.model, "margin": 0.01, "split": "70/30/0"}
    pairs = fledge.prepare(**made, output_dir=tmp_path / "pairs")
    assert pairs.record["rows_kept"] > 10
    model = fledge.train_dpo(
        model_name_or_path=tiny.model, dataset=pairs, output_dir=tmp_path / "preferring", num_train_epochs=2,
        learning_rate=1e-3, per_device_train_batch_size=4, beta=0.1,
    )  # fmt: skip
    assert model.record["first_loss"] == pytest.approx(0.6931, abs=1e-2)
    assert model.record["last_loss"] < model.record["first_loss"]
    assert json.loads((tmp_path / "preferring" / "budget.json").read_text(encoding="utf-8"))["keep"] == "pairs"
    assert (tmp_path / "preferring" / "conversion.json").exists()
    assert fledge.generate(model=model, topic="A cat.", ending="sad", max_new_tokens=5)
    fledge.publish(
        model=model, dataset=pairs, repo_id="a/b", dataset_repo_id="a/c", license="apache-2.0", dry_run=True,
        output_dir=tmp_path / "hub",
    )  # fmt: skip
    card = (tmp_path / "hub" / "model" / "README.md").read_text(encoding="utf-8")
    kept = pairs.record["rows_kept"]
    assert f"{kept} pairs of a better and a worse answer, chosen by rule from a model's own answers to 24" in card
    assert "\n- dpo\n" in card
