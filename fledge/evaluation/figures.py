"""The figures of `metrics.json`: every metric with its interval, for both models and for what they are held against."""

from fledge.evaluation.intervals import Ratio, interval, paired_difference

HEADLINE = "instruction_following"


def with_intervals(ratios: dict[str, Ratio], names: list[str]) -> dict[str, dict]:
    """Those of the metrics `names`, in their order, that some prompt has a part in."""
    found = {name: interval(ratios[name]) for name in names if name in ratios}
    return {name: metric for name, metric in found.items() if metric}


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

    `rows` and each metric have one element a prompt. Classes that do not occur are left out.
    """
    found = {}
    for column, labels in classes.items():
        found[column] = {}
        for label in labels:
            kept = [number for number, row in enumerate(rows) if row[column] == label]
            if kept:
                parts = {who: {name: ratio.of(kept) for name, ratio in of.items()} for who, of in models.items()}
                # Chance has no headline where all prompts ask for the same.
                heads = {
                    who: {name: of[name].of(kept) for name in (HEADLINE,) if name in of}
                    for who, of in (beside | baselines).items()
                }
                shown = {who: with_intervals(of, list(of)) for who, of in (parts | heads).items()}
                found[column][label] = {
                    "prompts": len(kept),
                    **{who: shown[who] for who in (*models, *beside)},
                    "baselines": {name: shown[name] for name in baselines},
                }
    return found
