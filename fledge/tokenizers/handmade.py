"""Vocabularies of characters and of words, as people save them by hand → a `tokenizers.Tokenizer`."""

import io
import pickle
import re
from pathlib import Path
from typing import NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fledge.tokenizers.tiktoken_pickle import read_encoding

UNKNOWN_TOKENS = ("<|unk|>", "<unk>", "<UNK>", "[UNK]")
WORD_SPLIT = re.compile(r"""([,.:;?_!"()']|--|\s)""")
SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


def from_vocabulary(content: object) -> Tokenizer:
    """A character or a word tokenizer from a vocabulary that somebody saved.

    It is a list of tokens (id = position), token → id, id → token, a mapping that holds one of these as `stoi`, `itos`
    or `chars`, as nanoGPT's meta.pkl does, or a tuple that begins with one.

    Tokens that look like `<unk>`, `<|endoftext|>` or `[PAD]` are special: they are found whole in a text.

    Character vocabularies: every other token is one character. Encoding gives exactly `[stoi[c] for c in text]`, and
    decoding restores the text.

    Word vocabularies: any other. Such a file does not say how texts were split. The split of Raschka's "Build a Large
    Language Model (From Scratch)", chapter 2, is assumed: `re.split(r'([,.:;?_!"()\\']|--|\\s)', text)` without blank
    parts; decoding joins words by spaces, with none before punctuation. A vocabulary with words that this would split
    is refused.

    Raises:
        ValueError: no vocabulary, an empty one, ids that are not 0 to n - 1 once each, or words split another way.
    """
    vocabulary = _checked(_pairs(content))
    special = [token for token in vocabulary if SPECIAL.fullmatch(token)]
    ordinary = [token for token in vocabulary if not SPECIAL.fullmatch(token)]
    # If this token is not in the vocabulary, unknown characters raise an error; a BPE without one would drop them.
    unknown = next((token for token in UNKNOWN_TOKENS if token in vocabulary), UNKNOWN_TOKENS[0])
    if all(len(token) <= 1 for token in ordinary):
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
        tokenizer.decoder = decoders.Fuse()
    else:
        for token in ordinary:
            if [part.strip() for part in WORD_SPLIT.split(token) if part.strip()] != [token] or token[0] in "Ġ▁":
                raise ValueError(f"{token!r} is neither a character nor a word, and nothing says how a text was split")
        tokenizer = _words(vocabulary, unknown)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _words(vocabulary: dict[str, int], unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), "removed"),  # what Python's \s matches
            pre_tokenizers.Split(Regex(r"""[,.:;?_!"()']|--"""), "isolated"),
        ]
    )
    # The WordPiece decoder joins by spaces, except before a token with its prefix: no word begins with a space.
    joined = [decoders.WordPiece(prefix=" ", cleanup=False), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, decoders.Replace(Regex(r"""\s+(?=[,.:;?!"()'])"""), "")])
    return tokenizer


def read_text(file: Path) -> Tokenizer:
    """The tokenizer whose vocabulary is the sorted characters of a training text, `sorted(set(text))`."""
    return from_vocabulary(sorted(set(file.read_text(encoding="utf-8"))))


# The C unpickler allocates as many memo entries as a damaged file asks for; Python's own does not.
class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it holds {module}.{name}, not only text and numbers, and is not opened")


def read_pickle(file: Path) -> Tokenizer:
    """A pickled vocabulary of plain containers, or a pickled encoding of tiktoken.

    One that names any other class or function is refused, and nothing runs.
    """
    if encoding := read_encoding(file):
        return encoding
    return from_vocabulary(_PlainUnpickler(io.BytesIO(file.read_bytes())).load())


def _pairs(content: object) -> list[tuple[object, object]]:
    """(token, id) for every entry of any of the forms."""
    if isinstance(content, (list, tuple)):
        if content and isinstance(content[0], (list, dict)):  # (stoi, itos)
            return _pairs(content[0])
        return [(token, i) for i, token in enumerate(content)]
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a list or mapping of tokens")
    for name in ("stoi", "itos", "chars"):
        if isinstance(content.get(name), list | dict):
            return _pairs(content[name])
    if content and all(isinstance(token, str) for token in content.values()):
        return [(token, int(i)) for i, token in content.items()]
    return list(content.items())


def _checked(pairs: list[tuple[object, object]]) -> dict[str, int]:
    if not pairs:
        raise ValueError("its vocabulary is empty")
    tokens: dict[int, str] = {}
    for token, i in pairs:
        if not isinstance(token, str) or type(i) is not int:
            raise ValueError(f"it maps {token!r} to {i!r}, not a token to its id")
        if i in tokens:
            raise ValueError(f"id {i} stands for both {tokens[i]!r} and {token!r}")
        if not 0 <= i < len(pairs):
            raise ValueError(f"{token!r} has the id {i} among {len(pairs)} tokens, whose ids are 0 to {len(pairs) - 1}")
        tokens[i] = token
    vocabulary = {token: i for i, token in tokens.items()}
    if twice := next((token for i, token in tokens.items() if vocabulary[token] != i), None):
        raise ValueError(f"{twice!r} stands in it twice")
    return vocabulary
