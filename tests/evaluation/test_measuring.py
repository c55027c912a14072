import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from small import random_rows, small_gpt2
from transformers import AutoTokenizer

from fledge.encoding import IGNORED
from fledge.evaluation.intervals import interval
from fledge.evaluation.measuring import completion_nats, loss_by_position, loss_ratios, supervised_text
from fledge.evaluation.report import table
from fledge.models import load_model


@pytest.fixture(scope="module")
def losses(tiny):
    """The model, its tokenizer, the test rows, and the nats of their supervised tokens."""
    model, tokenizer = load_model(str(tiny.model))
    rows = load_from_disk(str(tiny.data / "tokenized"))["test"].to_list()
    return model, tokenizer, rows, completion_nats(model, tokenizer, rows, lambda done: None)


def test_completion_losses_equal_rows_scored_one_by_one(losses, monkeypatch):
    model, tokenizer, rows, together = losses
    monkeypatch.setattr("fledge.evaluation.measuring.TOKENS_AT_ONCE", 300)
    in_small_batches = completion_nats(model, tokenizer, rows, lambda done: None)
    for row, nats, again in zip(rows, together, in_small_batches, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        by_hand = torch.stack([-F.log_softmax(logits[i - 1], -1)[row["labels"][i]] for i in supervised])
        assert torch.allclose(nats, by_hand, atol=1e-4)
        assert torch.allclose(again, by_hand, atol=1e-4)


def test_no_forward_holds_more_tokens_than_it_may(monkeypatch):
    monkeypatch.setattr("fledge.evaluation.measuring.TOKENS_AT_ONCE", 90)
    model, rows, shapes, done = small_gpt2(), random_rows(12), [], []
    model.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    together = completion_nats(model, SimpleNamespace(pad_token_id=None), rows, done.append)
    assert all(count * longest <= 90 for count, longest in shapes)
    assert max(count for count, _ in shapes) > 2
    assert done == np.cumsum([count for count, _ in shapes]).tolist()
    alone = [completion_nats(model, SimpleNamespace(pad_token_id=0), [row])[0] for row in rows]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(together, alone, strict=True))


def test_of_a_single_answer_nothing_says_how_sure_its_loss_is():
    for ratio in loss_ratios([torch.tensor([0.5, 1.0])], ["He ran."]).values():
        found = interval(ratio)
        assert found["low"] == found["value"] == found["high"]


def test_perplexity_and_bits_per_byte_by_hand(losses, tiny):
    _, tokenizer, rows, nats = losses
    texts = [supervised_text(tokenizer, row) for row in rows]
    total, tokens = sum(row.sum().item() for row in nats), sum(len(row) for row in nats)
    size = sum(len(text.encode("utf-8")) for text in texts)
    found = {name: interval(ratio)["value"] for name, ratio in loss_ratios(nats, texts).items()}
    assert found["completion_loss"] == pytest.approx(total / tokens)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    samples = [json.loads(line) for line in (tiny.evaluation / "samples.jsonl").read_text("utf-8").split("\n") if line]
    assert texts == [sample["reference"] for sample in samples]


def test_the_perplexity_of_a_model_that_is_sure_and_wrong_is_a_number():
    ratios = loss_ratios([torch.full((4,), nats) for nats in (2000.0, 3000.0)], ["a b", "c d"])
    found = {name: interval(ratio) for name, ratio in ratios.items()}
    assert found["completion_loss"]["value"] == 2500.0
    assert found["perplexity"]["low"] == found["perplexity"]["high"] == pytest.approx(math.exp(100))
    json.dumps(found, allow_nan=False)


def test_loss_by_position_counts_each_answer_from_its_own_beginning():
    """The first token of a row is never predicted."""
    rows = [{"labels": [IGNORED, 5, 6, IGNORED, 7]}, {"labels": [IGNORED, IGNORED, 5, 6, 7]}, {"labels": [5, 6, 7]}]
    nats = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, 7.0]), torch.tensor([11.0, 10.0])]
    assert loss_by_position(rows, nats) == [
        {"first": 1, "last": 1, "nats": 5.0, "n": 4},
        {"first": 2, "last": 2, "nats": 6.0, "n": 3},
        {"first": 3, "last": 4, "nats": 7.0, "n": 1},
    ]


def test_metrics_file_has_both_models_with_intervals(tiny):
    metrics = tiny.metrics
    assert metrics["judge"]["accuracy"] > 0.9
    for name in ("base", "model"):
        for key in ("instruction_following", "ending_match", "eos_rate", "perplexity", "completion_loss"):
            assert metrics[name][key].keys() == {"value", "low", "high", "n"}
            assert metrics[name][key]["low"] <= metrics[name][key]["value"] <= metrics[name][key]["high"]
    for name, chance in metrics["chance"]["model"].items():
        assert chance["value"] <= metrics["reference"][name]["value"]
    assert metrics["reference"]["instruction_following"]["value"] >= 0.75  # 10 stories that a rule made
    assert {"ending_match", "topic"} <= metrics["chance"]["model"].keys()
    assert metrics["no_chance"]["eos_rate"] == "it does not depend on the instruction"
    assert metrics["no_chance"].keys() | metrics["chance"]["model"].keys() == metrics["model"].keys()
    assert metrics["baselines"]["copied_prompt"]["topic"]["value"] == 1.0
    assert metrics["model"]["completion_loss"]["high"] < metrics["base"]["completion_loss"]["low"]
    assert metrics["model"]["eos_rate"]["value"] > metrics["base"]["eos_rate"]["value"]


def test_table_and_judge_accuracy_are_shown(tiny):
    assert table(tiny.metrics) in tiny.evaluated
    shown = f"agrees with {tiny.metrics['judge']['accuracy']:.1%} of the labels"
    assert shown in tiny.evaluated
    assert shown in (tiny.evaluation / "report.md").read_text(encoding="utf-8")


def test_every_answer_is_kept_and_adds_up(tiny):
    samples = [
        json.loads(line) for line in (tiny.evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny.data / "tokenizer")
    assert len(samples) == tiny.metrics["model"]["eos_rate"]["n"]
    for name in ("base", "model"):
        rate = np.mean([sample[name]["stopped"] for sample in samples])
        assert tiny.metrics[name]["eos_rate"]["value"] == pytest.approx(rate)
        for key in ("ending_match", "instruction_following", "topic"):
            mean = np.mean([sample[name]["scores"][key] for sample in samples])
            assert tiny.metrics[name][key]["value"] == pytest.approx(mean)
    assert all(tokenizer.eos_token not in sample["model"]["text"] for sample in samples)
