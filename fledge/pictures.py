"""Pictures of a run and of its data, as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def picture(file: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, dpi: int = 120) -> Iterator[Any]:
    """Yields matplotlib's axes to draw on, one or an array of (rows, columns), and then saves the figure as `file`.

    `size` is width and height in inches. pyplot is not used, so a notebook keeps its own backend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns)
    figure.savefig(file, dpi=dpi)
