"""Raw text, from files or the Hub → documents, streamed, so that a corpus may be larger than memory."""

import contextlib
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from fledge.cli import UserError

END = "<|endoftext|>"
PIECE = 1 << 20  # characters
SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")


def pieces(
    data: list[str], text_column: str = "text", document_start: str | None = None, size: int = PIECE
) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether its document ends with it) from files, folders and Hub datasets, in their order.

    Documents of a text file (or .gz) lie between `<|endoftext|>` marks; a row of a .jsonl or .parquet file or of a Hub
    dataset is one. With `document_start`, a regular expression, a document also begins at each line that it matches,
    and rows are lines (WikiText: `^ = [^=]`). Space around a document is taken off, empty documents are left out.

    A document longer than `size` characters comes in several pieces, each cut before the last space of a gap between
    words. There GPT-2's pattern cuts as well, so the pieces have the same ids as the whole.

    Raises:
        UserError: nothing there, not UTF-8, not of its form, a column that is missing, or no text at all.
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
    """(name, bytes, time of change) of every file, by which a changed corpus is told; a Hub dataset has its name."""
    found = []
    for source in data:
        if _is_on_the_hub(source):
            found.append((source, 0, 0))
        else:
            stats = [(file, file.stat()) for file in _files(Path(source))]
            found += [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return found


def _is_on_the_hub(source: str) -> bool:
    return (
        not Path(source).exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) is not None
        and not (source.removesuffix(".gz").endswith(SUFFIXES))
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file, a folder, or a Hub dataset (owner/name[:config]).")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.removesuffix(".gz").endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path} holds no file that ends in {', '.join(SUFFIXES)} (or .gz); name one that does.")
    return files


def _texts(source: str, column: str, rows_are_lines: bool) -> Iterator[str | None]:
    """Text in reading order; `None` where a document ends."""
    if _is_on_the_hub(source):
        rows = _hub_rows(source)
        yield from _join(rows, source, column, rows_are_lines)
        return
    for file in _files(Path(source)):
        kind = Path(file.name.removesuffix(".gz")).suffix
        if kind == ".parquet":
            yield from _join(_parquet_rows(file, column), file, column, rows_are_lines)
        elif kind in (".jsonl", ".json"):
            with _reading(file) as lines:
                yield from _join(_json_rows(file, lines), file, column, rows_are_lines)
        else:
            with _reading(file) as text:
                while chunk := text.read(PIECE):
                    yield chunk
        yield None


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[IO[str]]:
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(file.open("rb"))
            if file.suffix == ".gz":
                raw = stack.enter_context(gzip.GzipFile(fileobj=raw))
            yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason}); convert it first.") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


def _json_rows(file: Path, lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file} line {number} is not JSON ({error}); give one object a line.") from error
            if not isinstance(row, dict):
                raise UserError(f"{file} line {number} is no object; give one object a line.")
            yield row


def _parquet_rows(file: Path, column: str) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = [column] if column in parquet.schema_arrow.names else None
        for batch in parquet.iter_batches(1000, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no parquet file ({error}).") from error


def _hub_rows(source: str) -> Iterator[dict]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        yield from load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:  # datasets and the Hub raise many kinds
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{source} is neither a file nor a Hub dataset that opens ({cause}).") from error


def _join(rows: Iterable[dict], source: object, column: str, rows_are_lines: bool) -> Iterator[str | None]:
    for row in rows:
        if not isinstance(row.get(column), str):
            raise UserError(f"{source} has no text in {column!r} (it has {', '.join(row)}); name it by --text_column.")
        yield row[column]
        if not rows_are_lines:
            yield None


def _mark(texts: Iterable[str | None], start: re.Pattern | None) -> Iterator[str | None]:
    """Puts `None` for each `<|endoftext|>`, and before each line that `start` matches."""
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
            # What may be half a mark or half a line waits for the next text.
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
            if gap == 0:  # one word without end: nothing can be cut
                break
            yield held[:gap], False
            held, is_first = held[gap:], False


def _last_gap(text: str, limit: int) -> int:
    """Where the last space before a word stands in the first `limit` characters; 0 when there is none."""
    for begin in (max(0, limit - 4096), 0):  # looking at the end first is a hundred times faster
        gaps = [begin + match.start() for match in re.finditer(r"\s(?=\S)", text[begin : limit + 1])]
        if gaps:
            return gaps[-1]
    return 0
