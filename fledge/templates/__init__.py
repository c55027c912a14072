"""Prompt styles as Jinja chat templates. They are saved with the tokenizer, so every later stage uses the same one."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fledge.cli import UserError

FOLDER = Path(__file__).parent

# An instruction that comes with a text to work on is one message: f"{instruction}{INPUT_MARK}{input}". `alpaca` writes
# the mark as it stands, the others write a line break for it.
INPUT_MARK = "\n\n### Input:\n"

# Tokens that a template writes and that its tokenizer therefore needs. prepare_dataset.py adds them.
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {"story_chat": ("<|system|>", "<|user|>", "<|assistant|>")}


def load_template(name: str) -> str:
    """The Jinja source of a template by name.

    Raises:
        UserError: there is none of that name.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.jinja"))
    if name not in names:
        raise UserError(f"The template {name!r} is unknown; choose one of {', '.join(names)}.")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def add_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives the tokenizer a template and the tokens that it writes, end-of-text among them, if they are missing.

    A tokenizer that grows is longer than the model's vocabulary; training then adds the rows.
    """
    template = load_template(name)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(SPECIAL_TOKENS.get(name, ()))}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = template
