"""What train_sft.py trains on: a folder of prepare_dataset.py, or a table of instructions and answers as it stands."""

import copy
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from fledge.cli import UserError
from fledge.encoding import IGNORED, Messages, encode, open_prepared
from fledge.templates import add_template
from fledge.tokenizers import encoding_of

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
PAIRS = (("instruction", "response"), ("prompt", "completion"))
HELD_OUT = 0.05


def open_dataset(
    source: str, own: PreTrainedTokenizerBase, template: str | None, context: int, seed: int
) -> tuple[dict | None, PreTrainedTokenizerBase, DatasetDict, list[str]]:
    """The budget (of a prepared folder), the tokenizer with the template, encoded splits, and lines that say more.

    A table is a file or folder of JSON lines, CSV or parquet, or a dataset of the Hub, with the columns `messages`, or
    `instruction` and `response`, or `prompt` and `completion`. It is encoded by the base's `own` tokenizer with its
    chat template, or with `template`; rows longer than `context` tokens are left out. Without a validation split a
    twentieth of the rows becomes one.

    Raises:
        UserError: it cannot be opened, has none of these columns, or no row can be used.
    """
    path = Path(source)
    if (path / "budget.json").exists() or (path / "tokenized").exists():
        return *open_prepared(path), []
    try:
        found = load_dataset(FORMATS[path.suffix], data_files=source) if path.is_file() else load_dataset(source)
    except Exception as error:  # datasets raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} is neither a folder that prepare_dataset.py wrote nor a dataset that opens ({reason})."
        ) from error
    splits = {"train": found["train"]} if "train" in found else {"train": next(iter(found.values()))}
    held_out = next((found[name] for name in ("validation", "valid", "dev", "test") if name in found), None)
    if held_out is None and len(splits["train"]) > 1:
        parts = splits["train"].train_test_split(max(1, round(HELD_OUT * len(splits["train"]))), seed=seed)
        splits["train"], held_out = parts["train"], parts["test"]
    if held_out is not None:
        splits["validation"] = held_out
    tokenizer = copy.deepcopy(own)
    if template or tokenizer.chat_template is None:
        add_template(tokenizer, template or "alpaca")
    rows, lines = DatasetDict(), []
    for name, table in splits.items():
        conversations = conversations_of(table, source)
        encoded = []
        for begin in range(0, len(conversations), 1000):
            with encoding_of(f"A row of {source}"):
                encoded += encode(tokenizer, conversations[begin : begin + 1000])
        kept = [example.row for example in encoded if len(example) <= context]
        if not kept:
            raise UserError(f"No row of the {name} split of {source} fits in the model's context of {context} tokens.")
        rows[name] = Dataset.from_list(kept)
        longer = len(encoded) - len(kept)
        lines.append(f"Rows {len(kept):,} in {name}; {longer:,} longer than {context} tokens left out")
    return None, tokenizer, rows, lines


def longest_row(rows: DatasetDict) -> int:
    """In tokens. From Arrow's own lengths: no row is turned into Python's integers."""
    return max(pc.max(pc.list_value_length(split.data.column("input_ids"))).as_py() for split in rows.values())


def conversations_of(table: Dataset, source: str) -> list[Messages]:
    """The rows of a table as messages, the last of which is an answer.

    Raises:
        UserError: the columns are others, or a conversation holds no answer.
    """
    columns = set(table.column_names)
    if "messages" in columns:
        conversations = table["messages"]
    else:
        pair = next((pair for pair in PAIRS if columns.issuperset(pair)), None)
        if pair is None:
            raise UserError(
                f"{source} has the columns {', '.join(sorted(columns))}; give messages, instruction and response, or "
                "prompt and completion, or name yours with prepare_dataset.py --source columns."
            )
        asked, answered = (table[column] for column in pair)
        conversations = [
            as_messages(question, "user") + as_messages(answer, "assistant")
            for question, answer in zip(asked, answered, strict=True)
        ]
    for number, messages in enumerate(conversations):
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"Row {number} of {source} does not end with an answer of the assistant; mend it.")
    return [[{"role": m["role"], "content": m["content"]} for m in messages] for messages in conversations]


def as_messages(part: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": part}] if isinstance(part, str) else part


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
