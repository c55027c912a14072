"""Pictures of a run and of its data, as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def picture(file: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, dpi: int = 120) -> Iterator[Any]:
    """Gives matplotlib's axes to draw on, one or an array of (rows, columns), and then saves them as `file`.

    `size` is width and height in inches. The figure is no window of pyplot's, so a notebook keeps its own backend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns)
    figure.savefig(file, dpi=dpi)
