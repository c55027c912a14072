"""The data of train_sft.py: a folder of prepare_dataset.py, or a table of instructions and answers."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from fledge.encoding import IGNORED, Encoded, encode, encode_rejected, open_prepared
from fledge.errors import UserError
from fledge.messages import INPUT_MARK, Messages
from fledge.preparation.curation import apart, repeated, split_by_group
from fledge.preparation.reasons import DUPLICATE
from fledge.preparation.tables import hash_of
from fledge.reading.files import SPLITS, Chunk, row_chunks
from fledge.reading.values import as_messages, as_text, why_unusable
from fledge.templates import add_template, contents
from fledge.tokenizers.spelling import UNWRITABLE, Spelling, named, unknown_id

CONVERSATIONS = ("messages", "conversations")
PAIRS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"))
HELD_OUT = 0.05
SAME = "chosen and rejected are the same"


def open_dataset(
    source: str, own: PreTrainedTokenizerBase, template: str | None, context: int, seed: int
) -> tuple[dict | None, PreTrainedTokenizerBase, DatasetDict, list[str]]:
    """Returns the budget (of a prepared folder), the tokenizer with its template, encoded splits, and lines to print.

    A table is a file or folder of JSON lines, CSV or parquet, or a dataset on the Hub, with the columns `messages` (or
    ShareGPT's `conversations`), or `instruction` and `response` or `output` (and `input`), or `prompt` and
    `completion`. It is encoded by the base's `own` tokenizer with its chat template, or with `template`. Rows that
    cannot be used and exact duplicates are left out, and the lines say how many and why. `divide` says what is held
    out.

    Raises:
        UserError: it cannot be opened, has none of these columns, a value is no text, or too few rows can be used.
    """
    if is_prepared(source):
        return *open_prepared(Path(source)), []
    tokenizer = copy.deepcopy(own)
    if template or tokenizer.chat_template is None:
        add_template(tokenizer, template or "alpaca")

    def read(chunk: Chunk) -> Iterator[tuple[Messages, None]]:
        return ((messages, None) for messages in conversations_of(chunk))

    return None, tokenizer, *open_table(source, tokenizer, context, seed, read)


def is_prepared(source: str) -> bool:
    """Whether `source` is a folder of prepare_dataset.py, complete or not."""
    return (Path(source) / "budget.json").exists() or (Path(source) / "tokenized").exists()


def open_table(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seed: int,
    read: Callable[[Chunk], Iterator[tuple[Messages, str | None]]],
) -> tuple[DatasetDict, list[str]]:
    """The encoded splits of a table, and lines that say what was left out.

    `read` yields the conversations of a chunk of rows, each with a rejected answer if they are pairs.

    Raises:
        UserError: it cannot be opened, or too few rows can be used; and what `read` raises.
    """
    examples: list[tuple[str, Messages, str | None]] = []
    left_out: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    spelling = Spelling(tokenizer)
    for chunk in row_chunks(source):
        for messages, rejected in read(chunk):
            if reason := why_unusable(messages) or (SAME if messages[-1]["content"] == rejected else None):
                left_out[reason] += 1
            elif missing := spelling.missing(contents(messages) + (rejected or "")):
                left_out[UNWRITABLE] += 1
                lacking.update(missing)
            else:
                examples.append((chunk.split or "train", messages, rejected))
    if lacking:
        left_out[f"{UNWRITABLE}: {named(lacking)}"] = left_out.pop(UNWRITABLE)
    encoded = [
        example
        for begin in range(0, len(examples), 1000)
        for example in _encoded(tokenizer, examples[begin : begin + 1000])
    ]
    fitting = [number for number, example in enumerate(encoded) if len(example) <= context]
    left_out[f"longer than {context} tokens"] = len(encoded) - len(fitting)
    part_of_row = divide([examples[number] for number in fitting], seed)
    left_out[DUPLICATE.text] = int((part_of_row == -1).sum())
    parts = [[encoded[number].row for number in np.array(fitting, int)[part_of_row == part]] for part in (0, 1)]
    reasons = [f"left out {count:,} ({reason})" for reason, count in left_out.most_common() if count]
    if not all(parts):
        why = "".join(f", {reason}" for reason in reasons)
        raise UserError(
            f"{source} has {len(parts[0])} rows to train on{why}; give at least two, of which one is held out."
        )
    rows = DatasetDict({name: Dataset.from_list(part) for name, part in zip(SPLITS, parts, strict=False)})
    counts = [f"{len(split):,} in {name}" for name, split in rows.items()]
    lines = [f"Rows: {', '.join([*counts, *reasons])}"]
    unknown = unknown_id(tokenizer)
    if found := sum(unknown in row["labels"] + row.get("rejected_ids", []) for part in parts for row in part):
        lines.append(
            f"Unknown text: {found:,} of the rows have an answer with the token for it, which the model then learns to "
            "write; use a base with a larger vocabulary"
        )
    return rows, lines


def divide(examples: list[tuple[str, Messages, str | None]], seed: int) -> np.ndarray:
    """What becomes of each example (rows,): 0 trains, 1 is held out, -1 is an exact duplicate, 2 is in a third split.

    An example has its own split, a conversation, and a rejected answer if it is a pair. Of equal examples the one in
    the latest split stays. Of several splits the first trains and the second is held out. Otherwise a twentieth is held
    out: with its first question, which no other row then has, or by rows where all ask the same.
    """
    splits = np.array([SPLITS.index(split) for split, *_ in examples], int)
    fingerprints = np.array([hash_of(json.dumps(pair)) for _, *pair in examples], np.uint64)
    kept = apart(splits, fingerprints)
    kept[kept] = ~repeated(fingerprints[kept])
    own, parts = np.unique(splits, return_inverse=True)
    if len(own) == 1:
        groups = np.array([hash_of(first_question(messages)) for _, messages, _ in examples], np.uint64)
        if len(np.unique(groups[kept])) == 1:
            groups = fingerprints
        parts[kept] = split_by_group(groups[kept], {"train": 1 - HELD_OUT, "validation": HELD_OUT}, seed)
    return np.where(kept, parts, -1)


def first_question(messages: Messages) -> str:
    """Its words, without the spaces around them."""
    first = next(message["content"] for message in messages if message["role"] == "user")
    return " ".join(first.split())


def _encoded(tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, Messages, str | None]]) -> list[Encoded]:
    encoded = encode(tokenizer, [messages for _, messages, _ in examples])
    rejected = [answer for *_, answer in examples if answer is not None]
    if rejected:
        encode_rejected(tokenizer, encoded, rejected, [True] * len(rejected))
    return encoded


def longest_row(rows: DatasetDict) -> int:
    """The length of the longest row in tokens, from Arrow's list lengths: no row becomes a list of Python integers."""
    return max(pc.max(pc.list_value_length(split.data.column("input_ids"))).as_py() for split in rows.values())


def conversations_of(chunk: Chunk) -> Iterator[Messages]:
    """The rows of a table as messages.

    Raises:
        UserError: the columns are others, or a value is neither text nor messages.
    """
    columns = list(dict.fromkeys(name for row in chunk.rows for name in row))  # JSON may leave out what is empty
    whole = next((name for name in CONVERSATIONS if name in columns), None)
    pair = None if whole else next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
    if whole is None and pair is None:
        raise UserError(
            f"{chunk.origin} has the columns {', '.join(columns)}; give messages, instruction and response, or "
            "prompt and completion, or name yours with prepare_dataset.py --source columns."
        )
    for number, row in enumerate(chunk.rows, chunk.first_row):
        where = f"{chunk.origin}, row {number}, column"
        if pair is None:
            yield as_messages(row.get(str(whole)), f"{where} {whole}")
            continue
        asked, answered = (
            part_of(row.get(column), role, f"{where} {column}")
            for column, role in zip(pair, ("user", "assistant"), strict=True)
        )
        if given := as_text(row.get("input"), f"{where} input") if pair[0] == "instruction" else "":
            asked[-1]["content"] += INPUT_MARK + given
        yield asked + answered


def part_of(value: object, role: str, where: str) -> Messages:
    """The messages of a prompt or a completion, which TRL allows to be a text or messages."""
    is_messages = isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0])
    return as_messages(value, where) if is_messages else [{"role": role, "content": as_text(value, where)}]


def cut_rows(rows: DatasetDict, max_length: int | None) -> list[str]:
    """A line about the training rows that `max_length` will truncate, if there are any.

    Raises:
        UserError: no supervised token is left.
    """
    if max_length is None or longest_row(rows) <= max_length:
        return []
    labels = rows["train"]["labels"]
    cut = sum(len(row) > max_length for row in labels)
    empty = sum(all(label == IGNORED for label in row[1:max_length]) for row in labels)
    if empty == len(labels):
        raise UserError(f"--max_length {max_length} cuts the whole answer off every row; give more.")
    return [
        f"Rows cut {cut:,} of {len(labels):,} by max_length {max_length}, with their end-of-text; "
        f"{empty:,} of them keep nothing to learn"
    ]


def check_supervised(rows: DatasetDict) -> None:
    """Refuses data without supervised tokens.

    Raises:
        UserError: a column is missing, or no token of a split is supervised.
    """
    for name, split in rows.items():
        missing = {"input_ids", "labels"} - set(split.column_names)
        if missing:
            raise UserError(f"The {name} split lacks {' and '.join(sorted(missing))}; run prepare_dataset.py again.")
        if all(label == IGNORED for labels in split["labels"] for label in labels):
            raise UserError(f"No token of the {name} split is supervised; run prepare_dataset.py again.")
