"""Files, folders and Hub datasets → chunks of whole records, streamed: no more than one chunk is in memory.

The text of a chunk ends with a record; the chunks of a table are lists of rows.
Processes share out chunks.
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.reading.values import as_text, checked

csv.field_size_limit(2**31 - 1)  # the most that a C long holds everywhere; Python's own limit is 131,072 characters

CHUNK_BYTES = 1_000_000  # of text, about
CHUNK_ROWS = 1_000  # of a table, at most
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
SPLITS = ("train", "validation", "test")
SPLIT = re.compile(r"(?<![a-z])(train|valid|val|dev|test)(ing|ation)?(?![a-z])", re.IGNORECASE)
SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Whole records in the order of their file; `split` is the one that the file's name or the Hub gives them.

    `first_row` is the number of its first row in the table, from 1.
    """

    origin: str
    split: str | None
    content: str | list[Row]
    first_row: int = 1

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    @property
    def rows(self) -> list[Row]:
        assert not isinstance(self.content, str)
        return self.content


def text_chunks(data: str, end: str) -> Iterator[Chunk]:
    """Chunks of text whose records end with `end`, from text files or from the `text` column of a table.

    A table holds a line a row, as on the Hub; a row of several lines is a record of its own.

    Raises:
        UserError: nothing there, empty, damaged, or not UTF-8 (with the byte's offset).
    """
    for origin, split, rows in origins(data):
        found = decoded(Path(origin), end) if rows is None else _joined(_lines(origin, rows, end), end)
        for text in _not_empty(origin, (text for text in found if text.strip())):
            yield Chunk(origin, split, text)


def row_chunks(data: str) -> Iterator[Chunk]:
    """Rows of JSON, JSON lines, CSV, parquet or a Hub dataset.

    Raises:
        UserError: nothing there, empty, damaged, not a table, or not UTF-8 (with the byte's offset).
    """
    for origin, split, rows in origins(data):
        if rows is None:
            raise UserError(f"{origin} is no table; this source reads {', '.join(TABLES)} (or .gz of it) and Hub ids.")
        rows, first_row = _not_empty(origin, rows), 1
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(origin, split, chunk, first_row)
            first_row += len(chunk)


def origins(data: str) -> Iterator[tuple[str, str | None, Iterable[Row] | None]]:
    """Each file or split of the Hub that `data` names: its origin, its split, and its rows unless it is a text."""
    path = Path(data)
    if not path.exists() and HUB_ID.fullmatch(data) and suffix(path) not in (*TABLES, ".txt"):
        for name, rows in _hub_dataset(data).items():
            yield data, _split(name), rows
        return
    files = [path]
    if path.is_dir():
        files = _data_files(path) or _data_files(path / "data")  # a repository of the Hub has them in data/
        if not files:
            raise UserError(f"{path} holds no data file; expected .txt, {', '.join(TABLES)} or .gz of it.")
    for file in files:
        if not file.exists():
            raise UserError(f"There is no data file at {file}.")
        yield str(file), _split(file.name), _rows(file) if suffix(file) in TABLES else None


def _data_files(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in found if suffix(file) in (*TABLES, ".txt") and file.is_file())


def suffix(file: Path) -> str:
    """A file's suffix in lower case, without `.gz`: `.jsonl` for `A.JSONL.GZ`."""
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _split(name: str) -> str | None:
    found = SPLIT.search(name)
    return SPLIT_NAMES[found[1].lower()] if found else None


def _hub_dataset(name: str) -> dict[str, Iterable[Row]]:
    from datasets import load_dataset

    try:
        repository, _, config = name.partition(":")
        return load_dataset(repository, config or None, streaming=True)
    except Exception as error:  # the Hub, its libraries and the network fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is no file here, and the Hub does not give a dataset of that name: {reason}"
        ) from error


def _not_empty(origin: str, items: Iterable) -> Iterator:
    items = iter(items)
    for first in items:
        return chain([first], items)
    raise UserError(f"{origin} is empty.")


def decoded(file: Path, end: str) -> Iterator[str]:
    """Yields the text of a file, about `CHUNK_BYTES` bytes at a time, each time up to an `end`."""
    mark, left, offset = end.encode(), b"", 0
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            while read := stream.read(CHUNK_BYTES):
                content = left + read
                cut = content.rfind(mark) + len(mark) if mark in content else 0
                content, left = content[:cut], content[cut:]
                yield _decode(file, content, offset)
                offset += len(content)
        yield _decode(file, left, offset)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


def _decode(file: Path, content: bytes, offset: int) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {offset + error.start} cannot be decoded.") from error
    return (text if offset else text.removeprefix("\ufeff")).replace("\r\n", "\n")


def _lines(origin: str, rows: Iterable[Row], end: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if "text" not in row:
            raise UserError(f"{origin} has no column text; it has {', '.join(row)}.")
        where = f"{origin}, row {number}, column text"
        line = checked(row["text"], where) if isinstance(row["text"], str) else as_text(row["text"], where)
        yield f"{line}\n{end}" if "\n" in line and end not in line else line


def _joined(lines: Iterator[str], end: str) -> Iterator[str]:
    chunk, size = [], 0
    for line in lines:
        chunk.append(line)
        size += len(line) + 1
        if size >= CHUNK_BYTES and end in line:
            yield "\n".join(chunk)
            chunk, size = [], 0
    yield "\n".join(chunk)


def _rows(file: Path) -> Iterator[Row]:
    kind, number = suffix(file), 0
    if kind == ".parquet":
        rows = _parquet(file)
    elif kind == ".json":
        rows = _json(file)
    else:
        lines = (line for text in decoded(file, "\n") if text for line in text.removesuffix("\n").split("\n"))
        if kind in (".csv", ".tsv"):
            rows = _csv(lines, "\t" if kind == ".tsv" else ",")
        else:
            rows = (json.loads(line) for line in lines if line.strip())
    try:
        for row in rows:
            number += 1
            if not isinstance(row, dict):
                raise UserError(f"{file}: row {number} is {str(row)[:40]!r}, not a record with named columns.")
            yield row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{file} is damaged after row {number}: {error}.") from error


def _csv(lines: Iterator[str], delimiter: str) -> Iterator[Row]:
    """Strict: a quote that is never closed would otherwise swallow the rest of the file."""
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    header = next(rows, [])
    _refuse_twice(header)
    for row in rows:
        if len(row) > len(header):
            raise ValueError(f"the next row has {len(row)} fields, and the header names {len(header)}")
        if row:
            yield dict(zip_longest(header, row))


def _refuse_twice(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"its header names the column {twice[0]} twice")


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    _refuse_twice(table.schema_arrow.names)
    for batch in table.iter_batches(CHUNK_ROWS):
        yield from batch.to_pylist()


def _json(file: Path) -> Iterator[Row]:
    """An array, an object that holds one, or JSON lines under this name."""
    text = "".join(decoded(file, "\n"))
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        content = (json.loads(line) for line in text.split("\n") if line.strip())
    if isinstance(content, dict):
        arrays = [value for value in content.values() if isinstance(value, list) and value]
        content = arrays[0] if len(arrays) == 1 and isinstance(arrays[0][0], dict) else [content]
    yield from content
