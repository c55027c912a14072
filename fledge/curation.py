"""Which examples go where: splits that share no group, and classes of one size."""

import random

from fledge.cli import UserError


def split_shares(text: str) -> dict[str, float]:
    """`85/5/10` → the share of each split."""
    try:
        percents = [float(part) for part in text.split("/")]
    except ValueError:
        percents = []
    if len(percents) != 3 or not min(percents) > 0 or not abs(sum(percents) - 100) <= 1e-6:
        raise UserError(f"--split {text} is not three positive percentages that add up to 100, such as 85/5/10.")
    return dict(zip(("train", "validation", "test"), (percent / 100 for percent in percents), strict=True))


def split_by_group(rows: list, shares: dict[str, float], rng: random.Random) -> dict[str, list]:
    """Deals whole groups to the splits until each has its share of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row[0]["group"], []).append(row)
    order = sorted(groups)
    rng.shuffle(order)
    splits, dealt, bound, names = {name: [] for name in shares}, 0, 0.0, iter(shares)
    for group in order:
        while dealt >= bound - 1e-9:
            name = next(names)
            bound += shares[name] * len(rows)
        splits[name] += groups[group]
        dealt += len(groups[group])
    for part in splits.values():
        rng.shuffle(part)
    return splits


def balance(rows: list, label: str, labels: tuple[str, ...], rng: random.Random) -> list:
    """Keeps as many rows of each label as the rarest one has.

    Raises:
        UserError: a label does not occur.
    """
    by_label = {name: [row for row in rows if row[0][label] == name] for name in labels}
    rarest = min(labels, key=lambda name: len(by_label[name]))
    if not by_label[rarest]:
        raise UserError(f"A split has no example with {label} {rarest}, so it cannot be balanced; give more data.")
    balanced = [row for rows_of in by_label.values() for row in rng.sample(rows_of, len(by_label[rarest]))]
    rng.shuffle(balanced)
    return balanced
