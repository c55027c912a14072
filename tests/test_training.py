import json

import pytest
import torch
from small import small_gpt2, small_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fledge.cli import UserError
from fledge.training import (
    SmallModelConfig,
    check_fit,
    choose_bf16,
    save_loss_curve,
    use_all_threads,
)


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
    with pytest.raises(UserError, match="97 rows for the 98 tokens"):
        check_fit(model, small_tokenizer(98), small_tokenizer(98), longest=10)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "t1": 1})))
    with pytest.raises(UserError, match="with 2 tokens and the model's tokenizer has 97, of which 't"):
        check_fit(model, own, other, longest=10)


def test_loss_curve_is_a_picture(tmp_path):
    history = [{"step": 1, "loss": "2.0"}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.6}]
    save_loss_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_record_names_what_was_chosen_and_no_path(tiny):
    record = json.loads((tiny.model / "run.json").read_text(encoding="utf-8"))
    chosen = record["hyperparameters"]
    assert (chosen["learning_rate"], chosen["num_train_epochs"]) == (0.01, 12.0)
    assert chosen["train_sampling_strategy"] == "group_by_length"
    assert str(tiny.model.parent) not in json.dumps(record)
    assert record["last_loss"] < record["first_loss"]
    assert record["effective_batch_size"] == 8
    assert record["rows"]["train"] > 0
    assert set(record["versions"]) == {"python", "fledge", "torch", "transformers", "trl", "datasets"}


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
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    said = use_all_threads(config)
    assert chosen == ([expected] if expected else [])
    assert (said is None) == (expected is None)
