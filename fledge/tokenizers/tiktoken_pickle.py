"""A pickled `tiktoken.Encoding`, as nanochat saves it, → a `tokenizers.Tokenizer`; nothing in the file runs."""

import pickle
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fledge.tokenizers.fast import characters_of_bytes


class Encoding:
    """A stand-in for `tiktoken.Encoding` that keeps the pickled values."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


# The C unpickler allocates as many memo entries as a damaged file asks for; Python's own does not.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return Encoding
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_encoding(file: Path) -> Tokenizer | None:
    """The byte-level BPE of a pickled encoding, or None if the pickle holds something else.

    Raises:
        ValueError: it lacks the pattern, the ranks or the special tokens.
    """
    try:
        with file.open("rb") as opened:
            encoding = _Unpickler(opened).load()
    except pickle.UnpicklingError:
        return None
    if not isinstance(encoding, Encoding):
        return None
    said = vars(encoding)
    if not {"pat_str", "mergeable_ranks", "special_tokens"} <= said.keys():
        raise ValueError(f"its encoding {said.get('name')} is saved by its name alone; name its tokenizer.json")
    return byte_level(said["mergeable_ranks"], said["pat_str"], said["special_tokens"])


def byte_level(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> Tokenizer:
    """The tokenizer that merges bytes by `ranks` inside the pieces that `pattern` finds.

    The two halves of a token, which tokenizers needs as a merge, are the result of applying all lower ranks to its
    bytes.
    """
    letters = {byte: character for character, byte in characters_of_bytes().items()}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(halves := _merged(ranks, token, rank)) == 2:
            merges.append((spelled(halves[0]), spelled(halves[1])))
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    # tiktoken uses a piece that is a token directly, whether merges lead to it or not.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for name, number in sorted(special.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        if tokenizer.token_to_id(name) != number:
            raise ValueError(f"the id of {name!r} is {number}, and not the next after its other tokens")
    return tokenizer


def _merged(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    """The parts of a token after all merges of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs)
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
