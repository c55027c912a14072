import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from transformers import AutoTokenizer

from fledge.encoding import IGNORED
from fledge.evaluation import completion_losses, interval, paired_difference, table
from fledge.generation import load_model


def test_completion_losses_equal_rows_scored_one_by_one(tiny):
    model, tokenizer = load_model(str(tiny.model))
    rows = load_from_disk(str(tiny.data / "tokenized"))["test"].to_list()
    nats, counts = completion_losses(model, tokenizer, rows, 5, lambda done: None)
    for row, nat, count in zip(rows, nats, counts, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        by_hand = -sum(F.log_softmax(logits[i - 1], -1)[row["labels"][i]] for i in supervised)
        assert count == len(supervised)
        assert nat.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_interval_holds_the_mean_and_shrinks_with_more_prompts():
    rng = np.random.default_rng(1)
    few, many = rng.normal(3, 1, 50), rng.normal(3, 1, 5000)
    for values in (few, many):
        found = interval(values)
        normal = 1.96 * values.std() / np.sqrt(len(values))
        assert found["value"] == pytest.approx(values.mean())
        assert found["low"] == pytest.approx(values.mean() - normal, rel=0.03)
        assert found["high"] == pytest.approx(values.mean() + normal, rel=0.03)
        assert found["n"] == len(values)


def test_weighted_interval_is_a_ratio_of_sums():
    found = interval(np.array([1.0, 3.0]), np.array([3.0, 1.0]))
    assert found["value"] == pytest.approx(1.5)


def test_difference_is_paired():
    base = [{"x": 0.0}, {"x": 1.0}, {"x": 0.0}]
    model = [{"x": 0.5}, {"x": 1.5}, {"x": 0.5}]
    assert paired_difference(base, model)["x"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 3}


def test_metrics_file_has_both_models_with_intervals(tiny):
    metrics = tiny.metrics
    assert metrics["judge"]["accuracy"] > 0.9
    for name in ("base", "model"):
        for key in ("instruction_following", "ending_match", "eos_rate", "perplexity", "completion_loss"):
            assert metrics[name][key].keys() == {"value", "low", "high", "n"}
            assert metrics[name][key]["low"] <= metrics[name][key]["value"] <= metrics[name][key]["high"]
    assert metrics["model"]["completion_loss"]["high"] < metrics["base"]["completion_loss"]["low"]
    assert metrics["model"]["eos_rate"]["value"] > metrics["base"]["eos_rate"]["value"]


def test_table_and_judge_accuracy_are_shown(tiny):
    assert table(tiny.metrics) in tiny.evaluated
    shown = f"right on {tiny.metrics['judge']['accuracy']:.1%}"
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
        for key in ("ending_match", "instruction_following", "topic_words"):
            mean = np.mean([sample[name]["scores"][key] for sample in samples])
            assert tiny.metrics[name][key]["value"] == pytest.approx(mean)
    assert all(tokenizer.eos_token not in sample["model"]["text"] for sample in samples)
