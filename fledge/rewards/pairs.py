"""The data of train_dpo.py: pairs of prepare_dataset.py, or a table of prompt, chosen and rejected."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from fledge.encoding import open_prepared, prompt_length
from fledge.errors import UserError
from fledge.messages import Messages
from fledge.reading.files import Chunk
from fledge.rewards.configuration import check_template
from fledge.training.dataset import is_prepared, open_table, part_of

ANSWERS = ("chosen", "rejected")


def open_pairs(
    source: str, own: PreTrainedTokenizerBase, context: int, seed: int
) -> tuple[dict | None, PreTrainedTokenizerBase, DatasetDict, list[str]]:
    """Returns the budget (of a prepared folder), the tokenizer, encoded splits, and lines to print.

    A row has the `input_ids` and `labels` of the chosen answer, and `rejected_ids`. A table is a file or folder of
    JSON lines, CSV or parquet, or a dataset of the Hub, with the columns `prompt`, `chosen` and `rejected`, each a text
    or messages, or without `prompt` if the other two are whole conversations. It is encoded by the model's `own`
    tokenizer with its chat template, and a part of it is held out as `open_dataset` does.

    Raises:
        UserError: it cannot be opened, holds no pairs, was prepared for another model, or a row's chosen and rejected
            answers are to different prompts.
    """
    if not is_prepared(source):
        check_template(own, own)
        return None, own, *open_table(source, own, context, seed, pairs_of)
    budget, tokenizer, rows = open_prepared(Path(source))
    if any("rejected_ids" not in split.column_names for split in rows.values()):
        raise UserError(
            f"{source} holds answers without rejected ones, on which train_sft.py trains; make pairs of a model's own "
            "answers with prepare_dataset.py --source answers."
        )
    return budget, tokenizer, rows, []


def pairs_of(chunk: Chunk) -> Iterator[tuple[Messages, str]]:
    """The rows of a table: the conversation that ends with the chosen answer, and the rejected one.

    Raises:
        UserError: the columns are others, a value is neither text nor messages, or the prompts differ.
    """
    columns = list(chunk.rows[0])
    if not set(ANSWERS) <= set(columns):
        raise UserError(
            f"{chunk.origin} has the columns {', '.join(columns)}; give prompt, chosen and rejected, each a text or "
            "messages."
        )
    for number, row in enumerate(chunk.rows, chunk.first_row):
        where = f"{chunk.origin}, row {number}, column"
        chosen, rejected = (part_of(row.get(name), "assistant", f"{where} {name}") for name in ANSWERS)
        asked = part_of(row["prompt"], "user", f"{where} prompt") if "prompt" in columns else chosen[:-1]
        if not asked:
            raise UserError(f"{where} chosen has no prompt; give a column prompt, or conversations that begin with it.")
        for name, answer in zip(ANSWERS, (chosen, rejected), strict=True):
            # An answer alone, or the whole conversation that it ends.
            if not answer or (answer[:-1] != asked and (len(answer) > 1 or "prompt" not in columns)):
                raise UserError(f"{where} {name} answers another prompt; a pair is two answers to the same one.")
        if rejected[-1]["role"] != "assistant":
            raise UserError(f"{where} rejected ends with a message of the {rejected[-1]['role']}, not with an answer.")
        yield [*asked, chosen[-1]], rejected[-1]["content"]


def longest_pair(rows: DatasetDict) -> int:
    """The longest prompt with an answer, chosen or rejected, in tokens."""
    return max(max(lengths_of(split)) for split in rows.values())


def lengths_of(rows: Dataset) -> list[int]:
    """The length of the longer conversation of each pair, in tokens."""
    answered = zip(rows["labels"], rows["rejected_ids"], strict=True)
    return [max(len(labels), prompt_length(labels) + len(rejected)) for labels, rejected in answered]


def cut_pairs(rows: DatasetDict, max_length: int | None) -> list[str]:
    """A line about the training pairs that `max_length` will cut, if there are any.

    Raises:
        UserError: it leaves nothing to learn.
    """
    if max_length is None:
        return []
    lengths, prompts = lengths_of(rows["train"]), list(map(prompt_length, rows["train"]["labels"]))
    if all(prompt >= max_length for prompt in prompts):
        raise UserError(f"--max_length {max_length} cuts the answers off every pair; give more.")
    cut = sum(length > max_length for length in lengths)
    return [f"Pairs cut {cut:,} of {len(lengths):,} by max_length {max_length}, with their end-of-text"] if cut else []
