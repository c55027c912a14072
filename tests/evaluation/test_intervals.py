import math

import numpy as np
import pytest

from fledge.evaluation.intervals import Ratio, by_class, compare, interval, means, paired_difference, preference


def mean_of(values) -> Ratio:
    values = np.asarray(values, dtype=float)
    return Ratio(values, np.ones(len(values)))


def test_interval_holds_the_mean_and_shrinks_with_more_prompts():
    rng = np.random.default_rng(1)
    for values in (rng.normal(3, 1, 50), rng.normal(3, 1, 5000)):
        found = interval(mean_of(values))
        normal = 1.96 * values.std() / np.sqrt(len(values))
        assert found["value"] == pytest.approx(values.mean())
        assert found["low"] == pytest.approx(values.mean() - normal, abs=0.1 * normal)
        assert found["high"] == pytest.approx(values.mean() + normal, abs=0.1 * normal)
        assert found["n"] == len(values)


def test_about_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = interval(mean_of(rng.random(60) < 0.3))
        held += found["low"] <= 0.3 <= found["high"]
    assert 0.88 <= held / 200 <= 0.99


def test_a_weighted_mean_is_a_ratio_of_sums():
    assert interval(Ratio(np.array([3.0, 3.0]), np.array([3.0, 1.0])))["value"] == pytest.approx(1.5)


def test_a_transform_applies_to_the_value_and_both_ends():
    plain, exp = (interval(Ratio(np.array([1.0, 2, 3]), np.ones(3), f)) for f in (np.positive, np.exp))
    assert [exp[key] for key in ("value", "low", "high")] == pytest.approx(
        [math.exp(plain[key]) for key in ("value", "low", "high")]
    )


def test_prompts_without_a_score_take_no_part():
    scores = [{"a": 1.0, "b": 0.5}, {"a": 0.0}, {"a": 1.0, "b": 1.0}]
    found = {name: interval(metric) for name, metric in means(scores, 1).items()}
    assert (found["a"]["value"], found["a"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (found["b"]["value"], found["b"]["n"]) == (pytest.approx(0.75), 2)


def test_several_answers_to_a_prompt_are_one_draw():
    scores = [{"a": value} for value in (0.0, 1.0, 1.0, 1.0)]
    assert interval(means(scores, 2)["a"]) == {"value": 0.75, "low": 0.5, "high": 1.0, "n": 2}


def test_nothing_scored_is_no_metric():
    assert interval(Ratio(np.zeros(3), np.zeros(3))) is None
    assert preference([[], []]) is None


def test_difference_is_paired():
    base, model = mean_of([0.0, 1.0, 0.0]), mean_of([0.5, 1.5, 0.5])
    assert paired_difference(base, model) == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "n": 3})


def test_difference_is_over_prompts_that_both_have():
    base = Ratio(np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    model = Ratio(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert paired_difference(base, model) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}


def test_compare_keeps_the_order_of_names_and_leaves_out_what_nobody_has():
    found = compare({"b": mean_of([1, 0]), "a": mean_of([1, 1])}, {"a": mean_of([0, 1])}, ["a", "missing", "b"])
    assert list(found["base"]) == ["a", "b"]
    assert list(found["model"]) == list(found["difference"]) == ["a"]


def test_classes_are_told_apart():
    rows = [{"ending": "sad"}, {"ending": "happy"}, {"ending": "sad"}]
    scores = {"base": [{"x": v} for v in (0, 0, 1, 1, 1, 1)], "model": [{"x": v} for v in (1, 1, 0, 0, 1, 1)]}
    found = by_class({"ending": ("happy", "sad", "open")}, rows, scores, 2)["ending"]
    assert list(found) == ["happy", "sad"]
    assert (found["happy"]["base"]["x"]["value"], found["happy"]["model"]["x"]["value"]) == (1.0, 0.0)
    assert (found["sad"]["prompts"], found["sad"]["base"]["x"]["value"]) == (2, 0.5)


def test_preference_is_over_prompts():
    assert preference([[1.0, 1.0, 1.0, 1.0], [], [0.0, 0.5]])["n"] == 2
    assert preference([[1.0], [0.0], [0.5]])["value"] == pytest.approx(0.5)
