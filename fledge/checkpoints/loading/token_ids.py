"""Reads the vocabulary that a checkpoint stores beside its weights, as `stoi`, `itos`, `chars` and so on."""

import re
from collections.abc import Mapping
from pathlib import Path

from fledge.errors import UserError

TOKEN, ID = "(s|ch|chr|char|str|string|tok|token|word|vocab)s?", "(i|ix|id|idx|int|index)s?"

TOKEN_IDS = re.compile(f"{TOKEN}_?(to|2)_?{ID}|{ID}_?(to|2)_?{TOKEN}")

TOKEN_LISTS = ("vocab", "vocabulary", "chars")


def says_token_ids(key: object) -> bool:
    """Whether an entry of this name may hold the ids of tokens."""
    return isinstance(key, str) and (key in TOKEN_LISTS or bool(TOKEN_IDS.fullmatch(key.lower())))


def vocabulary_in(file: Path, places: list[Mapping]) -> tuple[dict[str, int] | None, list[str]]:
    """Token → id as `stoi`, `itos`, `chars` and the like say it, and the names of the entries that do."""
    found = []
    for place in places:
        for key, value in place.items():
            if says_token_ids(key):
                found += [(key, ids)] if (ids := _token_ids(value)) else []
    # `chars` may lack the special tokens that `stoi` or `vocab` has, so the longest list counts, and only alone.
    lists = sorted(found, key=lambda entry: -len(entry[1]))
    found = [(key, ids) for key, ids in found if key not in TOKEN_LISTS] or lists[:1]
    if not found:
        return None, []
    first, vocabulary = found[0]
    for key, ids in found:
        if ids != vocabulary:
            token = next(token for token in (*ids, *vocabulary) if ids.get(token) != vocabulary.get(token))
            raise UserError(
                f"{file} holds {first!r} and {key!r}, which disagree on the token {token!r} "
                f"({vocabulary.get(token)} and {ids.get(token)}); keep the one that the model was trained with."
            )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return None, []
    return vocabulary, [key for key, _ in found]


def _token_ids(value: object) -> dict[str, int] | None:
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if all(isinstance(token, str) for token in value.values()):
            pairs = [(token, number) for number, token in pairs]
    elif isinstance(value, (list, tuple)):
        pairs = [(token, number) for number, token in enumerate(value)]
    else:
        return None
    if all(isinstance(token, str) and type(number) is int for token, number in pairs):
        return dict(pairs)
    return None
