"""Which examples go where: splits that share no group, and classes of one size."""

from collections import Counter

import numpy as np

from fledge.blocks import Facts
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


def split_by_group(groups: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """Deals whole groups to the splits until each has its share of the rows.

    `groups` (rows,) are hashes of the groups' names; the result (rows,) is the number of each row's split. It depends
    on which groups there are, not on their order.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    dealt = np.cumsum(sizes[order]) - sizes[order]
    bounds = np.cumsum([*shares.values()][:-1]) * len(groups)
    split_of_group = np.empty(len(sizes), np.int8)
    split_of_group[order] = np.searchsorted(bounds - 1e-9, dealt, side="right")
    return split_of_group[group_of]


def balance(rows: np.ndarray, codes: np.ndarray, column: str, labels: tuple[str, ...], seed: int) -> np.ndarray:
    """Keeps as many of `rows` with each label as the rarest one has. `codes` (rows,) are numbers of `labels`.

    Raises:
        UserError: a label does not occur.
    """
    counts = np.bincount(codes, minlength=len(labels))
    if not counts.min():
        missing = labels[counts.argmin()]
        raise UserError(f"A split has no example with {column} {missing}, so it cannot be balanced; give more data.")
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(rows[codes == code])[: counts.min()] for code in range(len(labels))]
    return np.sort(np.concatenate(kept))


def repeated(fingerprints: np.ndarray) -> np.ndarray:
    """(rows,), true for a row that has the fingerprint of an earlier one."""
    is_repeated = np.ones(len(fingerprints), bool)
    is_repeated[np.unique(fingerprints, return_index=True)[1]] = False
    return is_repeated


def assign_splits(
    facts: Facts,
    shares: dict[str, float],
    balanced: tuple[str, tuple[str, ...]] | None,
    seed: int,
    near_duplicates: np.ndarray | None = None,
) -> tuple[np.ndarray, Counter]:
    """Where every row goes: (rows,), the number of its split in `shares`, -1 for a row that is left out; and how many
    are left out by reason. `balanced` is a class column with its labels, `near_duplicates` (rows,) a mask.

    Raises:
        UserError: a split is empty or cannot be balanced.
    """
    columns = facts.columns
    is_repeated = repeated(columns["fingerprint"])
    left_out = Counter({"an exact duplicate": int(is_repeated.sum())})
    if near_duplicates is not None:
        left_out["a near duplicate"] = int((near_duplicates & ~is_repeated).sum())
        is_repeated |= near_duplicates
    kept = np.flatnonzero(~is_repeated)
    split_of = np.full(facts.total, -1, np.int8)
    split_of[kept] = split_by_group(columns["group"][kept], shares, seed)
    for number, name in enumerate(shares):
        rows = np.flatnonzero(split_of == number)
        if not len(rows):
            raise UserError(
                f"The {name} split is empty with {len(kept):,} usable records; give more data or another --split."
            )
        if balanced:
            column, labels = balanced
            chosen = balance(rows, columns[column][rows], column, labels, seed)
            left_out[f"surplus of one {column}"] += len(rows) - len(chosen)
            split_of[rows] = -1
            split_of[chosen] = number
    return split_of, +left_out
