"""Prompt styles as Jinja chat templates. They are saved with the tokenizer, so every later stage uses the same one."""

from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from fledge.errors import UserError
from fledge.messages import INPUT_MARK
from fledge.tokenizers.spelling import Spelling

FOLDER = Path(__file__).parent

# Special tokens that a template needs. prepare_dataset.py adds them to the tokenizer.
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {"story_chat": ("<|system|>", "<|user|>", "<|assistant|>")}


# An empty conversation, rendered, shows the template's own characters.
SILENCE = [{"role": role, "content": ""} for role in ("user", "assistant")]


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def load_template(name: str) -> str:
    """The Jinja source of a template by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in names():
        raise UserError(f"The template {name!r} is unknown; choose one of {', '.join(names())}.")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def add_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives the tokenizer a template and the tokens that it writes, end-of-text among them, if they are missing.

    The tokenizer may then have more tokens than the model has rows; training adds the rows.

    Raises:
        UserError: there is no template of that name, or the vocabulary lacks characters that it writes.
    """
    template = load_template(name)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if missing := _unwritable(tokenizer, name):
        writable = [other for other in names() if not _unwritable(tokenizer, other)]
        raise UserError(
            f"The template {name} writes {', '.join(map(repr, missing))}, which the vocabulary lacks; --template takes "
            f"what it can write: {', '.join(writable) or 'none of them, so use a base with a larger vocabulary'}."
        )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(SPECIAL_TOKENS.get(name, ()))}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = template


def _unwritable(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """The characters that the template itself writes and a closed vocabulary lacks."""
    rendered = tokenizer.apply_chat_template(
        SILENCE, chat_template=load_template(name), tokenize=False, add_generation_prompt=True
    )
    text = cast(str, rendered)
    for token in (*SPECIAL_TOKENS.get(name, ()), *tokenizer.added_tokens_encoder):
        text = text.replace(token, "")
    return Spelling(tokenizer).missing(text)


def contents(messages: list[dict[str, str]]) -> str:
    """The text of all messages, for `Spelling`. The mark of an input is a line break in most templates."""
    return "".join(message["content"].replace(INPUT_MARK, "\n") for message in messages)
