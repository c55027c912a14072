"""Dolly (Conover et al. 2023): 15k instructions by people, with a text to work on in some of them, in eight categories.

The original names its columns `context` and `response`; copies in Alpaca's form say `input` and `output`.
"""

from collections.abc import Iterator

from fledge.reading.files import Chunk
from fledge.sources.columns import parse_form

LICENSE = "cc-by-sa-3.0"
END = None
FORMS = (
    {"instruction": "instruction", "input": "context", "response": "response", "category": "category"},
    {"instruction": "instruction", "input": "input", "response": "output", "category": "category"},
)


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict]:
    return parse_form(chunk, FORMS)
