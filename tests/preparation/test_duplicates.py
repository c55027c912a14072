import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.preparation.duplicates import HASHES, SHINGLE, hashes_a_band, near_duplicates, save_signatures, signatures

WORDS = [f"word{number}" for number in range(400)]


def text_of(seed: int, words: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def changed(words: list[str], share: float) -> str:
    """The text with another end: that share of it is new."""
    kept = round(len(words) * (1 - share))
    return " ".join(words[:kept] + [f"new{number}" for number in range(len(words) - kept)])


def found(tmp_path, chunks: list[list[str]], groups: list[int], similarity: float = 0.8) -> list[bool]:
    files = []
    for number, texts in enumerate(chunks):
        files.append(tmp_path / f"{number}.npy")
        save_signatures(files[-1], texts)
    return near_duplicates(files, np.array(groups, np.uint64), similarity).tolist()


def test_the_share_of_equal_hashes_is_the_similarity():
    one = text_of(0)
    for share in (0.05, 0.1, 0.3, 0.6):
        other = changed(one, share)
        a, b = signatures([" ".join(one), other])
        assert abs((a == b).mean() - jaccard(" ".join(one), other)) < 4 * 0.5 / HASHES**0.5


def test_signatures_do_not_depend_on_the_batch_or_on_case_and_signs():
    texts = [" ".join(text_of(seed)) for seed in range(3)]

    assert (signatures(texts)[1] == signatures(texts[1:2])[0]).all()
    assert (signatures(["One day, a FOX ran away."]) == signatures(["one day a fox ran away"])).all()
    assert signatures([]).shape == (0, HASHES)


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_bands_find_a_pair_at_the_limit(similarity):
    width = hashes_a_band(similarity)

    assert 1 - (1 - similarity**width) ** (HASHES // width) >= 0.99
    assert width == HASHES or 1 - (1 - similarity ** (width + 1)) ** (HASHES // (width + 1)) < 0.99


@pytest.mark.parametrize("similarity", [0.8, 0.85])  # 128 hashes leave a rest, or none
def test_each_band_finds_a_pair_by_itself(tmp_path, similarity):
    """The pair has one other hash in every other band."""
    width = hashes_a_band(similarity)
    begins = range(0, HASHES - width + 1, width)
    assert 1 - len(begins) / HASHES > similarity
    for own in begins:
        minhash = np.random.default_rng(own).integers(0, 2**32, (HASHES, 1), dtype=np.uint32).repeat(2, axis=1)
        minhash[[begin for begin in begins if begin != own], 1] += 1
        np.save(tmp_path / "pair.npy", minhash)
        assert near_duplicates([tmp_path / "pair.npy"], np.arange(2), similarity).tolist() == [False, True]


def test_the_later_of_two_near_duplicates_goes_across_chunks_and_splits(tmp_path):
    texts = [" ".join(text_of(seed)) for seed in range(6)]
    copies = [changed(text_of(seed), 0.05) for seed in (1, 4)]

    assert found(tmp_path, [texts[:3], [*texts[3:], *copies]], list(range(8))) == [False] * 6 + [True] * 2


def test_what_differs_in_a_third_stays(tmp_path):
    assert not any(found(tmp_path, [[" ".join(text_of(1)), changed(text_of(1), 0.3)]], [0, 1]))


def test_rows_of_one_group_are_no_duplicates_of_each_other(tmp_path):
    text = " ".join(text_of(1))

    assert found(tmp_path, [[text, text, text]], [7, 7, 8]) == [False, False, True]


def test_a_chain_loses_only_what_is_near_a_row_that_stays(tmp_path):
    """The second goes for the first; the third is near the second alone, so it stays."""
    words = text_of(3, 200)
    chain = [" ".join(words[start : start + 150]) for start in (0, 12, 24)]

    assert jaccard(chain[0], chain[1]) > 0.83 > 0.75 > jaccard(chain[0], chain[2])
    assert found(tmp_path, [chain], [0, 1, 2], similarity=0.79) == [False, True, False]


@settings(deadline=None, max_examples=15)
@given(
    seeds=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    cut=st.integers(0, 12),
)
def test_copies_are_found_however_chunks_are_cut(tmp_path_factory, seeds, cut):
    texts = [" ".join(text_of(seed)) for seed in seeds]
    chunks = [texts[:cut], texts[cut:]]

    assert found(tmp_path_factory.mktemp("d"), chunks, list(range(len(seeds)))) == [
        seed in seeds[:place] for place, seed in enumerate(seeds)
    ]


def test_short_and_empty_texts_are_compared_too(tmp_path):
    assert found(tmp_path, [["Yes.", "No.", "yes", "", "What is 2 + 3? 5", "What is 2 + 4? 6"]], list(range(6))) == [
        False, False, True, False, False, False,
    ]  # fmt: skip
