"""Headroom: what could be gained by choosing among several answers, or by rewarding the better ones."""

import math

import numpy as np

from fledge.evaluation.intervals import Ratio, interval


def pass_at(tries: int, samples: int, right: int) -> float:
    """The probability that at least one of `tries` answers is right, estimated without bias from `right` of `samples`.

    Chen et al. 2021 (arXiv:2107.03374), equation 1: 1 - C(samples - right, tries) / C(samples, tries).
    """
    return 1 - math.comb(samples - right, tries) / math.comb(samples, tries)


def headroom(following: list[float], num_samples: int, weights: np.ndarray) -> dict[str, dict[str, float] | None]:
    """pass@k for each power of two up to `num_samples` and for `num_samples`, and the shares all right and all wrong.

    `following` has 0 or 1 for each answer, `num_samples` per prompt in turn; `weights` (P,) are those of the prompts.
    """
    right = np.array(following).reshape(-1, num_samples).sum(1).astype(int)
    tries = sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})
    figures = {f"pass@{k}": np.array([pass_at(k, num_samples, count) for count in right]) for k in tries}
    figures |= {"all_right": right == num_samples, "all_wrong": right == 0}
    return {name: interval(Ratio(values * weights, weights)) for name, values in figures.items()}
