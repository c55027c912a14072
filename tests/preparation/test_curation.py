from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.preparation.chunks import Facts, Found
from fledge.preparation.curation import apart, assign_splits, balance, repeated, split_by_group, split_shares

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("85/5/10", (0.85, 0.05, 0.1)),
        ("95/5/0", (0.95, 0.05)),
        ("98/1/1", (0.98, 0.01, 0.01)),
        ("99.5/0.25/0.25", (0.995, 0.0025, 0.0025)),
        (" 80 / 10 / 10 ", (0.8, 0.1, 0.1)),
        ("33.3333333/33.3333333/33.3333334", (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_split_shares(text, shares):
    read = split_shares(text)

    assert tuple(read) == SPLITS[: len(shares)]
    assert tuple(read.values()) == pytest.approx(shares)


@pytest.mark.parametrize(
    "text",
    ["", "85", "90/10", "85/5/5/5", "85/5/11", "0.85/0.05/0.1", "100/0/0", "110/-5/-5", "a/b/c", "85,5,10", "nan/5/95"],
)
def test_shares_that_do_not_add_up_are_refused(text):
    with pytest.raises(
        UserError, match="is not three percentages that add up to 100, of which the last may be 0, such as 85/5/10"
    ):
        split_shares(text)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=60),
    shares=st.sampled_from(["85/5/10", "34/33/33", "10/10/80", "98/1/1", "0.5/99/0.5"]),
    seed=st.integers(0, 5),
)
def test_groups_stay_whole_and_splits_are_near_their_shares(sizes, shares, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes))
    wanted = split_shares(shares)

    splits = split_by_group(groups, wanted, seed)
    assert len(splits) == len(groups)
    assert set(splits) <= {0, 1, 2}
    assert all(len(set(splits[groups == group])) == 1 for group in range(len(sizes)))
    if len(sizes) >= 3:
        assert set(splits) == {0, 1, 2}
    # A split may give a group to each of two that would be empty, which only those of less than a group can be.
    given = 2 if min(wanted.values()) * len(groups) <= max(sizes) else 0
    for number, name in enumerate(SPLITS):
        assert abs((splits == number).sum() - wanted[name] * len(groups)) <= max(sizes) * (1 + given)


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    groups = np.arange(90) % 30
    shares = split_shares("60/20/20")

    one, other = split_by_group(groups, shares, 4), split_by_group(groups[::-1], shares, 4)
    assert one.tolist() == other[::-1].tolist()
    assert one.tolist() != split_by_group(groups, shares, 5).tolist()


@settings(deadline=None, max_examples=100)
@given(
    codes=st.lists(st.integers(0, 2), max_size=40),
    labels=st.sampled_from([{0: "a", 1: "b"}, {0: "a", 1: "b", 2: "c"}, {0: "a", 2: "c"}]),
    seed=st.integers(0, 5),
)
def test_balance_keeps_as_many_of_each_label_as_the_rarest_has(codes, labels, seed):
    codes = np.array([code for code in codes if code in labels], dtype=int)
    rows = np.arange(len(codes)) * 3
    counts = Counter(codes.tolist())

    if len(counts) < len(labels):
        with pytest.raises(UserError, match=r"has no example with ending [abc]"):
            balance("train", rows, codes, "ending", labels, seed)
        return
    kept = balance("train", rows, codes, "ending", labels, seed)
    assert Counter(codes[kept // 3].tolist()) == dict.fromkeys(labels, min(counts.values()))
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(rows)
    assert kept.tolist() == balance("train", rows, codes, "ending", labels, seed).tolist()


@pytest.mark.parametrize(("codes", "kept"), [([2, 0, 2, 2, 0, 2], 4), ([2, 2, 2, 2, 2, 2], None)])
def test_only_labels_that_occur_are_balanced(codes, kept):
    rows = np.arange(6)
    columns = {"group": rows, "fingerprint": rows, "source_split": np.zeros(6, int), "kind": np.array(codes)}
    facts = Facts(Path(), ["a"], np.array([6]), columns, Found())
    if kept is None:
        with pytest.raises(UserError, match="All 6 usable records have the kind c, so --balance kind has nothing"):
            assign_splits(facts, None, ("kind", ("a", "b", "c")), 0)
        return
    splits = assign_splits(facts, None, ("kind", ("a", "b", "c")), 0)

    assert Counter(columns["kind"][splits.rows("train")].tolist()) == {0: kept // 2, 2: kept // 2}
    assert splits.left_out.total() == 6 - kept


@given(st.lists(st.integers(0, 5), max_size=30))
def test_repeated_rows_are_those_whose_fingerprint_came_before(fingerprints):
    expected = [value in fingerprints[:place] for place, value in enumerate(fingerprints)]

    assert repeated(np.array(fingerprints, dtype=np.uint64)).tolist() == expected


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=30))
def test_held_out_rows_stay_whole_and_their_groups_leave_other_splits(rows):
    splits, groups = np.array(rows, dtype=int).reshape(-1, 2).T
    is_apart = apart(splits, groups)

    for row, (split, group) in enumerate(rows):
        assert is_apart[row] == (not any(other > split and same == group for other, same in rows))
    homes = Counter(group for group, _ in {(rows[row][1], rows[row][0]) for row in np.flatnonzero(is_apart)})
    assert set(homes.values()) <= {1}


def test_rows_without_a_split_of_their_own_are_refused_with_their_number():
    with pytest.raises(UserError, match=r"--split source needs .* and 2 rows come from others; give shares instead"):
        apart(np.array([0, -1, 2, -1]), np.arange(4))
