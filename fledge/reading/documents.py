"""Raw text from files or the Hub → documents, streamed, so that a corpus may be larger than memory."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fledge.errors import UserError
from fledge.reading.files import decoded, origins
from fledge.reading.values import checked, is_nothing

END = "<|endoftext|>"
PIECE = 1 << 20  # characters


def pieces(
    data: list[str], text_column: str = "text", document_start: str | None = None, size: int = PIECE
) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether its document ends with it) from files, folders and Hub datasets, in their order.

    The documents of a text file are separated by `<|endoftext|>`. Each row of a .jsonl, .csv or .parquet file or of a
    Hub dataset (owner/name, or owner/name:config) is a document. With `document_start`, a regular expression, documents
    also begin at lines that match it, and rows are lines (WikiText: `^ = [^=]`). White space around a document is
    removed, and empty documents are left out.

    A document longer than `size` characters is split into several pieces before the last space of a gap between words.
    GPT-2's pattern splits there, too, so the pieces have the same ids as the whole.

    Raises:
        UserError: a file is missing, not UTF-8 or damaged, a column is missing, or there is no text.
    """
    start = None
    if document_start:
        try:
            start = re.compile(document_start, re.MULTILINE)
        except re.error as error:
            raise UserError(f"--document_start {document_start} is no regular expression: {error}.") from error
    found = False
    for source in data:
        for piece in _cut(_mark(_texts(source, text_column, rows_are_lines=start is not None), start), size):
            found = True
            yield piece
    if not found:
        raise UserError(f"{', '.join(data)}: there is no text in it; name files that have some.")


def names_and_sizes(data: list[str]) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of every file, to detect a changed corpus; only the name for a Hub dataset."""
    found = []
    for source in data:
        for origin, _, _ in origins(source):
            file = Path(origin)
            found.append((file.name, file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (origin, 0, 0))
    return found


def _texts(source: str, column: str, rows_are_lines: bool) -> Iterator[str | None]:
    """Yields text in reading order and `None` at the end of a document; of a Hub dataset, the split train."""
    for origin, split, rows in origins(source):
        if rows is None:
            yield from decoded(Path(origin), " ", "\n")  # Chinese has no spaces
            yield None
        elif Path(origin).exists() or split in (None, "train"):
            for number, row in enumerate(rows, 1):
                where = f"{origin}, row {number}, column {column}"
                if number == 1 and column not in row:
                    has = ", ".join(row)
                    raise UserError(f"{origin} has no column {column} (it has {has}); name it by --text_column.")
                text = "" if is_nothing(row.get(column)) else row[column]
                if not isinstance(text, str):
                    raise UserError(f"{where} holds no text; name the column that does by --text_column.")
                yield checked(text, where)
                if not rows_are_lines:
                    yield None
            yield None


def _mark(texts: Iterable[str | None], start: re.Pattern | None) -> Iterator[str | None]:
    """Replaces each `<|endoftext|>` by `None`, and inserts `None` before each line that `start` matches."""
    rest = ""
    for text in texts:
        if text is None:
            yield from _split_starts(rest, start)
            yield None
            rest = ""
            continue
        *whole, rest = (rest + text).split(END)
        for document in whole:
            yield from _split_starts(document, start)
            yield None
        if len(rest) > PIECE:
            # A possible beginning of a mark or an incomplete line waits for the next text.
            ready = rest.rfind("\n") if start else len(rest) - len(END)
            if ready > 0:
                yield from _split_starts(rest[:ready], start)
                rest = rest[ready:]
    yield from _split_starts(rest, start)
    yield None


def _split_starts(text: str, start: re.Pattern | None) -> Iterator[str | None]:
    begin = 0
    for match in start.finditer(text) if start else ():
        yield text[begin : match.start()]
        yield None
        begin = match.start()
    yield text[begin:]


def _cut(texts: Iterable[str | None], size: int) -> Iterator[tuple[str, bool]]:
    held, is_first = "", True
    for text in texts:
        held += text or ""
        if is_first:
            held = held.lstrip()
        if text is None:
            if held := held.rstrip():
                yield held, True
            held, is_first = "", True
        while len(held) > size:
            gap = _last_gap(held, size)
            if gap == 0:  # one endless word cannot be split
                break
            yield held[:gap], False
            held, is_first = held[gap:], False


def _last_gap(text: str, limit: int) -> int:
    """The index of the last space before a word in the first `limit` characters; 0 if there is none."""
    for begin in (max(0, limit - 4096), 0):  # looking at the end first is a hundred times faster
        gaps = [begin + match.start() for match in re.finditer(r"\s(?=\S)", text[begin : limit + 1])]
        if gaps:
            return gaps[-1]
    return 0
