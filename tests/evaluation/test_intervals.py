import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fledge.evaluation.intervals import Ratio, interval, means, paired_difference, preference, wilson

SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=12)


def mean_of(values, is_share: bool = True) -> Ratio:
    values = np.asarray(values, dtype=float)
    return Ratio(values, np.ones(len(values)), is_share=is_share)


def test_interval_holds_the_mean_and_shrinks_with_more_prompts():
    rng = np.random.default_rng(1)
    for values in (rng.normal(3, 1, 50), rng.normal(3, 1, 5000)):
        found = interval(mean_of(values, is_share=False))
        normal = 1.96 * values.std() / np.sqrt(len(values))
        assert found["value"] == pytest.approx(values.mean())
        assert found["low"] == pytest.approx(values.mean() - normal, abs=0.1 * normal)
        assert found["high"] == pytest.approx(values.mean() + normal, abs=0.1 * normal)
        assert found["n"] == len(values)


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.01885), (200, 0.98115, 1.0), (100, 0.43136, 0.56864)])
def test_a_share_of_prompts_has_wilsons_interval(right, low, high):
    """The limits are those of R's binom::binom.wilson."""
    found = interval(mean_of([1.0] * right + [0.0] * (200 - right)))
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98, 0.99])
def test_wilson_holds_the_truth_about_95_times_in_100_at_the_edge_too(truth):
    """Exactly, over all outcomes of 200 trials. The percentile bootstrap holds 0.99 only 87 times in 100."""
    covered = [low <= truth <= high for low, high in (wilson(right, 200) for right in range(201))]
    assert 0.93 <= binom.pmf(np.arange(201), 200, truth) @ covered <= 0.97


def test_bca_holds_a_skewed_mean_about_95_times_in_100():
    rng = np.random.default_rng(2)
    found = [interval(mean_of(rng.exponential(1, 60), is_share=False)) for _ in range(200)]
    assert 0.90 <= sum(of["low"] <= 1 <= of["high"] for of in found) / 200 <= 0.98
    above, below = (np.mean([abs(of[end] - of["value"]) for of in found]) for end in ("high", "low"))
    assert above > 1.1 * below  # the percentile interval would be even


@given(SHARES, st.data())
def test_intervals_of_shares_are_finite_and_hold_their_value(values, data):
    other = data.draw(st.lists(st.floats(0, 1), min_size=len(values), max_size=len(values)))
    for found in (interval(mean_of(values)), paired_difference(mean_of(values), mean_of(other))):
        assert -1 - 1e-9 <= found["low"] - 1e-9 <= found["value"] <= found["high"] + 1e-9 <= 1 + 2e-9


def test_prompts_that_are_all_alike_still_leave_doubt():
    always, half = interval(mean_of([1.0] * 20)), interval(mean_of([0.5] * 20))
    assert (always["low"], always["high"]) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert half["low"] < 0.4 < 0.6 < half["high"]
    assert interval(mean_of([2.0, 2.0], is_share=False)) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 2}


def test_a_prompt_that_outweighs_all_others_leaves_much_doubt():
    alike, one_heavy = (Ratio(weights, weights) for weights in (np.ones(20), np.array([1000.0] + [1.0] * 19)))
    assert interval(alike)["low"] > 0.8
    assert interval(one_heavy)["low"] < 0.25


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
    twice = [score for score in scores[::2] for _ in range(2)]  # a second sample that says the same tells nothing new
    assert interval(means(twice, 2)["a"]) == interval(means(scores[::2], 1)["a"])


def test_nothing_scored_is_no_metric():
    assert interval(Ratio(np.zeros(3), np.zeros(3))) is None
    assert preference([[], []]) is None


def test_difference_is_paired():
    base = np.random.default_rng(3).normal(0, 10, 50)
    model = base + np.tile([0.4, 0.6], 25)
    found = paired_difference(mean_of(base, is_share=False), mean_of(model, is_share=False))
    assert found["value"] == pytest.approx(0.5)
    assert 0.45 < found["low"] < 0.5 < found["high"] < 0.55


def test_two_models_that_both_always_succeed_may_still_differ():
    found = paired_difference(mean_of([1.0] * 200), mean_of([1.0] * 200))
    assert (found["value"], found["low"], found["high"]) == (0, pytest.approx(-0.0188, abs=1e-4), -found["low"])


def test_difference_is_over_prompts_that_both_have():
    base = Ratio(np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    model = Ratio(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    found = paired_difference(base, model)
    assert (found["value"], found["n"]) == (1.0, 1)
    assert found["low"] < 0.2


def test_weights_of_prompts_weigh_their_answers():
    scores = [{"a": 1.0}, {"a": 0.0}, {"b": 1.0}]
    assert interval(means(scores, 1, np.array([3.0, 1.0, 5.0]))["a"])["value"] == 0.75


def test_preference_is_over_prompts():
    assert preference([[1.0, 1.0, 1.0, 1.0], [], [0.0, 0.5]])["n"] == 2
    assert preference([[1.0], [0.0], [0.5]])["value"] == pytest.approx(0.5)
