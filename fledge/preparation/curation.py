"""Assigns rows to splits that share no group, and balances classes."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fledge.errors import UserError
from fledge.preparation.chunks import Facts
from fledge.preparation.reasons import DUPLICATE, HELD_OUT, NEAR_DUPLICATE, Reason, surplus
from fledge.reading.files import SPLITS


def split_shares(text: str) -> dict[str, float]:
    """`85/5/10` → the share of each split. `95/5/0` → train and validation only."""
    try:
        percents = [float(part) for part in text.split("/")]
    except ValueError:
        percents = []
    is_three = len(percents) == 3 and min(percents[:2]) > 0 and percents[2] >= 0
    if not is_three or not abs(sum(percents) - 100) <= 1e-6:
        raise UserError(
            f"--split {text} is not three percentages that add up to 100, of which the last may be 0, such as 85/5/10."
        )
    return {name: percent / 100 for name, percent in zip(SPLITS, percents, strict=True) if percent}


def split_by_group(groups: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """Assigns whole groups to the splits until each has its share of the rows, and at least one group.

    `groups` (rows,) are hashes of the groups' names. The result (rows,) is the number of each row's split; it depends
    on which groups there are, not on their order.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    dealt = np.cumsum(sizes[order]) - sizes[order]
    bounds = np.cumsum([*shares.values()][:-1]) * len(groups)
    split_in_order = np.searchsorted(bounds - 1e-9, dealt, side="right")
    for empty in np.setdiff1d(np.arange(len(shares)), split_in_order):  # few groups, or large ones
        counts = np.bincount(split_in_order)
        if counts.max() > 1:
            split_in_order[np.flatnonzero(split_in_order == counts.argmax())[-1]] = empty
    split_of_group = np.empty(len(sizes), np.int8)
    split_of_group[order] = split_in_order
    return split_of_group[group_of]


def balance(
    split: str, rows: np.ndarray, codes: np.ndarray, column: str, labels: dict[int, str], seed: int
) -> np.ndarray:
    """Keeps as many of `rows` with each label as the rarest label has.

    `codes` (rows,) are numbers of the column's labels, `labels` those that occur in the data.

    Raises:
        UserError: a label does not occur.
    """
    counts = {label: int((codes == code).sum()) for code, label in labels.items()}
    fewest = min(counts, key=lambda label: counts[label])
    if not counts[fewest]:
        found = ", ".join(f"{label} {count:,}" for label, count in counts.items())
        raise UserError(
            f"The {split} split has no example with {column} {fewest} (it has {found}), so it cannot "
            "be balanced; give more data, another --split, or leave --balance out."
        )
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(rows[codes == code])[: counts[fewest]] for code in labels]
    return np.sort(np.concatenate(kept))


def repeated(fingerprints: np.ndarray) -> np.ndarray:
    """(rows,), true for a row with the same fingerprint as an earlier one."""
    is_repeated = np.ones(len(fingerprints), bool)
    is_repeated[np.unique(fingerprints, return_index=True)[1]] = False
    return is_repeated


def apart(splits: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether the group of each row (rows,) lies in no later split.

    Groups are removed from the earlier splits, so that the held-out splits stay complete.

    Raises:
        UserError: a row has no split.
    """
    if unnamed := int((splits < 0).sum()):
        raise UserError(
            "--split source needs data whose files or Hub splits are named train, validation or test, and "
            f"{unnamed:,} rows come from others; give shares instead, such as --split 85/5/10."
        )
    is_apart = np.ones(len(splits), bool)
    for number in range(len(SPLITS) - 1):
        is_apart[splits == number] = ~np.isin(groups[splits == number], groups[splits > number])
    return is_apart


@dataclass
class Splits:
    """The split of each row.

    `of_row` (rows,) are the numbers of the splits in `names`, -1 for a row that is left out; `left_out` counts these by
    their reason. The `seed` also shuffles the rows.
    """

    names: tuple[str, ...]
    of_row: np.ndarray
    seed: int
    left_out: Counter[Reason] = field(default_factory=Counter)

    def rows(self, name: str) -> np.ndarray:
        """Which rows are in a split (rows,), a mask."""
        return self.of_row == self.names.index(name)


def assign_splits(
    facts: Facts,
    shares: dict[str, float] | None,
    balanced: tuple[str, tuple[str, ...]] | None,
    seed: int,
    near_duplicates: np.ndarray | None = None,
) -> Splits:
    """Assigns every row to a split, or leaves it out.

    `shares` is `None` for the source's own splits. `balanced` is a class column with its labels. `near_duplicates`
    (rows,) is a mask.

    Raises:
        UserError: a split is empty or cannot be balanced.
    """
    columns = facts.columns
    left_out: Counter[Reason] = Counter()
    rows = np.arange(facts.total)
    if shares is None:
        rows = rows[apart(columns["source_split"], columns["group"])]
        left_out[HELD_OUT] = facts.total - len(rows)
    kept = rows[~repeated(columns["fingerprint"][rows])]
    left_out[DUPLICATE] = len(rows) - len(kept)
    if near_duplicates is not None:
        left_out[NEAR_DUPLICATE] = int(near_duplicates[kept].sum())
        kept = kept[~near_duplicates[kept]]
    if shares is None:
        own, numbers = np.unique(columns["source_split"][kept], return_inverse=True)
        names = tuple(SPLITS[code] for code in own)
    else:
        numbers = split_by_group(columns["group"][kept], shares, seed)
        names = tuple(shares)
    groups = np.unique(columns["group"][kept])
    split_of = np.full(facts.total, -1, np.int8)
    split_of[kept] = numbers
    for name in ("train", *names):
        if name not in names or not (numbers == names.index(name)).any():
            raise UserError(
                f"The {name} split is empty: the {len(kept):,} usable records have {len(groups):,} groups (records "
                "with one topic, text or question), and no group is divided; give more data, another --split, or "
                "groups of your own (--source columns --columns …,group=COLUMN)."
            )
    if balanced:
        column, all_labels = balanced
        labels = {int(code): all_labels[code] for code in np.unique(columns[column][kept])}
        if len(labels) == 1:
            raise UserError(
                f"All {len(kept):,} usable records have the {column} {labels.popitem()[1]}, so --balance {column} has "
                "nothing to balance; give more data or leave it out."
            )
        for number, name in enumerate(names):
            rows = np.flatnonzero(split_of == number)
            chosen = balance(name, rows, columns[column][rows], column, labels, seed)
            left_out[surplus(column)] += len(rows) - len(chosen)
            split_of[np.setdiff1d(rows, chosen)] = -1
    return Splits(names, split_of, seed, +left_out)
