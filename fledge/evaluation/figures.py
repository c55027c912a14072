"""The figures of `metrics.json`: every metric with its interval, for both models, chance, reference and baselines."""

import numpy as np

from fledge.evaluation.intervals import Ratio, interval, paired_difference
from fledge.tasks import FOLLOWING

HEADLINE = FOLLOWING


def with_intervals(ratios: dict[str, Ratio], names: list[str]) -> dict[str, dict]:
    """The metrics `names`, in this order, without those that no prompt calls for."""
    found = {name: interval(ratios[name]) for name in names if name in ratios}
    return {name: metric for name, metric in found.items() if metric}


def with_parts(levels: dict[str, tuple[str, Ratio]], names: list[str]) -> dict[str, dict]:
    """Chance levels with their intervals; `without` names the part of the instruction that was replaced."""
    found = with_intervals({name: ratio for name, (_, ratio) in levels.items()}, names)
    return {name: metric | {"without": levels[name][0]} for name, metric in found.items()}


def differences(base: dict[str, Ratio], model: dict[str, Ratio], names: list[str]) -> dict[str, dict]:
    """Model minus base on the prompts that both have, for each metric of `names` that both have."""
    found = {name: paired_difference(base[name], model[name]) for name in names if name in base and name in model}
    return {name: metric for name, metric in found.items() if metric}


def by_class(
    classes: dict[str, tuple[str, ...]],
    rows: list[dict],
    models: dict[str, dict[str, Ratio]],
    beside: dict[str, dict[str, Ratio]],
    baselines: dict[str, dict[str, Ratio]],
) -> dict[str, dict[str, dict]]:
    """column → class → `prompts`, every metric of `models`, and the headline of `beside` and of the `baselines`.

    `rows` and each metric have one element per prompt. Classes that do not occur are left out.
    """
    found: dict[str, dict[str, dict]] = {}
    for column, labels in classes.items():
        of_labels = {label: np.flatnonzero([row[column] == label for row in rows]) for label in labels}
        found[column] = {
            label: {
                "prompts": len(prompts),
                **{who: _of(prompts, metrics) for who, metrics in models.items()},
                **{who: _of(prompts, _headline(metrics)) for who, metrics in beside.items()},
                "baselines": {name: _of(prompts, _headline(metrics)) for name, metrics in baselines.items()},
            }
            for label, prompts in of_labels.items()
            if len(prompts)
        }
    return found


def _of(prompts: np.ndarray, ratios: dict[str, Ratio]) -> dict[str, dict]:
    return with_intervals({name: ratio.of(prompts) for name, ratio in ratios.items()}, list(ratios))


def _headline(ratios: dict[str, Ratio]) -> dict[str, Ratio]:
    """The headline metric alone; empty for chance if all prompts ask for the same."""
    return {name: ratio for name, ratio in ratios.items() if name == HEADLINE}
