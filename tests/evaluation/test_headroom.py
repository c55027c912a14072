from itertools import combinations
from math import comb

import numpy as np
import pytest

from fledge.evaluation.headroom import headroom, pass_at

# 1 - C(n - c, k) / C(n, k), worked out by hand.
TRUTH = [
    (1, 1, 0, 0), (1, 1, 1, 1), (1, 4, 1, 1 / 4), (2, 4, 1, 1 / 2), (2, 4, 2, 5 / 6), (4, 4, 1, 1), (3, 5, 2, 9 / 10),
    (2, 10, 3, 8 / 15), (10, 10, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("tries", "samples", "right", "expected"), TRUTH)
def test_pass_at_k_is_the_unbiased_estimator(tries, samples, right, expected):
    assert pass_at(tries, samples, right) == pytest.approx(expected)


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for samples in range(1, 8):
        for right in range(samples + 1):
            answers = [number < right for number in range(samples)]
            for tries in range(1, samples + 1):
                hits = sum(any(draw) for draw in combinations(answers, tries))
                assert pass_at(tries, samples, right) == pytest.approx(hits / comb(samples, tries))


def test_headroom_by_hand():
    right = [int(mark) for mark in "111111000000000000100000111000"]
    found = headroom(right, 6, np.ones(5))
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6", "all_right", "all_wrong"]
    expected = [10 / 30, (1 + 1 / 3 + 4 / 5) / 5, (1 + 2 / 3 + 1) / 5, 3 / 5, 1 / 5, 2 / 5]
    assert [metric["value"] for metric in found.values()] == pytest.approx(expected)
    assert all(metric["n"] == 5 for metric in found.values())
