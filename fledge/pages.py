"""Finds and opens the templates of cards, the report and the Space."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Inside the package if installed from a wheel, else at the root of a checkout.
MODEL_CARD = next(place / "model_card" for place in Path(__file__).parents[:2] if (place / "model_card").is_dir())

FLEDGE_PAGE = "https://pypi.org/project/fledge-gpt/"


def open_templates(**settings: Any) -> Environment:
    """Opens the templates of `model_card/`. An undefined name in a template is an error, never an empty text."""
    loader = FileSystemLoader(MODEL_CARD)
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **settings)
