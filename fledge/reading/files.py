"""Files, folders and Hub datasets → chunks of whole records, streamed, with one chunk in memory at a time.

The text of a chunk ends with a record; the chunks of a table are lists of rows. Processes work on one chunk at a time.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any

from fledge.errors import UserError
from fledge.reading.values import as_text, checked

csv.field_size_limit(2**31 - 1)  # the largest C long on every system; Python's default is 131,072 characters

CHUNK_BYTES = 1_000_000  # of text, about
CHUNK_ROWS = 1_000  # of a table, at most
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
PACKED = f"{', '.join(COMPRESSED)} of it"
# JSON files of `datasets` and of this library that describe a dataset and have none of its rows.
DESCRIPTIONS = ("budget.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
SPLITS = ("train", "validation", "test")
SPLIT = re.compile(r"(?<![a-z])(train|valid|val|dev|test)(ing|ation)?(?![a-z])", re.IGNORECASE)
SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Whole records in the order of their file; `split` comes from the file's name or from the Hub.

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

    A table has one line per row, as on the Hub; a row with several lines is one record.

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
            raise UserError(f"{origin} is no table; this source reads {', '.join(TABLES)} (or {PACKED}) and Hub ids.")
        rows, first_row = _not_empty(origin, rows), 1
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(origin, split, chunk, first_row)
            first_row += len(chunk)


def origins(data: str) -> Iterator[tuple[str, str | None, Iterable[Row] | None]]:
    """Yields each file or Hub split that `data` names: its origin, its split, and its rows unless it is a text."""
    path = Path(data)
    if not path.exists() and HUB_ID.fullmatch(data) and suffix(path) not in (*TABLES, ".txt"):
        for name, rows in _hub_dataset(data).items():
            yield data, _split(name), rows
        return
    files = [path]
    if path.is_dir():
        files = _data_files(path) or _data_files(path / "data")  # a repository of the Hub has its files in data/
        if not files:
            raise UserError(f"{path} holds no data file; expected .txt, {', '.join(TABLES)} or {PACKED}.")
    for file in files:
        if not file.exists():
            raise UserError(f"There is no data file at {file}.")
        yield str(file), _split(file.name), _rows(file) if suffix(file) in TABLES else None


def _data_files(folder: Path) -> list[Path]:
    found = (file for file in folder.iterdir() if file.name not in DESCRIPTIONS) if folder.is_dir() else ()
    # Hidden files are no data: macOS puts ._a.csv beside a.csv, and Fledge its mark.
    shown = (file for file in found if not file.name.startswith("."))
    return sorted(file for file in shown if suffix(file) in (*TABLES, ".txt") and file.is_file())


def suffix(file: Path) -> str:
    """A file's suffix in lower case, without that of the compression: `.jsonl` for `A.JSONL.GZ`."""
    name = Path(file.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix


def _split(name: str) -> str | None:
    found = SPLIT.search(name)
    return SPLIT_NAMES[found[1].lower()] if found else None


def _hub_dataset(name: str) -> dict[str, Iterable[Row]]:
    from datasets import load_dataset

    try:
        repository, _, config = name.partition(":")
        splits = load_dataset(repository, config or None, streaming=True)
    except Exception as error:  # the Hub, its libraries and the network fail in many ways
        raise UserError(
            f"{name} is no file here, and the Hub does not give a dataset of that name: {_reason(error)}"
        ) from error
    return {split: _streamed(f"{name}, split {split},", rows) for split, rows in splits.items()}


def _streamed(origin: str, rows: Iterable[Row]) -> Iterator[Row]:
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # as above: rows are fetched over the network one by one
        raise UserError(f"{origin} gives no more rows after row {number}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _not_empty(origin: str, items: Iterable) -> Iterator:
    items = iter(items)
    for first in items:
        return chain([first], items)
    raise UserError(f"{origin} is empty.")


def decoded(file: Path, *ends: str) -> Iterator[str]:
    """Yields the text of a file in parts of about `CHUNK_BYTES` bytes, each of which ends with one of `ends`.

    Raises:
        UserError: it cannot be read, or is not UTF-8 (with the byte's offset).
    """
    marks, offset = [end.encode() for end in ends], 0
    held: list[bytes] = []  # parts without an end so far; joined once, because a line may be as long as the file
    try:
        with _opened(file) as stream:
            while read := stream.read(CHUNK_BYTES):
                cut = max(read.rfind(mark) + len(mark) if mark in read else 0 for mark in marks)
                if cut:
                    content = b"".join([*held, read[:cut]])
                    yield _decode(file, content, offset)
                    held, offset = [], offset + len(content)
                held.append(read[cut:])
        yield _decode(file, b"".join(held), offset)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


def _opened(file: Path) -> IO[bytes]:
    kinds: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}
    return kinds.get(file.suffix.lower(), open)(file, "rb")


def _zstandard(file: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


def _decode(file: Path, content: bytes, offset: int) -> str:
    head = b"" if offset else content[:1000]
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or head.count(0) > len(head) / 4:
        raise UserError(f"{file} is not UTF-8 text but looks like UTF-16; save it as UTF-8.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text: byte {offset + error.start} cannot be decoded; save it as UTF-8."
        ) from error
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
            rows = _csv(lines, "\t" if kind == ".tsv" else ",;\t")
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


def _csv(lines: Iterator[str], delimiters: str) -> Iterator[Row]:
    """Reads CSV. The delimiter is the first of `delimiters` in the header: spreadsheets use `;` where numbers have `,`.

    Parsing is strict: otherwise a quote that is never closed would swallow the rest of the file.
    """
    head = next(lines, "")
    delimiter = next((sign for sign in delimiters if sign in head), delimiters[0])
    rows = csv.reader((f"{line}\n" for line in chain([head], lines)), delimiter=delimiter, strict=True)
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
    """The rows of a JSON file: an array, an object that contains one, or JSON lines."""
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
