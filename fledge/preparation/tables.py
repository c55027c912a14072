"""The rows of a chunk and their facts as Arrow tables, and the files that hold them."""

from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, List, Value
from transformers import PreTrainedTokenizerBase

from fledge.encoding import IGNORED, Encoded
from fledge.reading.files import SPLITS
from fledge.tasks import Task
from fledge.tokenizers.spelling import unknown_id

TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
TOKENS_OF_PAIRS = Features({**TOKENS, "rejected_ids": List(Value("int32"))})
FACTS = {
    "source_split": pa.int8(),
    "group": pa.uint64(),
    "fingerprint": pa.uint64(),
    "length": pa.int32(),
    "completion_length": pa.int32(),
    "supervised": pa.int32(),
    "is_ended": pa.bool_(),
    "is_known": pa.bool_(),
    "was_cut": pa.bool_(),
    "unlearned": pa.int32(),
}


def written_columns(task: Task, has_pairs: bool = False) -> Features:
    """The columns of a published row: `instruction` and `response` replace the messages if the task `asks_once`.

    Those of a pair are TRL's: `prompt`, `chosen` and `rejected`, each a list of messages.
    """
    columns = columns_of(task, has_pairs)
    if not task.asks_once and not has_pairs:
        return columns
    messages = columns.pop("messages")
    if has_pairs:
        return Features({"prompt": messages, "chosen": messages, **columns, "rejected": messages})
    return Features({"instruction": Value("string"), "response": Value("string"), **columns})


def columns_of(task: Task, has_pairs: bool = False) -> Features:
    """The columns of a row in a chunk."""
    kinds = {"string": Value("string"), "strings": List(Value("string"))}
    columns = {
        column: ClassLabel(names=list(kind)) if isinstance(kind, tuple) else kinds[kind]
        for column, kind in task.columns.items()
    }
    rejected = {"rejected": Value("string")} if has_pairs else {}
    return Features({"messages": List({"role": Value("string"), "content": Value("string")}), **rejected, **columns})


def rows_table(task: Task, rows: list[tuple[dict[str, Any], Encoded]], has_pairs: bool = False) -> pa.Table:
    """Examples as a table: the task's columns, `input_ids`, `labels`, and for pairs the rejected answer and its ids."""
    features, tokens = columns_of(task, has_pairs), TOKENS_OF_PAIRS if has_pairs else TOKENS
    arrays = []
    for name, column in zip(features, features.arrow_schema, strict=True):
        values = [example[name] for example, _ in rows]
        if isinstance(features[name], ClassLabel):
            values = [features[name].str2int(value) for value in values]
        arrays.append(pa.array(values, column.type))
    for name in tokens:
        parts = [ids.row[name] for _, ids in rows]
        offsets = pa.array(np.cumsum([0, *map(len, parts)], dtype=np.int32))
        flat = np.fromiter(chain.from_iterable(parts), np.int32, count=sum(map(len, parts)))
        arrays.append(pa.ListArray.from_arrays(offsets, pa.array(flat)))
    return pa.table(arrays, names=[*features, *tokens])


def facts_table(
    task: Task, rows: list[tuple[dict[str, Any], Encoded]], split: str | None, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """The facts of each row for curation and the budget report.

    Class columns have the number of the label. The source's own split is its number in `SPLITS`, or -1. `is_known` says
    that no answer has the unknown token.
    """
    unknown = unknown_id(tokenizer)
    texts = ("\0".join(part for m in example["messages"] for part in m.values()) for example, _ in rows)
    facts = {
        "source_split": [SPLITS.index(split) if split else -1] * len(rows),
        "group": [hash_of(example["group"]) for example, _ in rows],
        "fingerprint": list(map(hash_of, texts)),
        "length": [len(ids.input_ids) for _, ids in rows],
        "completion_length": [ids.completion_length for _, ids in rows],
        "supervised": [len(ids.labels) - ids.labels.count(IGNORED) for _, ids in rows],
        "is_ended": [ids.input_ids[-1] == tokenizer.eos_token_id for _, ids in rows],
        "is_known": [unknown not in ids.labels and unknown not in (ids.rejected_ids or ()) for _, ids in rows],
        "was_cut": [ids.was_cut for _, ids in rows],
        "unlearned": [ids.unlearned for _, ids in rows],
    }
    table = pa.table({name: pa.array(values, FACTS[name]) for name, values in facts.items()})
    for column, labels in task.classes.items():
        table = table.append_column(column, pa.array([labels.index(e[column]) for e, _ in rows], pa.int16()))
    return table


def hash_of(text: str) -> int:
    """64 bits of BLAKE2: among three million texts, two collide by chance in one of four million corpora."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def write_table(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_table(file: Path) -> pa.Table:
    # Read, not memory-mapped: mapped pages count as used memory until the system reclaims them.
    with pa.OSFile(str(file)) as source:
        return pa.ipc.open_file(source).read_all()
