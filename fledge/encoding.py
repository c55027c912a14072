"""Conversations → `input_ids` and `labels`.

Prompt and completion are encoded separately and concatenated, so the boundary is exact and training sees the ids that
inference sends: byte-level BPE would otherwise merge across it. End-of-text is supervised on every complete answer and
never on a truncated one. A control token in somebody's text is encoded as plain text.
"""

import bisect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.messages import INPUT_MARK, Messages
from fledge.tokenizers import open_tokenizer
from fledge.tokenizers.fast import TextEncoder

IGNORED = -100
MOST_NAMED = 10  # values of a column, in a message
OVERFLOW_POLICIES = ("drop", "cut_prompt", "cut_completion")


@dataclass
class Encoded:
    """Token ids of one example; the last `completion_length` of them are its last answer.

    `labels` are the ids of the answers, and `IGNORED` elsewhere. A truncated answer has no end-of-text. `unlearned` is
    the number of earlier answers that are not supervised, because the conversation does not contain their exact ids. A
    preference pair also has the `rejected_ids` of another answer to the same prompt; its length is that of the longer
    one.
    """

    input_ids: list[int]
    labels: list[int]
    completion_length: int
    was_cut: bool = False
    rejected_ids: list[int] | None = None
    unlearned: int = 0

    def __len__(self) -> int:
        longer = max(self.completion_length, len(self.rejected_ids or ()))
        return len(self.input_ids) - self.completion_length + longer

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: -self.completion_length]

    @property
    def completion_ids(self) -> list[int]:
        return self.input_ids[-self.completion_length :]

    @property
    def row(self) -> dict[str, list[int]]:
        pair = {} if self.rejected_ids is None else {"rejected_ids": self.rejected_ids}
        return {"input_ids": self.input_ids, "labels": self.labels, **pair}


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, asks: bool = True) -> str:
    """The prompt for the next answer as text, by the tokenizer's chat template; only the conversation if not `asks`.

    Raises:
        UserError: the template refuses the conversation.
    """
    return _render(tokenizer, [messages], asks)[0]


def _render(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], asks: bool = True) -> list[str]:
    """Templates of other models may refuse a conversation, such as one with a system message."""
    try:
        rendered = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=asks)
    except TemplateError as error:
        raise UserError(
            f"The model's chat template cannot write this conversation: {' '.join(str(error).split())}; change it, or "
            "train with another --template."
        ) from error
    return cast(list[str], rendered)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The prompt for the next answer as ids: those of `pipeline()`, except that control tokens in a text stay text."""
    return _encode_prompts(tokenizer, [messages], TextEncoder(tokenizer, fast=False))[0]


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], encoder: TextEncoder | None = None
) -> list[Encoded]:
    """Encodes a batch of conversations, each of which ends with an answer. Nothing is truncated here.

    All answers of a conversation are supervised, each with end-of-text. An earlier answer is supervised only if the
    later prompt contains exactly the ids that would have been generated. If answers follow a special token, this always
    holds.
    """
    turns = [[i for i, m in enumerate(messages) if m["role"] == "assistant"] for messages in conversations]
    asked = [messages[:i] for messages, places in zip(conversations, turns, strict=True) for i in places]
    answers = [messages[i]["content"] for messages, places in zip(conversations, turns, strict=True) for i in places]
    if not conversations:
        return []
    encoder = encoder or TextEncoder(tokenizer, fast=False)
    prompt_ids = iter(_encode_prompts(tokenizer, asked, encoder))
    answer_ids = iter(encoder(answers))
    encoded = []
    for places in turns:
        pairs = [(next(prompt_ids), [*next(answer_ids), tokenizer.eos_token_id]) for _ in places]
        prompt, completion = pairs[-1]
        labels, unlearned = [IGNORED] * len(prompt) + completion, len(pairs) - 1
        for earlier, answer in pairs[:-1]:
            begin, end = len(earlier), len(earlier) + len(answer)
            if prompt[:end] == earlier + answer:
                labels[begin:end] = answer
                unlearned -= 1
        encoded.append(Encoded(prompt + completion, labels, len(completion), unlearned=unlearned))
    return encoded


def encode_rejected(
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[Encoded],
    rejected: list[str],
    stopped: list[bool],
    encoder: TextEncoder | None = None,
) -> None:
    """Turns `encoded` examples into pairs: each gets the ids of a rejected answer, encoded as `encode` does.

    An answer that did not stop by itself has no end-of-text.
    """
    encoder = encoder or TextEncoder(tokenizer, fast=False)
    for example, ids, ended in zip(encoded, encoder(rejected) if rejected else [], stopped, strict=True):
        example.rejected_ids = [*ids, *([tokenizer.eos_token_id] if ended else [])]


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], encoder: TextEncoder
) -> list[list[int]]:
    ids = encoder(_render(tokenizer, conversations), control=True)
    for place, messages in enumerate(conversations):
        if any(encoder.control.search(message["content"]) for message in messages):
            alone = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
            ids[place] = cast(list[int], alone)
    return ids


def prompt_length(labels: list[int]) -> int:
    """The number of ids before the last supervised answer of a row."""
    begin = len(labels)
    while begin and labels[begin - 1] == IGNORED:
        begin -= 1
    while begin and labels[begin - 1] != IGNORED:
        begin -= 1
    return begin


def marked(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int], begin: str, end: str) -> str:
    """The text of a row with `begin` and `end` around each run of supervised tokens."""
    text = ""
    for is_supervised, run in groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        part = cast(str, tokenizer.decode([token for token, _ in run]))
        text += f"{begin}{part}{end}" if is_supervised else part
    return text


def fit(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    whole: Encoded,
    max_length: int,
    overflow: str,
    may_cut: bool = True,
) -> tuple[Messages, Encoded] | None:
    """Applies an overflow policy to an example that is longer than `max_length`; returns `None` if it is dropped.

    - `drop`: the example is dropped.
    - `cut_prompt`: the end of the text in the prompt (after `INPUT_MARK`) is cut, by whole words. Without such a text,
      the oldest turns of the conversation are dropped. The question is never shortened. If that is not enough, the
      example is dropped. The returned messages are the shortened ones, and the ids match them.
    - `cut_completion`: the text is cut as above if that is enough; else the end of the answer is cut, and with it its
      end-of-text.

    Without the task's permission (`may_cut`) no prompt is cut.
    """
    excess = len(whole) - max_length
    if excess <= 0:
        return messages, whole
    if may_cut and (overflow == "cut_prompt" or (overflow == "cut_completion" and _text_at(messages) is not None)):
        shortened = _cut_text(tokenizer, messages, max_length) or _cut_turns(tokenizer, messages, max_length)
        if shortened:
            return shortened
    if overflow == "cut_completion" and excess < whole.completion_length:
        ids, labels, length = whole.input_ids[:-excess], whole.labels[:-excess], whole.completion_length - excess
        return messages, Encoded(ids, labels, length, was_cut=True, unlearned=whole.unlearned)
    return None


def shortest(messages: Messages) -> Messages:
    """The most that a cut can remove: all but one word of the longest text, or all turns but the last."""
    place = _text_at(messages)
    if place is None:
        return list(_turns(messages))[-1]
    before, mark, text = messages[place]["content"].rpartition(INPUT_MARK)
    return _with_content(messages, place, before + mark + text.split(maxsplit=1)[0])


def _text_at(messages: Messages) -> int | None:
    """The index of the message with the longest text to work on; `None` if no message has one."""
    lengths = {}
    for place, message in enumerate(messages):
        if message["role"] == "user":
            text = message["content"].rpartition(INPUT_MARK)[2] if INPUT_MARK in message["content"] else ""
            if text.strip():
                lengths[place] = len(text)
    return max(lengths, key=lambda place: lengths[place], default=None)


def _turns(messages: Messages) -> Iterator[Messages]:
    """Yields the conversation, then without its oldest turn, and so on. The system message stays."""
    begins = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for begin in begins:
        yield [*messages[: begins[0]], *messages[begin:]]


def _with_content(messages: Messages, place: int, content: str) -> Messages:
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


def _cut_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int
) -> tuple[Messages, Encoded] | None:
    """Keeps as many words of the longest text as fit, at least one."""
    place = _text_at(messages)
    if place is None:
        return None
    before, mark, given = messages[place]["content"].rpartition(INPUT_MARK)

    def encoded_with(text: str) -> tuple[Messages, Encoded]:
        shortened = _with_content(messages, place, before + mark + text)
        (encoded,) = encode(tokenizer, [shortened])
        encoded.was_cut = True
        return shortened, encoded

    text, count, _ = fitting_words(given, max_length, lambda text: len(encoded_with(text)[1]))
    return encoded_with(text) if count else None


def _cut_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int
) -> tuple[Messages, Encoded] | None:
    """Drops as few of the oldest turns as necessary; none if a message has a text, because later turns need it."""
    if _text_at(messages) is not None:
        return None
    for shortened in list(_turns(messages))[1:]:
        (encoded,) = encode(tokenizer, [shortened])
        if len(encoded) <= max_length:
            encoded.was_cut = True
            return shortened, encoded
    return None


def fitting_words(text: str, max_length: int, length: Callable[[str], int]) -> tuple[str, int, int]:
    """The longest beginning of `text`, in whole words, that fits `max_length`; its number of words, and that of `text`.

    `length` measures a text and grows with its words. The beginning is empty if not even the first word fits.
    """
    ends = [0, *(word.end() for word in re.finditer(r"\S+", text))]
    count = bisect.bisect_right(range(1, len(ends)), max_length, key=lambda words: length(text[: ends[words]]))
    return text[: ends[count]], count, len(ends) - 1


def open_prepared(folder: Path) -> tuple[dict, PreTrainedTokenizerBase, DatasetDict]:
    """Opens a folder of prepare_dataset.py: its budget, the tokenizer with the template, and the encoded splits.

    Raises:
        UserError: a part is missing or damaged.
    """
    budget = read_json(folder / "budget.json", "prepare_dataset.py")
    if not (folder / "tokenized").exists():  # a model keeps a budget.json too
        raise UserError(
            f"{folder} has no tokenized/; name what prepare_dataset.py wrote, or run prepare_dataset.py again."
        )
    try:
        rows = load_from_disk(str(folder / "tokenized"))
    except Exception as error:  # pyarrow and datasets raise many kinds of errors for a damaged file
        raise UserError(f"{folder / 'tokenized'} cannot be opened; run prepare_dataset.py again.") from error
    return budget, open_tokenizer(folder / "tokenizer"), rows


def with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `messages`, made from `instruction` and `response`, or `prompt` and `chosen`, if necessary."""
    if "messages" in row:
        return row
    if "chosen" in row:
        return {"messages": row.pop("prompt") + row.pop("chosen"), **row}
    pair = (("user", row.pop("instruction")), ("assistant", row.pop("response")))
    return {"messages": [{"role": role, "content": content} for role, content in pair], **row}


def numbers_of(rows: list[dict[str, Any]], only: Sequence[str]) -> list[int]:
    """The numbers of the rows that meet every condition of `only`, such as `kind=words`.

    A column that holds a list meets a condition if the value is in it.

    Raises:
        UserError: a condition is not COLUMN=VALUE, there is no such column, or no row meets all conditions.
    """
    columns = sorted({column for row in rows for column in row} - {"messages", "group"})
    numbers = list(range(len(rows)))
    for condition in only:
        column, wanted = condition_of(condition, columns, "the dataset's columns are")
        values = {number: _values(rows[number].get(column)) for number in numbers}
        numbers = [number for number in numbers if wanted in values[number]]
        if not numbers:
            found = sorted(set().union(*values.values()))
            named = ", ".join(found[:MOST_NAMED]) + (", …" if len(found) > MOST_NAMED else "")
            raise UserError(f"No row meets --only {condition}; its values of {column}: {named or 'none'}.")
    return numbers


def condition_of(text: str, columns: Collection[str], known: str) -> tuple[str, str]:
    """The column and the value of a condition COLUMN=VALUE of --only.

    Raises:
        UserError: it is none, or there is no such column; `known` begins the list of those that there are.
    """
    column, separator, wanted = text.partition("=")
    if not separator or column not in columns:
        raise UserError(f"--only {text} is no COLUMN=VALUE; {known} {', '.join(sorted(columns)) or 'none'}.")
    return column, wanted


def meets(row: dict[str, Any], only: Sequence[str]) -> bool:
    """Whether a row meets every condition of `only`. Its columns are known."""
    return all(wanted in _values(row[column]) for column, _, wanted in (one.partition("=") for one in only))


def _values(cell: object) -> set[str]:
    return {str(value) for value in (cell if isinstance(cell, list) else [cell]) if value is not None}


def open_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: `messages` and the task's columns, class labels as their names.

    Raises:
        UserError: a file is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    splits = {}
    for name in read_json(folder / "budget.json", "prepare_dataset.py", splits=dict)["splits"]:
        files = sorted((folder / "data").glob(f"{name}-*-of-*.parquet"))
        try:
            rows = Dataset(pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files]))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{folder / 'data'} cannot be opened; run prepare_dataset.py again.") from error
        splits[name] = [with_messages(row) for row in rows.to_list()]
        for column, feature in rows.features.items():
            if isinstance(feature, ClassLabel):
                for row in splits[name]:
                    row[column] = feature.names[row[column]]
    return splits
