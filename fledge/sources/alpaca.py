"""Alpaca's form (Taori et al. 2023): `instruction`, `input` (empty in most records) and `output`.

Much data by others has it too, so the licence is not assumed.
"""

from collections.abc import Iterator

from fledge.reading.files import Chunk
from fledge.sources.columns import parse_form

LICENSE = None
END = None
FORMS = ({"instruction": "instruction", "input": "input", "response": "output"},)


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict]:
    return parse_form(chunk, FORMS)
