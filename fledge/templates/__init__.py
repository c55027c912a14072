"""Prompt styles as Jinja chat templates. They are saved with the tokenizer, so every later stage uses the same one."""

from pathlib import Path

from fledge.cli import UserError

FOLDER = Path(__file__).parent


def load_template(name: str) -> str:
    """The Jinja source of a template by name.

    Raises:
        UserError: there is none of that name.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.jinja"))
    if name not in names:
        raise UserError(f"The template {name!r} is unknown; choose one of {', '.join(names)}.")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
