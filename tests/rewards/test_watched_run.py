"""train_grpo.py is watched: a run by the script, cut and resumed, and by two processes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from processes import fork_two
from safetensors.torch import load_file

from fledge.cli import run
from fledge.encoding import open_rows
from fledge.errors import UserError
from fledge.rewards.curves import RewardProgress
from fledge.rewards.limits import WatchArguments
from fledge.rewards.watch import watched_in
from fledge.scripts import train_dpo, train_grpo

pytestmark = pytest.mark.usefixtures("no_pictures")

SHORT = (
    "--bf16", "False", "--use_cpu", "--max_steps", 5, "--num_generations", 4, "--per_device_train_batch_size", 8,
    "--max_completion_length", 12, "--learning_rate", 3e-3, "--gradient_accumulation_steps", 2,
    "--rewards", "topic", "stopped", "--eval_steps", 2, "--watch_prompts", 7, "--watch_patience", 0,
)  # fmt: skip


def keys(tiny, folder: Path, *arguments: object) -> list[str]:
    given = ("--model_name_or_path", tiny.model, "--dataset", tiny.data, "--output_dir", folder, *SHORT, *arguments)
    return [str(part) for part in given]


def train(tiny, folder: Path, *arguments: object) -> None:
    """train_grpo.py in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_grpo.py", *keys(tiny, folder, *arguments)])
        run(train_grpo.main)


def looks_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "watch.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "straight"
    train(tiny, folder)
    return folder


def test_the_run_says_what_it_saw(straight):
    """At the start, every two steps and at the end; in the log, in a file, and in a picture."""
    looks = looks_of(straight)
    log = [json.loads(line) for line in (straight / "training_log.jsonl").read_text().splitlines()]

    assert [look["step"] for look in looks] == [0, 2, 4, 5]
    assert sum(look["kept"] for look in looks) == 1
    assert [entry["step"] for entry in log if "watch/instruction_following" in entry] == [0, 2, 4, 5]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5]
    expected = {"reward", "rewards/topic", "ending_match_second", "topic", "coherence", "distinct_2", "completion_loss"}
    assert all(expected | {"copied", "repetition", "answer_tokens", "eos_rate"} <= look.keys() for look in looks)
    assert looks[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert looks[-1]["kl"] > 1e-5
    record = json.loads((straight / "run.json").read_text(encoding="utf-8"))["watch"]
    kept = next(look for look in looks if look["kept"])
    assert record["kept_step"] == kept["step"]
    assert record["completion_loss"] == [looks[0]["completion_loss"], kept["completion_loss"]]
    picture = (straight / "rewards.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_run_that_was_cut_sees_and_keeps_the_same(straight, tiny, tmp_path, monkeypatch, capsys):
    told = []

    def third(self, args, state, control, **_):
        if state.global_step == 3 and not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patched:
        patched.setattr(RewardProgress, "on_step_end", third)
        with pytest.raises(SystemExit, match="143"):
            train(tiny, tmp_path / "cut")
    assert "Kept" not in capsys.readouterr().out
    train(tiny, tmp_path / "cut", "--resume", "auto")

    assert looks_of(tmp_path / "cut") == looks_of(straight)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "cut"))
    assert all((one[name] == other[name]).all() for name in one)


def test_two_processes_see_what_one_sees(straight, tiny, tmp_path):
    """At the start, which does not depend on the steps that follow."""
    one_step = ("--per_device_train_batch_size", 4, "--max_steps", 1)
    fork_two("train_grpo.py", *keys(tiny, tmp_path / "two", *one_step))

    first, other = looks_of(straight)[0], looks_of(tmp_path / "two")[0]
    assert other == pytest.approx(first, abs=1e-5)


def test_an_adapter_is_held_against_the_model_without_it(tiny, tmp_path, capsys):
    train(tiny, tmp_path / "lora", "--use_peft", "--max_steps", 2, "--learning_rate", 0.05, "--save_strategy", "steps")
    looks = looks_of(tmp_path / "lora")

    assert [look["step"] for look in looks] == [0, 2]
    assert looks[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert looks[1]["kl"] > 1e-5


def test_preferences_are_watched_on_the_dataset_that_is_named(tiny, tmp_path):
    table = tmp_path / "pairs.jsonl"
    rows = [row["messages"] for row in open_rows(tiny.data)["train"][:24]]
    pairs = [{"prompt": m[0]["content"], "chosen": m[1]["content"], "rejected": "They were bad."} for m in rows]
    table.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    given = ("--model_name_or_path", tiny.model, "--dataset", table, "--output_dir", tmp_path / "model", "--use_cpu")
    given += ("--bf16", "False", "--watch_dataset", tiny.data, "--watch_prompts", 7, "--max_steps", 2)
    given += ("--learning_rate", 1e-3)  # the default moves so small a model by a KL near that of rounding
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_dpo.py", *map(str, given)])
        run(train_dpo.main)

    looks = looks_of(tmp_path / "model")
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert looks[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert looks[2]["kl"] > 1e-6
    assert {"rewards/ending", "rewards/stopped", "coherence"} <= looks[0].keys()


def test_a_dataset_without_validation_prompts_is_not_watched_unasked(tiny):
    assert watched_in(WatchArguments(watch_prompts=0), tiny.data, None, {}) is None
    with pytest.raises(UserError, match="Or train without being watched: --watch_prompts 0"):
        watched_in(WatchArguments(), tiny.base, None, {"topic": 1.0})
