"""Sources: raw data → records. Each source is one file, and this folder has no other files.

docs/data.md shows the form of each and how to add one.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from fledge.errors import UserError
from fledge.reading.files import Chunk, row_chunks, text_chunks

# The project's own records in the form of TinyStories-Instruct: size in bytes → SHA-256.
SHIPPED = {
    727_779: "a582e6b6629b6b7a6a1d4952eed572ec1e22857a8d3b32030eaead0e9a0e6dc3",  # examples/tales.txt.gz
    574_956: "6ffde9487455db7b22ce8b320d81074eaffd3aeff0dae5e7caae5f80e9f6c0ab",  # examples/two_endings.txt.gz
}


@dataclass(frozen=True)
class Source:
    """A source: its name and, for `columns`, which column has which field."""

    name: str
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"fledge.sources.{self.name}")

    def license(self, data: list[str]) -> str | None:
        """The SPDX id of the dataset that the source is named after; `None` if the data may come from anywhere.

        The shipped records have this project's licence, whatever source reads them.
        """
        return "apache-2.0" if all(map(_is_shipped, data)) else self.module.LICENSE

    def chunks(self, data: str) -> Iterator[Chunk]:
        """Yields the chunks of a file, a folder or a Hub dataset.

        Raises:
            UserError: `data` is no file, folder or Hub dataset that can be read.
        """
        if self.name == "answers":  # all answers to a prompt are one record
            return self.module.chunks(data)
        return text_chunks(data, self.module.END) if self.module.END else row_chunks(data)

    def parse(self, chunk: Chunk) -> list[dict[str, Any]]:
        """All records of a chunk, in order.

        Raises:
            UserError: a column is missing.
        """
        return list(self.module.parse(chunk, dict(self.columns)))

    def records(self, data: str) -> Iterator[dict[str, Any]]:
        """All records of `data`, one chunk of them in memory at a time."""
        for chunk in self.chunks(data):
            yield from self.parse(chunk)


def source_names() -> list[str]:
    """The sources: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_source(name: str, columns: str | None = None) -> Source:
    """Opens a source. `columns` is the value of --columns: `instruction=question,response=answer`.

    Raises:
        UserError: there is no source of that name, or the columns do not go with it.
    """
    if name not in source_names():
        raise UserError(f"The source {name!r} is unknown; choose one of {', '.join(source_names())}.")
    if name != "columns":
        if columns:
            raise UserError(f"--columns goes with --source columns; {name} knows its own.")
        return Source(name)
    from fledge.sources.columns import parse_columns

    return Source(name, tuple(parse_columns(columns or "").items()))


def _is_shipped(data: str) -> bool:
    file = Path(data)
    if not file.is_file() or file.stat().st_size not in SHIPPED:
        return False
    return sha256(file.read_bytes()).hexdigest() == SHIPPED[file.stat().st_size]
