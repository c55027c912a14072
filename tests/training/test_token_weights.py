import sys
from pathlib import Path

import pytest
import torch
from small import random_rows, small_gpt2, small_tokenizer, trainer_for

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import token_weights
from token_weights import MOST, PairCollator, Way, after_other, loss_of, rows_of

from fledge.encoding import IGNORED, prompt_length
from fledge.tokenizers import open_tokenizer
from fledge.training.loss import score_supervised_only


@pytest.fixture
def model(tmp_path):
    made = trainer_for(small_gpt2(), tmp_path).model
    score_supervised_only(made)
    return made


def batch_of(rows: list[dict]) -> dict:
    """The other prompts have other lengths than the rows' own."""
    with_other = [row | {"other_prompt": [7, 5, 3, 11, 2][: 2 + number % 4]} for number, row in enumerate(rows)]
    return PairCollator(small_tokenizer().pad_token_id)(with_other)


def by_definition(model, batch: dict, way: Way) -> torch.Tensor:
    """A row and a token at a time, through the logits."""

    def log_probs(of: dict) -> list[list[torch.Tensor]]:
        logits = model(input_ids=of["input_ids"]).logits.log_softmax(-1)
        return [
            [row[place - 1, label] for place, label in enumerate(labels) if label != IGNORED]
            for row, labels in zip(logits, of["labels"].tolist(), strict=True)
        ]

    numerator = denominator = contrast = count = 0
    for own, other in zip(log_probs(batch), log_probs(batch["other"]), strict=True):
        scores = [mine - others for mine, others in zip(own, other, strict=True)]
        for token, score in zip(own, scores, strict=True):
            weight = 1 + way.gain * min(max(score.item(), 0), MOST)
            numerator, denominator, count = numerator - weight * token, denominator + weight, count + 1
        contrast = contrast - torch.log(1 / (1 + torch.exp(-sum(scores))))
    return numerator / denominator + way.contrast * contrast / count


@pytest.mark.parametrize("way", [Way(), Way(gain=3), Way(contrast=5), Way(gain=3, contrast=5)])
def test_loss_and_gradients_of_a_way_by_definition(way, model):
    batch = batch_of(random_rows(6))
    loss = loss_of(model, batch, way)
    loss.backward()
    exact = small_gpt2().double()
    expected = by_definition(exact, batch, way)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for found, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_without_weights_the_loss_is_that_of_trl(tmp_path):
    trainer = trainer_for(small_gpt2(), tmp_path)
    batch = batch_of(random_rows(6))
    own = {key: value for key, value in batch.items() if key != "other"}
    expected = trainer.compute_loss(trainer.model, dict(own)).item()

    assert loss_of(trainer.model, batch, Way()).item() == pytest.approx(expected, abs=1e-6)


def test_a_token_of_weight_zero_is_as_good_as_not_supervised(model, monkeypatch):
    rows = random_rows(4)
    counts = [len(row["labels"]) - prompt_length(row["labels"]) for row in rows]
    weights = torch.ones(sum(counts))
    weights[torch.tensor(counts).cumsum(0) - 1] = 0  # the last token of each row
    monkeypatch.setattr(token_weights, "token_weights", lambda scores, gain: weights)
    found = loss_of(model, batch_of(rows), Way(gain=1))
    shorter = batch_of([row | {"labels": [*row["labels"][:-1], IGNORED]} for row in rows])

    torch.testing.assert_close(found, loss_of(model, shorter, Way()))


def test_a_token_that_the_prompt_does_not_decide_has_the_least_weight():
    found = token_weights.token_weights(torch.tensor([0.0, -2.0, 1.0, MOST, 9.0]), 4)

    assert found.tolist() == [1, 1, 5, 1 + 4 * MOST, 1 + 4 * MOST]


def test_the_other_prompt_asks_for_the_other_ending_of_the_same_topic(tiny):
    tokenizer = open_tokenizer(tiny.data / "tokenizer")
    for row in rows_of(tiny.data, "train").select(range(20)):
        begin = prompt_length(row["labels"])
        asked, other = (tokenizer.decode(ids) for ids in (row["input_ids"][:begin], row["other_prompt"]))
        exchanged = {"happy": "sad", "sad": "happy"}
        (ending,) = [ending for ending in exchanged if f"With: {ending} ending" in asked]

        assert other == asked.replace(f"With: {ending} ending", f"With: {exchanged[ending]} ending")
        assert after_other(row)["input_ids"][len(row["other_prompt"]) :] == row["input_ids"][begin:]
