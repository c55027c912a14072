import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from small import small_gpt2, small_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fledge.errors import UserError
from fledge.training.configuration import check_processes, choose_bf16, use_all_threads
from fledge.training.resuming import newest_checkpoint
from fledge.training.run_record import save_curve, save_log
from fledge.training.trainer import SmallModelConfig, check_fit, limit_length


def test_precision_is_chosen_with_a_reason_and_the_user_wins(tmp_path):
    chosen = SmallModelConfig(output_dir=str(tmp_path))
    assert (chosen.bf16, chosen.precision_reason) == choose_bf16(chosen.use_cpu)
    asked = SmallModelConfig(output_dir=str(tmp_path), bf16=False)
    assert (asked.bf16, asked.precision_reason) == (False, "as asked for")
    assert SmallModelConfig(output_dir=str(tmp_path)).gradient_checkpointing is False


def test_data_of_another_model_is_refused():
    model, own = small_gpt2(), small_tokenizer()
    check_fit(model, own, own, longest=40)
    check_fit(model, own, small_tokenizer(99), longest=40)
    with pytest.raises(UserError, match="rows of 41 tokens and the model's context is 40"):
        check_fit(model, own, own, longest=41)
    with pytest.raises(UserError, match="has 98 tokens, and the model has rows for 97"):
        check_fit(model, small_tokenizer(98), small_tokenizer(98), longest=10)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "t1": 1})))
    with pytest.raises(UserError, match="with 2 tokens and the model's tokenizer has 97, of which 't"):
        check_fit(model, own, other, longest=10)


def test_the_log_and_its_picture(tmp_path):
    history = [{"step": 1, "loss": "2.0"}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.6}]
    save_log(history, tmp_path)
    save_curve(history, tmp_path, "loss")
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    log = (tmp_path / "training_log.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in log.splitlines()] == history


def test_run_record_names_what_was_chosen_and_no_path(tiny):
    record = json.loads((tiny.model / "run.json").read_text(encoding="utf-8"))
    chosen = record["hyperparameters"]
    assert (chosen["learning_rate"], chosen["num_train_epochs"]) == (0.01, 12.0)
    assert chosen["train_sampling_strategy"] == "group_by_length"
    assert str(tiny.model.parent) not in json.dumps(record)
    assert record["last_loss"] < record["first_loss"]
    assert record["effective_batch_size"] == 8
    assert record["rows"]["train"] > 0
    assert set(record["versions"]) == {
        "python",
        "fledge",
        "torch",
        "transformers",
        "trl",
        "datasets",
        "accelerate",
        "peft",
    }


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 6),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "4"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_a_process_of_accelerate_launch_gets_its_share_of_the_cores(variables, expected, monkeypatch, tmp_path):
    config = SmallModelConfig(output_dir=str(tmp_path), use_cpu=True)
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr("fledge.training.configuration.cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    said = use_all_threads(config)
    assert chosen == ([expected] if expected else [])
    assert (said is None) == (expected is None)


@pytest.mark.parametrize(
    ("variables", "world_size", "n_gpu", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 1, 1, "several processes and started one"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 2, 1, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, 1, None),
        ({}, 1, 1, None),
        ({}, 1, 4, "sees 4 GPUs; start one on each with accelerate launch"),
    ],
)
def test_fewer_processes_than_the_launcher_was_told_are_refused(variables, world_size, n_gpu, message, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(world_size=world_size, n_gpu=n_gpu)
    if message is None:
        check_processes(config, "train_sft.py")
    else:
        with pytest.raises(UserError, match=message):
            check_processes(config, "train_sft.py")


@pytest.mark.parametrize(
    ("given", "limited", "said"),
    [
        ({"max_length": 100}, 40, "max_length was 100"),
        ({"max_length": 30}, 30, None),
        ({}, None, None),
        ({"packing": True, "max_length": None}, 40, "Packed into rows of 40"),
    ],
)
def test_rows_are_never_longer_than_the_context(given, limited, said, tmp_path):
    config = SmallModelConfig(output_dir=str(tmp_path), **given)
    rows = DatasetDict({"train": Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])})
    changed, lines = limit_length(config, small_gpt2(), rows)
    assert changed.max_length == limited
    assert (said in lines[0]) if said else not lines
    assert config.max_length == given.get("max_length")


def test_early_stopping_keeps_checkpoints_where_it_evaluates(tmp_path):
    config = SmallModelConfig(output_dir=str(tmp_path), early_stopping_patience=2, eval_strategy="steps", eval_steps=7)
    assert (config.load_best_model_at_end, config.save_strategy, config.save_steps) == (True, "steps", 7)
    assert SmallModelConfig(output_dir=str(tmp_path)).save_strategy == "no"


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["whole", "cut", "absent", "other step"])), max_size=6))
def test_the_newest_complete_checkpoint_is_found(saved):
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), set()
        for step, state in dict(saved).items():
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir()
            text = json.dumps({"global_step": step + (state == "other step")})
            if state != "absent":
                (checkpoint / "trainer_state.json").write_text(text[:-3] if state == "cut" else text, encoding="utf-8")
            if state == "whole":
                whole.add(step)
        (folder / "checkpoint-best").mkdir()
        found = newest_checkpoint(folder)
        assert (found and found.name) == (f"checkpoint-{max(whole)}" if whole else None)
