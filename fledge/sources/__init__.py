"""Sources: raw data → records. One file a source; docs/data.md shows the form of each and how to add one."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fledge.cli import UserError
from fledge.sources.reading import Chunk, row_chunks, text_chunks

SOURCES = ("tinystories_instruct", "dolly", "alpaca", "story_qa", "columns")


@dataclass(frozen=True)
class Source:
    """A source by its name and, for `columns`, the names of the columns that hold what a record needs."""

    name: str
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"fledge.sources.{self.name}")

    @property
    def license(self) -> str | None:
        """The SPDX id of the data that the source is named after; None when it may be anybody's."""
        return self.module.LICENSE

    def chunks(self, data: str) -> Iterator[Chunk]:
        """Raises:
        UserError: `data` is no file, folder or Hub dataset that can be read.
        """
        return text_chunks(data, self.module.END) if self.module.END else row_chunks(data)

    def parse(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The records of a chunk, in its order, none left out.

        Raises:
            UserError: a column is missing.
        """
        return list(self.module.parse(chunk, dict(self.columns)))

    def records(self, data: str) -> Iterator[dict[str, Any]]:
        """All records of `data`, one chunk of them in memory at a time."""
        for chunk in self.chunks(data):
            yield from self.parse(chunk)


def load_source(name: str, columns: str | None = None) -> Source:
    """`columns` is the text of --columns: `instruction=question,response=answer`.

    Raises:
        UserError: there is no source of that name, or the columns do not go with it.
    """
    if name not in SOURCES:
        raise UserError(f"The source {name!r} is unknown; choose one of {', '.join(SOURCES)}.")
    if name != "columns":
        if columns:
            raise UserError(f"--columns goes with --source columns; {name} knows its own.")
        return Source(name)
    from fledge.sources.columns import parse_columns

    return Source(name, tuple(parse_columns(columns or "").items()))
