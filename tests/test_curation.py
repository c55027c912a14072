import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.cli import UserError
from fledge.curation import balance, split_by_group, split_shares

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("85/5/10", (0.85, 0.05, 0.1)),
        ("98/1/1", (0.98, 0.01, 0.01)),
        ("99.5/0.25/0.25", (0.995, 0.0025, 0.0025)),
        (" 80 / 10 / 10 ", (0.8, 0.1, 0.1)),
        ("33.3333333/33.3333333/33.3333334", (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_split_shares(text, shares):
    read = split_shares(text)

    assert tuple(read) == SPLITS
    assert tuple(read.values()) == pytest.approx(shares)


@pytest.mark.parametrize(
    "text",
    ["", "85", "90/10", "85/5/5/5", "85/5/11", "0.85/0.05/0.1", "100/0/0", "110/-5/-5", "a/b/c", "85,5,10", "nan/5/95"],
)
def test_shares_that_do_not_add_up_are_refused(text):
    with pytest.raises(UserError, match="is not three positive percentages that add up to 100, such as 85/5/10"):
        split_shares(text)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=60),
    shares=st.sampled_from(["85/5/10", "34/33/33", "10/10/80", "98/1/1", "0.5/99/0.5"]),
    seed=st.integers(0, 5),
)
def test_groups_stay_whole_and_nothing_is_lost(sizes, shares, seed):
    rows = [({"group": f"topic {group}"}, (group, row)) for group, size in enumerate(sizes) for row in range(size)]
    random.Random(seed).shuffle(rows)
    wanted = split_shares(shares)

    splits = split_by_group(rows, wanted, random.Random(seed))
    assert tuple(splits) == SPLITS
    assert sorted(key for part in splits.values() for _, key in part) == sorted(key for _, key in rows)
    homes = Counter(group for part in splits.values() for group in {key[0] for _, key in part})
    assert set(homes.values()) == {1}
    for name, part in splits.items():
        assert abs(len(part) - wanted[name] * len(rows)) <= max(sizes)


def test_the_split_does_not_depend_on_the_order_of_the_records():
    rows = [({"group": f"topic {number % 30}"}, number) for number in range(90)]
    shares = split_shares("60/20/20")

    one = split_by_group(rows, shares, random.Random(4))
    other = split_by_group(rows[::-1], shares, random.Random(4))
    for name in SPLITS:
        assert {row[0]["group"] for row in one[name]} == {row[0]["group"] for row in other[name]}


@settings(deadline=None, max_examples=100)
@given(
    labels=st.lists(st.sampled_from(["happy", "sad", "open"]), max_size=40),
    wanted=st.sampled_from([("happy", "sad"), ("happy", "sad", "open")]),
    seed=st.integers(0, 5),
)
def test_balance_keeps_as_many_of_each_label_as_the_rarest_has(labels, wanted, seed):
    rows = [({"ending": label}, number) for number, label in enumerate(labels) if label in wanted]
    counts = Counter(row[0]["ending"] for row in rows)

    if len(counts) < len(wanted):
        with pytest.raises(UserError, match="has no example with ending"):
            balance(rows, "ending", wanted, random.Random(seed))
        return
    kept = balance(rows, "ending", wanted, random.Random(seed))
    assert Counter(row[0]["ending"] for row in kept) == dict.fromkeys(wanted, min(counts.values()))
    assert {number for _, number in kept} <= {number for _, number in rows}
    assert len({number for _, number in kept}) == len(kept)
    assert kept == balance(rows, "ending", wanted, random.Random(seed))
