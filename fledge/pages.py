"""Where the templates of what people look at are, and how one is opened: cards, the report, the Space."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# In the package of a wheel; at the root of a checkout.
MODEL_CARD = next(place / "model_card" for place in Path(__file__).parents[:2] if (place / "model_card").is_dir())

FLEDGE_PAGE = "https://pypi.org/project/fledge-gpt/"


def open_templates(**settings: Any) -> Environment:
    """Opens the templates of `model_card/`; a name that one asks for and nobody gives is an error, never a blank."""
    loader = FileSystemLoader(MODEL_CARD)
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **settings)
