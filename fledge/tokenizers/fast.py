"""Encodes byte-level BPE with tiktoken: the same ids as the tokenizers library, several times as fast.

With the same bytes and merges, `tiktoken.Encoding` gives the same ids. This is checked: the tokenizer must be of a
known kind, every token must be the result of merging its own bytes, and the ids are compared on the data itself. Any
other tokenizer encodes as usual.
"""

import json
import re

import tiktoken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

# GPT-2's pre-tokenizer pattern, as in tiktoken (tiktoken_ext/openai_public.py).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PLAIN_MODEL = {"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False}
PLAIN_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


class UnequalIds(Exception):
    """Raised if tiktoken gives other ids than the tokenizer itself."""


class TextEncoder:
    """Texts → ids, without added tokens. `way` says which library encodes.

    The ids of both libraries are compared on the first `CHECKED` texts and on the first text of each later batch.
    """

    CHECKED = 200

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fast: bool = True):
        self.tokenizer = tokenizer
        self.encoding, hindrance = tiktoken_encoding(tokenizer) if fast else (None, "its ids differ on this data")
        self.way = f"the tokenizers library (not tiktoken: {hindrance})" if hindrance else "tiktoken, ids checked"
        self.control = re.compile(
            "|".join(f"({re.escape(token)})" for token in tokenizer.added_tokens_encoder) or "(?!)"
        )
        self.checked = {True: 0, False: 0}

    def __call__(self, texts: list[str], control: bool = False) -> list[list[int]]:
        """Encodes texts. With `control`, control tokens in a text are tokens, as in a rendered template.

        Raises:
            UnequalIds: tiktoken cannot be used on this data; start again with `fast=False`.
        """
        if self.encoding is None:
            return self._slow(texts, control)
        ids = [self._fast(self.encoding, text) if control else self.encoding.encode_ordinary(text) for text in texts]
        checked = max(1, self.CHECKED - self.checked[control])
        if ids[:checked] != self._slow(texts[:checked], control):
            raise UnequalIds
        self.checked[control] += len(texts)
        return ids

    def _fast(self, encoding: tiktoken.Encoding, text: str) -> list[int]:
        ids: list[int] = []
        begin = 0
        for found in self.control.finditer(text):
            ids += encoding.encode_ordinary(text[begin : found.start()])
            ids.append(self.tokenizer.added_tokens_encoder[found[0]])
            begin = found.end()
        return ids + encoding.encode_ordinary(text[begin:])

    def _slow(self, texts: list[str], control: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not control)["input_ids"]


def tiktoken_encoding(tokenizer: PreTrainedTokenizerBase) -> tuple[tiktoken.Encoding | None, str]:
    """The `Encoding` that gives this tokenizer's ids, or `None` and the reason why there is none."""
    if not tokenizer.is_fast:
        return None, "it is written in Python"
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model, words = description["model"], description["pre_tokenizer"] or {}
    if any(model.get(key, value) != value for key, value in PLAIN_MODEL.items()):
        return None, "it is no plain byte-level BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None, "it marks parts of words"
    if description["normalizer"] is not None:
        return None, "it normalises text"
    if any(words.get(key) != value for key, value in PLAIN_WORDS.items()):
        return None, "it does not cut words as GPT-2 does"
    if not all(token["special"] for token in description["added_tokens"]):
        return None, "it has added tokens that are not special"
    if any(token[flag] for token in description["added_tokens"] for flag in ("lstrip", "rstrip", "single_word")):
        return None, "its special tokens take in what is around them"

    byte_of, vocabulary = characters_of_bytes(), model["vocab"]
    if not byte_of.keys() <= vocabulary.keys():
        return None, "it lacks some bytes"
    merged = [left + right for left, right in merges_of(model)]
    order = [vocabulary[token] for token in merged]
    if order != sorted(set(order)):
        return None, "its ids are not in the order of its merges"
    # The tokenizer never emits a token that merges do not reach, but tiktoken would look it up directly.
    backend = tokenizer.backend_tokenizer.model
    if any(len(backend.tokenize(token)) != 1 for token in merged):
        return None, "its merges do not reach every token"
    ranks = {bytes(byte_of[c] for c in token): vocabulary[token] for token in (*byte_of, *merged)}
    return tiktoken.Encoding("fledge", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}), ""


def merges_of(model: dict) -> list[tuple[str, str]]:
    """The merges of a BPE model in `tokenizer.json`; older files write them as strings with a space."""
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]


def characters_of_bytes() -> dict[str, int]:
    """GPT-2's visible character for each byte: itself if it is printable, else the next from U+0100 on."""
    hidden = sorted(set(range(256)) - {*range(33, 127), *range(161, 173), *range(174, 256)})
    characters = {chr(256 + index): byte for index, byte in enumerate(hidden)}
    characters |= {chr(byte): byte for byte in range(256) if byte not in hidden}
    assert characters.keys() == set(ByteLevel.alphabet())
    return characters
