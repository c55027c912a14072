"""Near duplicates by MinHash of word shingles.

Bands of hashes find candidates (Leskovec, Rajaraman, Ullman, chapter 3), and the share of equal hashes confirms them.
rensa hashes in Rust; the rest is a few numpy operations per band, so that it scales to millions of rows.

Rows of one group are never duplicates of each other: they are several tasks about one text and stay in one split.
"""

from pathlib import Path

import numpy as np

from fledge.text.words import as_written

HASHES = 128  # the standard deviation of an estimated similarity of 0.8 is 0.035
SHINGLE = 5  # words
RECALL = 0.99


def signatures(texts: list[str]) -> np.ndarray:
    """The MinHash of each text's shingles: (texts, HASHES), uint32."""
    from rensa import RMinHash

    shingles = []
    for text in texts:
        words = as_written(text)
        shingles.append([" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))])
    rows = RMinHash.digest_matrix_from_token_sets(shingles, num_perm=HASHES, seed=1).to_rows()
    return np.array(rows, np.uint32).reshape(len(texts), HASHES)


def hashes_a_band(similarity: float) -> int:
    """The largest band, which gives the fewest candidates, that finds a pair of this similarity with `RECALL`."""
    fitting = [n for n in range(1, HASHES + 1) if 1 - (1 - similarity**n) ** (HASHES // n) >= RECALL]
    return max(fitting)


def save_signatures(file: Path, texts: list[str]) -> None:
    """Saves the signatures as (HASHES, texts), so that a band of all texts is contiguous."""
    np.save(file, np.ascontiguousarray(signatures(texts).T))


def near_duplicates(files: list[Path], groups: np.ndarray, similarity: float) -> np.ndarray:
    """(rows,), true for a row that is at least this similar to an earlier row of another group that is kept.

    `files` were written by `save_signatures`, in the order of the rows. `similarity` is MinHash's estimate of the
    Jaccard similarity of two texts' sets of shingles.
    """
    width = hashes_a_band(similarity)
    candidates = [
        _colliding(np.concatenate([np.load(file, mmap_mode="r")[begin : begin + width] for file in files], axis=1))
        for begin in range(0, HASHES - width + 1, width)
    ]
    pairs = np.unique(np.concatenate(candidates), axis=0)
    pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
    pairs = pairs[_similarities(files, pairs) >= similarity]
    is_duplicate = np.zeros(len(groups), bool)
    for earlier, later in pairs[np.argsort(pairs[:, 1], kind="stable")]:
        is_duplicate[later] |= not is_duplicate[earlier]
    return is_duplicate


def _colliding(band: np.ndarray) -> np.ndarray:
    """Pairs (earlier, later) of equal columns of `band` (width, rows): each with the previous and the first one."""
    factors = np.random.default_rng(0).integers(0, 2**63, len(band), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = sum(hashes.astype(np.uint64) * factor for hashes, factor in zip(band, factors, strict=True))
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    begins = np.flatnonzero(np.concatenate([[True], keys[order[1:]] != keys[order[:-1]]]))
    firsts = begins[np.searchsorted(begins, same, side="right") - 1]
    later = order[same]
    return np.concatenate([np.stack([order[same - 1], later], 1), np.stack([order[firsts], later], 1)])


def _similarities(files: list[Path], pairs: np.ndarray) -> np.ndarray:
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    found, begin = [], 0
    for file in files:
        minhash = np.load(file, mmap_mode="r")
        end = begin + minhash.shape[1]
        found.append(minhash[:, rows[np.searchsorted(rows, begin) : np.searchsorted(rows, end)] - begin])
        begin = end
    minhash = np.concatenate(found, axis=1)
    equal = np.zeros(len(pairs), np.int16)
    for hashes in minhash:
        equal += hashes[places[:, 0]] == hashes[places[:, 1]]
    return equal / HASHES
