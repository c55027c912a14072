"""Prompt and completion → `input_ids` and `labels`.

The two are encoded apart and concatenated, so the boundary is exact and training sees the ids that inference sends:
byte-level BPE would otherwise merge across it. End-of-text is supervised on every complete answer, never on a cut one.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict, load_from_disk
from transformers import PreTrainedTokenizerBase

from fledge.cli import UserError, read_json
from fledge.tokenizers import open_tokenizer

IGNORED = -100
OVERFLOW_POLICIES = ("drop", "cut_prompt", "cut_completion")


@dataclass
class Encoded:
    """Token ids of one example; `completion_ids` ends with end-of-text unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]
    was_cut: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def row(self) -> dict[str, list[int]]:
        return {
            "input_ids": self.prompt_ids + self.completion_ids,
            "labels": [IGNORED] * len(self.prompt_ids) + self.completion_ids,
        }


def prompt_text(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    """The text that asks for an answer to `instruction`, by the tokenizer's own chat template."""
    messages = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, instructions: list[str], responses: list[str]) -> list[Encoded]:
    """Encodes a batch, whole: nothing is cut here."""
    prompts = [prompt_text(tokenizer, instruction) for instruction in instructions]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    # A control token that stands in an answer is text, and must not end it half-way.
    completion_ids = tokenizer(responses, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [
        Encoded(prompt, [*completion, tokenizer.eos_token_id])
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]


def fit(example: Encoded, max_length: int, overflow: str) -> Encoded | None:
    """Applies an overflow policy; `None` when the example has to go.

    drop            an example longer than `max_length` goes.
    cut_prompt      its prompt loses its beginning, so that the answer stays whole; it goes if that is not enough.
    cut_completion  its answer loses its end, and with it its end-of-text.
    """
    excess = len(example) - max_length
    if excess <= 0:
        return example
    if overflow == "cut_prompt" and excess < len(example.prompt_ids):
        return Encoded(example.prompt_ids[excess:], example.completion_ids, was_cut=True)
    if overflow == "cut_completion" and excess < len(example.completion_ids):
        return Encoded(example.prompt_ids, example.completion_ids[:-excess], was_cut=True)
    return None


def open_prepared(folder: Path) -> tuple[dict, PreTrainedTokenizerBase, DatasetDict]:
    """What prepare_dataset.py wrote: its budget, the tokenizer with the template, and the encoded splits.

    Raises:
        UserError: a part is missing or damaged.
    """
    budget = read_json(folder / "budget.json", "prepare_dataset.py")
    try:
        rows = load_from_disk(str(folder / "tokenized"))
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged file
        raise UserError(f"{folder / 'tokenized'} cannot be opened; run prepare_dataset.py again.") from error
    return budget, open_tokenizer(folder / "tokenizer"), rows
