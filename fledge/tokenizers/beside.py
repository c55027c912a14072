"""Finds the tokenizer beside a checkpoint by its size, which must fit the rows of the model's embedding."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from fledge.errors import UserError
from fledge.tokenizers import FOLDER_ORDER, MERGES, read_tokenizer

LARGEST = 20_000_000  # bytes of a vocabulary; larger files are data
VOCABULARIES = (".json", ".pkl", ".pickle")


def find_beside(checkpoint: str, rows: int) -> tuple[str, bool]:
    """The file of the tokenizer, and whether it is only a text whose sorted characters are taken as the vocabulary.

    The search covers the checkpoint's folder and its subfolders: first for a tokenizer under its usual name with at
    most `rows` tokens (embeddings are often padded); then for a vocabulary of exactly `rows` tokens in JSON or in a
    pickle, which is opened without running code; then for a text of exactly that many different characters.

    Raises:
        UserError: there is none, or several that differ.
    """
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    folders = [folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")]
    files = [file for inner in folders for file in sorted(inner.iterdir()) if file.is_file() and file != path]
    named = [inner / name for inner in folders for name in FOLDER_ORDER]
    named = [file for file in named if file.is_file() and (file.name not in MERGES or _merges(file).is_file())]
    for file, tokenizer in _opened(named):
        if tokenizer.get_vocab_size() <= rows:
            return str(file), False
    vocabularies = [f for f in files if f.suffix.lower() in VOCABULARIES and f not in named and f.name != "config.json"]
    texts = [f for f in files if f.suffix.lower() == ".txt" and len(_characters(f, rows)) == rows]
    for candidates, is_guess in ((vocabularies, False), (texts, True)):
        found = [(f, tokenizer) for f, tokenizer in _opened(candidates) if tokenizer.get_vocab_size() == rows]
        if len({tuple(sorted(tokenizer.get_vocab().items())) for _, tokenizer in found}) > 1:
            several = ", ".join(str(file) for file, _ in found)
            raise UserError(f"{several} all fit the {rows} rows of the embedding, and differ; pass one as --tokenizer.")
        if found:
            return str(found[0][0]), is_guess
    raise UserError(
        f"The checkpoint holds no vocabulary; pass --tokenizer: in {folder} lies no vocabulary of {rows} tokens, which "
        "are the rows of its embedding, nor a text of so many different characters."
    )


def _merges(file: Path) -> Path:
    return file.with_name(MERGES[file.name])


def _opened(files: list[Path]) -> Iterator[tuple[Path, Tokenizer]]:
    """The files that can be opened as a tokenizer; others are a config, a history or data."""
    for file in files:
        if file.suffix.lower() == ".txt" or file.stat().st_size <= LARGEST:
            with contextlib.suppress(UserError):
                yield file, read_tokenizer(file)


def _characters(file: Path, most: int) -> set[str]:
    """The different characters of a text; reading stops as soon as there are more than `most`."""
    found: set[str] = set()
    try:
        with file.open(encoding="utf-8") as text:
            while len(found) <= most and (part := text.read(1 << 20)):
                found |= set(part)
    except (OSError, UnicodeDecodeError):
        return set()
    return found
