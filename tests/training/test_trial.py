import pytest
import torch
from small import random_rows, small_gpt2, trainer_for

from fledge.training import trial
from fledge.training.trainer import prepare_model
from fledge.training.trial import in_words, time_needed


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (99, "99 seconds"),
        (101, "2 minutes"),
        (484, "8 minutes"),
        (3 * 3600 - 1, "180 minutes"),
        (4.6 * 3600, "5 hours"),
    ],
)
def test_a_time_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("changes", "share"), [({"num_train_epochs": 2}, 2), ({"max_steps": 3}, 0.5), ({"num_train_epochs": 3}, 3)]
)
def test_what_is_left_is_told_at_the_speed_of_the_trial(tmp_path, monkeypatch, changes, share):
    rows = random_rows(24)
    tokens = sum(len(row["input_ids"]) for row in rows)
    trainer = trainer_for(small_gpt2(), tmp_path, rows, **changes)
    prepare_model(trainer)
    monkeypatch.setattr(trial, "seconds_of", lambda trainer, loss_of, repeats: loss_of().item() * 0 + 1e-3)
    # The four rows nearest to the mean length are read in a millisecond.
    mean = tokens / len(rows)
    nearest = sorted((abs(len(row["input_ids"]) - mean), len(row["input_ids"])) for row in rows)[:4]
    speed = sum(length for _, length in nearest) * 1000
    for seen, left in ((0, tokens * share), (tokens // 4, tokens * share - tokens // 4)):
        monkeypatch.setattr(trial, "in_words", lambda seconds: f"{seconds:.6f}")
        assert time_needed(trainer, seen) == (
            f"Time: about {left / speed:.6f} on this machine ({speed:,} tokens/s in a short trial)"
        )


def test_a_trial_leaves_no_trace(tmp_path):
    model = small_gpt2()
    model.config.attn_pdrop = model.config.resid_pdrop = 0.1
    trainer = trainer_for(model, tmp_path)
    prepare_model(trainer)
    before, dice = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    assert "tokens/s in a short trial" in time_needed(trainer, 0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), dice)
    assert trainer._total_train_tokens == 0


def test_no_trial_of_a_model_that_will_be_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert time_needed(trainer_for(small_gpt2(), tmp_path), 0) is None
