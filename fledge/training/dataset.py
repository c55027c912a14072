"""What train_sft.py trains on: a folder of prepare_dataset.py, or a table of instructions and answers as it stands."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from fledge.encoding import IGNORED, Encoded, encode, encode_rejected, open_prepared
from fledge.errors import UserError
from fledge.messages import INPUT_MARK, Messages
from fledge.reading.files import Chunk, row_chunks
from fledge.reading.values import UNUSABLE_ROLES, as_messages, as_text
from fledge.templates import add_template, contents
from fledge.tokenizers.spelling import UNWRITABLE, Spelling, named

CONVERSATIONS = ("messages", "conversations")
PAIRS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"))
HELD_OUT = 0.05


def open_dataset(
    source: str, own: PreTrainedTokenizerBase, template: str | None, context: int, seed: int
) -> tuple[dict | None, PreTrainedTokenizerBase, DatasetDict, list[str]]:
    """The budget (of a prepared folder), the tokenizer with the template, encoded splits, and lines that say more.

    A table is a file or folder of JSON lines, CSV or parquet, or a dataset of the Hub, with the columns `messages` (or
    ShareGPT's `conversations`), or `instruction` and `response` or `output` (and `input`), or `prompt` and
    `completion`. It is encoded by the base's `own` tokenizer with its chat template, or with `template`. Rows that
    cannot be used are left out, and the lines say how many and why. Without a validation split a twentieth of the rows
    becomes one.

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
    """Whether `source` is a folder of prepare_dataset.py, or what is left of one."""
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
    conversations: dict[str | None, list[tuple[Messages, str | None]]] = {}
    left_out: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    spelling = Spelling(tokenizer)
    for chunk in row_chunks(source):
        for messages, rejected in read(chunk):
            if reason := why_unusable(messages, rejected):
                left_out[reason] += 1
            elif missing := spelling.missing(contents(messages) + (rejected or "")):
                left_out[UNWRITABLE] += 1
                lacking.update(missing)
            else:
                conversations.setdefault(chunk.split, []).append((messages, rejected))
    if lacking:
        left_out[f"{UNWRITABLE}: {named(lacking)}"] = left_out.pop(UNWRITABLE)
    rows = DatasetDict()
    for split, of_split in conversations.items():
        encoded = [
            example
            for begin in range(0, len(of_split), 1000)
            for example in _encoded(tokenizer, of_split[begin : begin + 1000])
        ]
        kept = [example.row for example in encoded if len(example) <= context]
        left_out[f"longer than {context} tokens"] += len(encoded) - len(kept)
        if kept:
            rows[split or "train"] = Dataset.from_list(kept)
    reasons = [f"left out {count:,} ({reason})" for reason, count in left_out.most_common() if count]
    if (usable := sum(map(len, rows.values()))) < 2:
        why = "".join(f", {reason}" for reason in reasons)
        raise UserError(f"{source} has {usable} rows to train on{why}; give at least two, of which one is held out.")
    rows = _with_validation(rows, seed)
    counts = [f"{len(split):,} in {name}" for name, split in rows.items()]
    return rows, [f"Rows: {', '.join([*counts, *reasons])}"]


def _encoded(tokenizer: PreTrainedTokenizerBase, conversations: list[tuple[Messages, str | None]]) -> list[Encoded]:
    encoded = encode(tokenizer, [messages for messages, _ in conversations])
    rejected = [answer for _, answer in conversations if answer is not None]
    if rejected:
        encode_rejected(tokenizer, encoded, rejected, [True] * len(rejected))
    return encoded


def _with_validation(rows: DatasetDict, seed: int) -> DatasetDict:
    train = rows.get("train") or next(iter(rows.values()))
    held_out = next((rows[name] for name in ("validation", "test") if name in rows and rows[name] is not train), None)
    if held_out is None:
        parts = train.train_test_split(max(1, round(HELD_OUT * len(train))), seed=seed)
        train, held_out = parts["train"], parts["test"]
    return DatasetDict({"train": train, "validation": held_out})


def longest_row(rows: DatasetDict) -> int:
    """In tokens. From Arrow's own lengths: no row is turned into Python's integers."""
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
    """TRL's prompts and completions are texts or messages."""
    is_messages = isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0])
    return as_messages(value, where) if is_messages else [{"role": role, "content": as_text(value, where)}]


def why_unusable(messages: Messages, rejected: str | None = None) -> str | None:
    """Why a conversation teaches no answer, or no preference to a `rejected` one, if it does not."""
    roles = [message["role"] for message in messages]
    for role, why in UNUSABLE_ROLES.items():
        if role in roles:
            return why
    if "user" not in roles or roles[-1] != "assistant":
        return "it does not end with an answer to a question"
    if not all(message["content"] for message in messages if message["role"] != "system"):
        return "a question or an answer is empty"
    if messages[-1]["content"] == rejected:
        return "chosen and rejected are the same"
    return None


def cut_rows(rows: DatasetDict, max_length: int | None) -> list[str]:
    """A line about the training rows that `max_length` will cut, if there are any.

    Raises:
        UserError: it leaves nothing to learn.
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
    """Refuses data that would train nothing.

    Raises:
        UserError: a column is missing, or no token of a split is supervised.
    """
    for name, split in rows.items():
        missing = {"input_ids", "labels"} - set(split.column_names)
        if missing:
            raise UserError(f"The {name} split lacks {' and '.join(sorted(missing))}; run prepare_dataset.py again.")
        if all(label == IGNORED for labels in split["labels"] for label in labels):
            raise UserError(f"No token of the {name} split is supervised; run prepare_dataset.py again.")
