"""Alpaca's form (Taori et al. 2023): `instruction`, `input` (empty in most records, or no column) and `output`.

Many other datasets have this form, so no licence is assumed.
"""

import re
from collections.abc import Iterator

from fledge.reading.files import Chunk
from fledge.sources.columns import parse_form

LICENSE = None
END = None
FORMS = (
    {"instruction": "instruction", "input": "input", "response": "output"},
    {"instruction": "instruction", "response": "output"},  # WizardLM's
)
NOTHING = re.compile(r"\W*no ?(input|output)\W*", re.IGNORECASE)  # an empty input: "<noinput>", "Noinput"


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict]:
    for record in parse_form(chunk, FORMS):
        yield {name: "" if NOTHING.fullmatch(value) else value for name, value in record.items()}
