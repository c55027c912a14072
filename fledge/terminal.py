"""Output while a script works: colours and progress bars on a terminal, plain lines in a log."""

import contextlib
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TextIO

BETWEEN = 30.0  # seconds between two lines of progress in a log


def has_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def quiet() -> None:
    """Turns off the warnings and progress bars of transformers, and the bars of datasets if a stage has imported it."""
    import transformers

    # TRL and peft still use the deprecated name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # peft finds the right value itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):  # takes seconds to import, so it is not imported only for this
        datasets.disable_progress_bars()


@contextlib.contextmanager
def progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the progress of `doing` on stderr; yields a function to call with how many of `total` are done.

    A terminal gets a progress bar with the time left, anything else a line now and then and one at the end.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        form = "{desc:<22}{bar} {n_fmt}/{total_fmt}  {remaining} left"
        with tqdm(total=total, desc=f"  {doing}", ncols=88, bar_format=form, mininterval=0.5) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    last_time = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last_time
        if done == total or time.monotonic() - last_time >= BETWEEN:
            last_time = time.monotonic()
            print(f"  {doing}: {done:,}/{total:,}", file=sys.stderr, flush=True)

    yield tell


def in_columns(names: tuple[str, str], texts: tuple[str, str]) -> str:
    """Two texts in columns with their names as headers; one below the other if the terminal is too narrow."""
    width = (shutil.get_terminal_size().columns - 3) // 2
    if width < 30:
        return "\n\n".join(f"--- {name}\n{text}" for name, text in zip(names, texts, strict=True)) + "\n"
    columns = []
    for name, text in zip(names, texts, strict=True):
        wrapped = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]]
        columns.append([name[-width:], "─" * width, *wrapped])
    return (
        "\n".join(f"{left:<{width}} │ {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")) + "\n"
    )
