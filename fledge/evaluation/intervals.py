"""The 95% confidence interval of a metric over prompts.

A share of prompts gets Wilson's interval, which also works at 0 and 100%. Everything else gets the BCa bootstrap over
prompts (Efron 1987). Several answers to one prompt are one unit. Two models are compared prompt by prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

RESAMPLES = 2000
NUMBERS_AT_ONCE = 1_000_000  # of a bootstrap: 8 MB
NO_SHARES = ("completion_loss", "perplexity", "bits_per_byte", "answer_tokens", "judge_score")


@dataclass
class Ratio:
    """A metric as a ratio of sums over prompts: `numerator` (P,) over `denominator` (P,), both float64.

    A mean has the number of scored answers as its denominator, a weighted mean the weights. A prompt whose denominator
    is 0 does not count in the metric. `is_share` says that the metric lies between 0 and 1 for every prompt.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    transform: Callable = np.positive
    is_share: bool = True

    def of(self, prompts: np.ndarray) -> "Ratio":
        """The metric of some prompts only."""
        return Ratio(self.numerator[prompts], self.denominator[prompts], self.transform, self.is_share)

    def value(self, prompts: np.ndarray | slice = slice(None), axis: int = -1) -> np.ndarray:
        """The metric over `prompts` along `axis`; the other axes may hold many resamples."""
        return self.transform(self.numerator[prompts].sum(axis) / self.denominator[prompts].sum(axis))

    @property
    def of_each(self) -> np.ndarray:
        """(P,) the metric of each prompt by itself."""
        return self.transform(self.numerator / self.denominator)

    @property
    def trials(self) -> int:
        """Kish's effective sample size: the number of equally weighted prompts with the same information."""
        return int(self.denominator.sum() ** 2 / (self.denominator**2).sum() + 1e-9)


def interval(metric: Ratio) -> dict[str, float] | None:
    """The metric with its 95% confidence interval and its number of prompts; `None` if it has none."""
    prompts = np.flatnonzero(metric.denominator > 0)
    if not len(prompts):
        return None
    transform, metric = metric.transform, replace(metric.of(prompts), transform=np.positive)
    value = float(metric.value())
    is_constant = np.ptp(metric.of_each) < 1e-12
    if metric.is_share and (is_constant or _is_proportion(metric)):
        low, high = wilson(value * metric.trials, metric.trials)
    elif is_constant:  # no variance to estimate an interval from
        low = high = value
    else:
        low, high = bca(metric.value, len(prompts))
    ends = {"value": value, "low": low, "high": high}
    return {name: float(transform(end)) for name, end in ends.items()} | {"n": len(prompts)}


def paired_difference(base: Ratio, model: Ratio) -> dict[str, float] | None:
    """Model minus base on the prompts that both have; pairing makes it narrower than the two intervals suggest.

    If the difference is the same on every prompt, a bootstrap interval is a point. Shares then get the difference of
    their two Wilson intervals (Newcombe 1998, method 10 without the pairing, which is wider).
    """
    both = np.flatnonzero((base.denominator > 0) & (model.denominator > 0))
    if not len(both):
        return None
    base, model = base.of(both), model.of(both)
    value = float(model.value() - base.value())
    low = high = value
    if np.ptp(model.of_each - base.of_each) >= 1e-12:
        low, high = bca(lambda prompts, axis: model.value(prompts, axis) - base.value(prompts, axis), len(both))
    elif base.is_share:
        of_base, of_model = interval(base), interval(model)
        assert of_base is not None  # some prompt counts in both
        assert of_model is not None
        low -= math.hypot(of_model["value"] - of_model["low"], of_base["high"] - of_base["value"])
        high += math.hypot(of_model["high"] - of_model["value"], of_base["value"] - of_base["low"])
    return {"value": value, "low": low, "high": high, "n": len(both)}


def _is_proportion(metric: Ratio) -> bool:
    """Whether every prompt counts the same and is either met or missed."""
    return np.ptp(metric.denominator) == 0 and set(metric.of_each.tolist()) <= {0.0, 1.0}


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's score interval (1927); for a fractional number of successes, the union of its neighbours' intervals."""
    from scipy.stats import binomtest

    fewest, most = math.floor(successes + 1e-9), math.ceil(successes - 1e-9)
    low = binomtest(fewest, trials).proportion_ci(method="wilson").low
    high = binomtest(most, trials).proportion_ci(method="wilson").high
    return float(low), float(high)


def bca(statistic: Callable, count: int) -> tuple[float, float]:
    """The BCa bootstrap interval of `statistic(prompts, axis)` over `count` prompts, always with the same resamples."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.arange(count),),
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // count),
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def means(scores: list[dict[str, float]], num_samples: int, weights: np.ndarray | None = None) -> dict[str, Ratio]:
    """Scores of answers, `num_samples` per prompt in turn → each metric; absent scores do not count.

    `weights` (P,) says how much each prompt counts; without it all count the same.
    """
    names = dict.fromkeys(name for score in scores for name in score)
    found = {}
    for name in names:
        values = np.array([score.get(name, np.nan) for score in scores]).reshape(-1, num_samples)
        scale = np.ones(len(values)) if weights is None else weights
        scored = (~np.isnan(values)).sum(1)
        found[name] = Ratio(np.nansum(values, 1) * scale, scored * scale, is_share=name not in NO_SHARES)
    return found


def preference(points: list[list[float]]) -> dict[str, float] | None:
    """How often the model's answer is preferred: the mean over prompts of the points, 0 to 1, that each was given."""
    totals = np.array([float(sum(of_prompt)) for of_prompt in points])
    counts = np.array([float(len(of_prompt)) for of_prompt in points])
    return interval(Ratio(totals, counts))
