"""Rows in chunks → the files of a dataset: parquet for people and the Hub, memory-mapped Arrow for training."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, DatasetInfo, Features, concatenate_datasets, load_from_disk

from fledge.encoding import with_messages
from fledge.errors import UserError
from fledge.preparation.chunks import Facts
from fledge.preparation.curation import Splits
from fledge.preparation.tables import TOKENS, TOKENS_OF_PAIRS, read_table

SHUFFLED = 32  # chunks whose rows are shuffled together: about 100 MB


def bytes_of(size: str) -> int:
    """`500MB` → bytes.

    Raises:
        UserError: not a size.
    """
    found = re.fullmatch(r"(\d+) ?([KMGT])(i?)B", size.strip(), re.IGNORECASE)
    if not found:
        raise UserError(f"--max_shard_size {size} is no size; write it as 500MB or 2GB.")
    number, prefix, binary = found.groups()
    return max(1, int(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1))


def parquet_writer(file: Path, schema: pa.Schema) -> pa.parquet.ParquetWriter:
    # The options of `datasets`: the Hub then stores the parts that two versions of a file share only once.
    return pa.parquet.ParquetWriter(file, schema, use_content_defined_chunking=True, write_page_index=True)


def arrow_writer(file: Path, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
    return pa.ipc.new_stream(str(file), schema)


class Shards:
    """Appends tables to files `NAME-00000-of-00003.SUFFIX` that hold at most `max_bytes` each before compression."""

    def __init__(self, stem: Path, suffix: str, features: Features, writer: Callable, max_bytes: int):
        self.stem, self.suffix, self.schema = stem, suffix, features.arrow_schema
        self.make_writer, self.max_bytes = writer, max_bytes
        self.files: list[Path] = []
        self.room = self.rows = 0
        self.open = contextlib.ExitStack()
        self._next()

    def _next(self) -> None:
        self.open.close()
        self.files.append(self.stem.with_name(f"{self.stem.name}-{len(self.files):05d}"))
        self.writer = self.open.enter_context(self.make_writer(self.files[-1], self.schema))
        self.room = self.max_bytes

    def write(self, table: pa.Table) -> None:
        table = table.select(self.schema.names).cast(self.schema)
        self.rows += len(table)
        while len(table):
            row_bytes = max(1, table.nbytes // len(table))
            if self.room < row_bytes and self.room < self.max_bytes:
                self._next()
            part = table[: max(1, self.room // row_bytes)]
            self.writer.write_table(part)
            self.room -= len(part) * row_bytes
            table = table[len(part) :]

    def close(self) -> list[Path]:
        """Closes the files and gives them their names."""
        self.open.close()
        named = [Path(f"{file}-of-{len(self.files):05d}{self.suffix}") for file in self.files]
        self.files = [file.rename(name) for file, name in zip(self.files, named, strict=True)]
        return self.files


def write_splits(folder: Path, facts: Facts, splits: Splits, columns: Features, max_bytes: int) -> None:
    """Writes `data/SPLIT-*.parquet` and the `DatasetDict` `tokenized/` into `folder`, from the rows of the chunks.

    Chunks are shuffled, and then rows within `SHUFFLED` chunks. No file holds more than `max_bytes` before compression.
    """
    files = facts.files("rows.arrow")
    split_of_chunk = np.split(splits.of_row, np.cumsum(facts.rows)[:-1])
    text, tokens, features = [], [], TOKENS_OF_PAIRS if "rejected" in columns else TOKENS
    (folder / "data").mkdir()
    for name in splits.names:
        (folder / "tokenized" / name).mkdir(parents=True)
        text.append(Shards(folder / "data" / name, ".parquet", columns, parquet_writer, max_bytes))
        tokens.append(Shards(folder / "tokenized" / name / "data", ".arrow", features, arrow_writer, max_bytes))

    rng = np.random.default_rng(splits.seed)
    order = rng.permutation(len(files))
    for begin in range(0, len(order), SHUFFLED):
        together = order[begin : begin + SHUFFLED]
        rows = pa.concat_tables([read_table(files[number]) for number in together])
        split_of_row = np.concatenate([split_of_chunk[number] for number in together])
        for number in range(len(splits.names)):
            chosen = rows.take(rng.permutation(np.flatnonzero(split_of_row == number)))
            tokens[number].write(chosen)
            text[number].write(published(chosen, columns))

    for name, of_text, of_tokens in zip(splits.names, text, tokens, strict=True):
        of_text.close()
        _describe_arrow(folder / "tokenized" / name, of_tokens.close(), features)
    (folder / "tokenized" / "dataset_dict.json").write_text(
        json.dumps({"splits": list(splits.names)}), encoding="utf-8"
    )


def published(rows: pa.Table, columns: Features) -> pa.Table:
    """The rows with the published `columns` (see `written_columns`) in place of `messages`."""
    if "rejected" in columns:
        messages = rows["messages"].to_pylist()
        rejected = [[{"role": "assistant", "content": text}] for text in rows["rejected"].to_pylist()]
        made = {"prompt": [m[:-1] for m in messages], "chosen": [m[-1:] for m in messages], "rejected": rejected}
        rows = rows.drop_columns(["rejected"])
        for name, values in made.items():
            rows = rows.append_column(name, pa.array(values, columns.arrow_schema.field(name).type))
    elif "messages" not in columns:
        for place, name in enumerate(("instruction", "response")):
            message = pa.compute.list_element(rows["messages"], place)
            rows = rows.append_column(name, pa.compute.struct_field(message, "content"))
    return rows


def _describe_arrow(folder: Path, files: list[Path], features: Features) -> None:
    """Adds the metadata of `Dataset.save_to_disk` to Arrow files, without loading their rows into memory."""
    digest = blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    state: dict[str, object] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": digest.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    info = dict(sorted(asdict(DatasetInfo(features=features)).items()))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    try:
        load_from_disk(str(folder))
    except Exception:  # another release of datasets may have other metadata; then save_to_disk itself writes it
        rows, whole = [Dataset.from_file(str(file)) for file in files], folder.with_name(f"{folder.name}.whole")
        concatenate_datasets(rows).save_to_disk(str(whole))
        shutil.rmtree(folder)
        whole.rename(folder)


def first_rows(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a split that `write_splits` wrote, with `messages`, class labels as numbers."""
    file = min((folder / "data").glob(f"{split}-*.parquet"))
    rows = next(pa.parquet.ParquetFile(file).iter_batches(batch_size=count)).to_pylist()
    return [with_messages(row) for row in rows]
