"""A trigram model of the training stories: how surprising is each word after the two before it?

It uses interpolated absolute discounting (Ney, Essen and Kneser 1994) over one, two and three words. Counts are in
sorted arrays, so that a million words are counted in about a second and a text needs a few binary searches.
"""

import numpy as np

DISCOUNT = 0.75
WIDTH = 20  # bits for a word's number; three of them make a key of 60 bits
MAX_WORDS = 2**WIDTH - 2


class WordModel:
    """P(word | two words before), learned from lists of words.

    Words that occur once are one word, "unknown" (number 0), so that a new word has a probability.
    """

    def __init__(self, texts: list[list[str]]):
        words, counts = np.unique(np.array([word for text in texts for word in text] or [""]), return_counts=True)
        known = words[counts > 1][:MAX_WORDS]
        self.number = {word: i for i, word in enumerate(known.tolist(), 1)}
        ids, _ = self.encode(texts)
        self.tables = []
        for n in (1, 2, 3):
            grams, counts = np.unique(self._grams(ids, n), return_counts=True)
            before, at, types = np.unique(grams >> WIDTH, return_inverse=True, return_counts=True)
            totals = np.bincount(at, weights=counts)
            self.tables.append(((grams, counts), (before, totals, types)))

    def encode(self, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """(all words,) their numbers, and (all words,) which text each belongs to; unknown words pad each beginning."""
        ids = [self.number.get(word, 0) for text in texts for word in ("", "", *text)]
        lengths = [len(text) + 2 for text in texts]
        return np.array(ids, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths)

    @staticmethod
    def _grams(ids: np.ndarray, n: int) -> np.ndarray:
        """(all words - 2,), the n-gram that ends at each position from the third on, as one number."""
        grams = np.zeros(max(0, len(ids) - 2), dtype=np.int64)
        for back in range(n - 1, -1, -1):
            grams = (grams << WIDTH) | ids[2 - back : len(ids) - back]
        return grams

    def surprise(self, texts: list[list[str]]) -> list[np.ndarray]:
        """For each text (words,), -log2 P(word | two before)."""
        ids, text = self.encode(texts)
        probability = np.full(max(0, len(ids) - 2), 1 / (len(self.number) + 1))
        for n, (grams, contexts) in enumerate(self.tables, 1):
            key = self._grams(ids, n)
            count = _lookup(*grams, key)
            total, types = (_lookup(contexts[0], values, key >> WIDTH) for values in contexts[1:])
            seen = np.maximum(total, 1)
            mixed = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * types * probability) / seen
            probability = np.where(total > 0, mixed, probability)
        bits = np.concatenate([[0.0, 0.0], -np.log2(probability)])
        ends: np.ndarray | list[int] = np.cumsum(np.bincount(text, minlength=len(texts))) if len(texts) else []
        return [part[2:] for part in np.split(bits, ends[:-1])] if len(texts) else []


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 for those that are not among the sorted `keys`."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
