"""How sure one can be of a metric: bootstrap over prompts, the same draws for both models, so that pairs stay pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000


@dataclass
class Ratio:
    """A metric as a ratio of sums over prompts: `numerator` (P,) over `denominator` (P,), both float64.

    A mean has the number of scored answers as its denominator, a weighted mean the weights. A prompt whose denominator
    is 0 has no part in the metric.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    transform: Callable = np.positive

    def of(self, prompts: np.ndarray) -> "Ratio":
        return Ratio(self.numerator[prompts], self.denominator[prompts], self.transform)

    def value(self, counts: np.ndarray) -> np.ndarray:
        """The metric when prompt i is drawn `counts[..., i]` times."""
        return self.transform(counts @ self.numerator / (counts @ self.denominator))


@lru_cache(maxsize=4)
def _draws(prompts: int) -> np.ndarray:
    """How often each prompt is drawn in each resample (RESAMPLES, P); the same for every metric."""
    return np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES).astype(float)


def interval(metric: Ratio) -> dict[str, float] | None:
    """The metric with its 95% confidence interval by the percentile bootstrap over prompts; None without a prompt."""
    return _with_quantiles(metric.denominator > 0, lambda counts, kept: metric.of(kept).value(counts))


def paired_difference(base: Ratio, model: Ratio) -> dict[str, float] | None:
    """Model minus base on the prompts that both have, which is surer than the two intervals apart."""
    return _with_quantiles(
        (base.denominator > 0) & (model.denominator > 0),
        lambda counts, kept: model.of(kept).value(counts) - base.of(kept).value(counts),
    )


def _with_quantiles(taking_part: np.ndarray, value: Callable) -> dict[str, float] | None:
    kept = np.flatnonzero(taking_part)
    if not len(kept):
        return None
    low, high = np.quantile(value(_draws(len(kept)), kept), [0.025, 0.975])
    return {"value": float(value(np.ones(len(kept)), kept)), "low": float(low), "high": float(high), "n": len(kept)}


def means(scores: list[dict[str, float]], num_samples: int) -> dict[str, Ratio]:
    """Scores of answers, `num_samples` of each prompt in turn → each metric; absent scores take no part."""
    names = dict.fromkeys(name for score in scores for name in score)
    table = {name: np.array([score.get(name, np.nan) for score in scores]).reshape(-1, num_samples) for name in names}
    return {
        name: Ratio(np.nansum(values, 1), (~np.isnan(values)).sum(1).astype(float)) for name, values in table.items()
    }


def preference(points: list[list[float]]) -> dict[str, float] | None:
    """How often the model's answer is preferred: the mean over prompts of the points, 0 to 1, that each was given."""
    return interval(Ratio(*(np.array([float(f(of_pair)) for of_pair in points]) for f in (sum, len))))


def compare(base: dict[str, Ratio], model: dict[str, Ratio], names: list[str]) -> dict[str, dict[str, dict]]:
    """Every metric of `names` for both models and as a paired difference, each with its interval."""
    found = {"base": {}, "model": {}, "difference": {}}
    for name in names:
        for who, of_model in (("base", base), ("model", model)):
            if name in of_model and (metric := interval(of_model[name])):
                found[who][name] = metric
        if name in found["base"] and name in found["model"] and (delta := paired_difference(base[name], model[name])):
            found["difference"][name] = delta
    return found


def by_class(
    columns: dict[str, tuple[str, ...]], rows: list[dict], scores: dict[str, list[dict[str, float]]], num_samples: int
) -> dict[str, dict[str, dict]]:
    """column → class → {"prompts": how many, "base": metrics, "model": metrics}; only classes that occur.

    `rows` has one row a prompt, `scores[who]` one an answer.
    """
    found = {}
    for column, labels in columns.items():
        found[column] = {}
        for label in labels:
            kept = [i for i, row in enumerate(rows) if row[column] == label]
            if kept:
                found[column][label] = {"prompts": len(kept)}
                for who, of_model in scores.items():
                    of_label = [of_model[i * num_samples + j] for i in kept for j in range(num_samples)]
                    found[column][label][who] = {
                        name: metric
                        for name, ratio in means(of_label, num_samples).items()
                        if (metric := interval(ratio))
                    }
    return found
