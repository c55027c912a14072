"""train_grpo.py on a model that train_sft.py made, as a person would start it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import fork_two
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fledge.cli import run
from fledge.scripts import train_grpo

pytestmark = pytest.mark.usefixtures("no_pictures")

SHORT = (
    "--bf16", "False", "--use_cpu", "--max_steps", 4, "--num_generations", 2, "--per_device_train_batch_size", 8,
    "--gradient_accumulation_steps", 2, "--max_completion_length", 12, "--learning_rate", 1e-3,
    "--watch_prompts", 0,
)  # fmt: skip


def train(tiny, output_dir: Path, *arguments: object, **changed: Path) -> None:
    """train_grpo.py in this process, which has imported everything already."""
    folders = {"model_name_or_path": tiny.model, "dataset": tiny.data, "output_dir": output_dir} | changed
    given = [part for key, folder in folders.items() for part in (f"--{key}", folder)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_grpo.py", *map(str, (*given, *SHORT, *arguments))])
        run(train_grpo.main)


def same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=name, **tolerance)


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    """Four steps without a stop, by a reward of the user's own beside two of the task's."""
    folder = tmp_path_factory.mktemp("grpo") / "straight"
    own = folder.parent / "own.py"
    own.write_text("def short(completions, **_):\n    return [1 / (1 + len(c[0]['content'])) for c in completions]\n")
    train(tiny, folder, "--rewards", "topic", "varied", f"{own}:short", "--reward_weights", 1, 1, 0.5)
    return folder


def test_what_is_written(straight, tiny):
    assert {file.name for file in straight.iterdir()} == {
        ".fledge.json",
        "budget.json",
        "chat_template.jinja",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "rewards.png",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
        "watch.jsonl",
    }
    record = json.loads((straight / "run.json").read_text(encoding="utf-8"))
    assert record["steps"] == 4
    assert record["rewards"].keys() == {"reward", "topic", "varied", "short"}
    assert record["hyperparameters"]["reward_weights"] == [1, 1, 0.5]
    log = [json.loads(line) for line in (straight / "training_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "reward" in entry]
    keys = {"rewards/topic/mean", "rewards/short/std", "kl", "entropy", "frac_reward_zero_std", "num_tokens"}
    assert all(keys <= entry.keys() and entry["tokens_per_second"] > 0 for entry in steps)
    assert len(steps) == 4
    tokenizer = AutoTokenizer.from_pretrained(straight)
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(tiny.model).padding_side
    assert AutoModelForCausalLM.from_pretrained(straight).config.use_cache is True


def test_such_prompts_alone_are_learned_from(tiny, tmp_path):
    (tmp_path / "own.py").write_text("def sad(ending, **_):\n    return [float(of == 'sad') for of in ending]\n")
    one_step = ("--max_steps", 1, "--watch_prompts", 4, "--only", "ending=sad")
    train(tiny, tmp_path / "out", "--rewards", "stopped", f"{tmp_path / 'own.py'}:sad", *one_step)
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["rewards"]["sad"] == [1, 1]
    looks = (tmp_path / "out" / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(look)["rewards/sad"] for look in looks] == [1, 1]


def test_two_processes_are_one_with_twice_the_prompts(straight, tiny, tmp_path):
    folder = tmp_path / "two"
    given = ("--model_name_or_path", tiny.model, "--dataset", tiny.data, "--output_dir", folder, *SHORT)
    rewards = ("--rewards", "topic", "varied", f"{straight.parent / 'own.py'}:short", "--reward_weights", 1, 1, 0.5)
    fork_two("train_grpo.py", *given, *rewards, "--per_device_train_batch_size", 4)
    same_weights(straight, folder, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "changed", "said"),
    [
        ([], {"model_name_or_path": "base"}, "has no chat template, so it cannot answer a prompt yet; fine-tune it"),
        ([], {"dataset": "records"}, "budget.json is missing; "),
        (["--num_generations", 5], {}, "16 answers a step are no whole number of groups of --num_generations 5"),
        (["--num_generations", 1], {}, "--num_generations 1 is out of range"),
        (["--rewards", "wit"], {}, "The task topic_ending has no reward 'wit'; name some of "),
        (["--rewards", "topic", "--reward_weights", 1, 2], {}, "--reward_weights has 2 numbers for 1 rewards"),
        (["--gradient_accumulation_steps", 400], {}, "prompts and a step takes 1600; lower"),
        (["--temperature", 0], {}, "--temperature 0.0 is out of range"),
        (["--eval_strategy", "steps"], {}, "--eval_steps says how often"),
        (["--only", "ending=odd"], {}, "No row meets --only ending=odd; its values of ending: happy, sad."),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(arguments, changed, said, tiny, tmp_path, capsys):
    changed = {key: getattr(tiny, name) for key, name in changed.items()}
    with pytest.raises(SystemExit, match="2"):
        train(tiny, tmp_path / "out", *arguments, **changed)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return [len(text.split()) for text in completions]", "fails on a reference: AttributeError"),
        ("return [1.0]", r"returned [1.0] for 4 references; it must return a finite number, or None, for each"),
        ("return [float('nan')] * len(completions)", "returned [nan, nan, nan, nan] for 4 references"),
    ],
)
def test_a_reward_that_does_not_work_is_refused_before_the_training(code, said, tiny, tmp_path, capsys):
    (tmp_path / "own.py").write_text(f"def own(completions, **_):\n    {code}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        train(tiny, tmp_path / "out", "--rewards", "topic", f"{tmp_path / 'own.py'}:own")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dataset_with_another_template_is_refused(tiny, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(tiny.model, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        train(tiny, tmp_path / "out", model_name_or_path=other)
    assert "prepared with another chat template than the model's" in capsys.readouterr().err
