"""Output folders: a lock keeps other runs out, and a result replaces an earlier one only when it is complete.

Only the standard library and filelock are imported here, so that errors are reported at once.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fledge.cli import attempt, writing
from fledge.errors import UserError
from fledge.locks import locked
from fledge.marks import MARK, WORK, files_in, read_mark, remove, sort_out, write_mark


def check_inputs(output: str | Path, key: str, inputs: Mapping[str, str | Path | list[str] | None]) -> None:
    """Refuses an output that is an input, is inside one, or contains one. Folders are compared by identity.

    `inputs` maps keys to paths; values that are not paths on this machine, such as models on the Hub, are ignored.

    Raises:
        UserError: the output overlaps with an input.
    """
    for name, given in inputs.items():
        for path in given if isinstance(given, list) else [given]:
            if path is None or not Path(path).exists():
                continue
            there, here = _chain(path), _chain(output)
            how = None
            if there[0] in here:
                how = "is" if there[0] == here[0] and Path(output).exists() else "lies in"
            elif Path(output).exists() and here[0] in there:
                how = "holds"
            if how:
                raise UserError(f"{key} {output} {how} {name} {path}, which is read; name another {key}.")


def _chain(path: str | Path) -> list[tuple[int, int]]:
    """The identity of `path` and of each folder above it, as far as they exist."""
    whole = Path(path).resolve()
    found = [place.stat() for place in (whole, *whole.parents) if place.exists()]
    return [(status.st_dev, status.st_ino) for status in found]


@contextlib.contextmanager
def claimed(
    output_dir: str | Path,
    stage: str,
    overwrite: bool | None = None,
    inputs: Mapping[str, str | Path | list[str] | None] | None = None,
    key: str = "--output_dir",
    is_main: bool = True,
) -> Iterator["Output"]:
    """Locks `output_dir` for `stage` and cleans up after a killed run. Enter it before any work.

    Args:
        overwrite: whether its content may be replaced; `None` if `Output.check` will be called later. inputs: see
            `check_inputs`. is_main: true for the one process of a run that locks and writes.

    Raises:
        UserError: it is a file, cannot be written, overlaps with an input, is being written by another run, or has
            files
            that `stage` did not write.
    """
    folder = Path(output_dir)
    if not is_main:
        yield Output(folder, stage, key, is_main=False)
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key} {folder} is a file; name a folder.")
    check_inputs(folder, key, inputs or {})
    output, was_there = Output(folder, stage, key), folder.exists()
    if os.path.ismount(output.folder):
        raise UserError(f"{key} {folder} is a mount point, which cannot be replaced; name a folder in it.")
    with locked(output.folder, key):
        with writing(folder):
            output.recover()
            if overwrite is not None:
                output.check(overwrite)
        try:
            yield output
        finally:
            output.tidy(was_there)


@dataclass
class Output:
    """An output folder that `claimed` has locked. `path` is the user's spelling, `folder` the resolved path."""

    path: Path
    stage: str
    key: str = "--output_dir"
    is_main: bool = True

    def __post_init__(self) -> None:
        self.folder = self.path.resolve()
        names = (f".{self.folder.name}.fledge-{state}" for state in ("building", "replaced"))
        self.building, self.replaced = map(self.folder.with_name, names)

    def recover(self) -> None:
        """Removes what a killed run left beside the folder, and restores an output that it was about to replace."""
        for place in (self.building, self.replaced):
            if not (place.is_symlink() or place.exists()):
                continue
            ours = [] if place.is_symlink() or not place.is_dir() else sort_out(place, self.stage)[0]
            is_empty = place.is_dir() and not any(place.iterdir())
            if not is_empty and not any(path.name == MARK for path in ours):
                raise UserError(f"{place} was not written by Fledge, which needs this name; move it away.")
        shutil.rmtree(self.building, ignore_errors=True)
        if self.replaced.exists():
            if self.folder.exists():
                self._retire()
            else:
                self.replaced.rename(self.folder)

    def check(self, overwrite: bool) -> None:
        """Checks that the stage may write to the folder.

        Raises:
            UserError: it has content and `overwrite` is false, or it has a file that `stage` did not write.
        """
        if not self.is_main or not self.folder.exists():
            return
        ours, foreign = sort_out(self.folder, self.stage)
        mark = read_mark(self.folder)
        if not foreign and all(path.name == MARK for path in ours):
            return
        if not overwrite:
            raise UserError(f"{self.path} already has content; name another {self.key} or pass --overwrite.")
        if not foreign:
            return
        if mark and mark["stage"] != self.stage:
            raise UserError(
                f"{self.path} was written by {mark['stage']}, not by {self.stage}; name another {self.key}."
            )
        if not ours:
            raise UserError(
                f"{self.path} holds {foreign[0]} and no mark of {self.stage}, so Fledge did not write it and will not "
                f"replace it; name another {self.key}."
            )
        others = f" (nor were {len(foreign) - 1} others there)" if len(foreign) > 1 else ""
        raise UserError(
            f"{self.path / foreign[0]} was not written by {self.stage}, or was changed since{others}; move it away, "
            f"or name another {self.key}: only what Fledge wrote is replaced."
        )

    def check_room(self, size: int) -> None:
        """Checks before any work that the disk has room for a result of `size` bytes.

        Raises:
            UserError: it has not.
        """
        if not self.is_main:
            return
        free = shutil.disk_usage(self.folder.parent).free
        if free < size:
            raise UserError(
                f"{self.path} needs {size / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB free; make room first."
            )

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """Yields a folder beside the output. It replaces the output if the block succeeds, and is deleted if it fails.

        A killed run leaves the output unchanged, and the next run removes its unfinished folder.

        Raises:
            UserError: the disk is full, or the output cannot be replaced; then the new folder is kept beside it.
        """
        with writing(self.path):
            self.building.mkdir()
            try:
                write_mark(self.building, self.stage, {})
                yield self.building
                files = {path.as_posix(): (self.building / path).lstat().st_size for path in files_in(self.building)}
                del files[MARK]
                _let_all_read(self.building, files)
                write_mark(self.building, self.stage, files)
                self._place()
            finally:
                if self.replaced.exists() and not self.folder.exists():
                    self.replaced.rename(self.folder)
                shutil.rmtree(self.building, ignore_errors=True)

    def _place(self) -> None:
        """Replaces the old folder by the new one. Files that others added in the meantime are kept."""
        try:
            foreign = sort_out(self.folder, self.stage)[1] if self.folder.exists() else []
            for path in foreign:
                in_the_way = [self.building / part for part in (path, *path.parents[:-1])]
                if in_the_way[0].exists() or any(part.is_file() for part in in_the_way):
                    raise FileExistsError(None, f"{path} was put there meanwhile")
            if self.folder.exists():
                self.folder.rename(self.replaced)
            self.building.rename(self.folder)
        except OSError as error:
            if self.replaced.exists() and not self.folder.exists():
                self.replaced.rename(self.folder)
            kept = _unused(self.folder.with_name(f"{self.folder.name}-finished"))
            self.building.rename(kept)
            raise UserError(
                f"{self.path} cannot be replaced ({error.strerror}); what was made lies in {kept}."
            ) from error
        if self.replaced.exists():
            self._retire()

    def _retire(self) -> None:
        """Deletes the replaced output, except for files of others, which are moved back."""
        ours, foreign = sort_out(self.replaced, self.stage)
        for path in foreign:
            place = self.folder / path
            if not (place.exists() or place.is_symlink()):
                place.parent.mkdir(parents=True, exist_ok=True)
                (self.replaced / path).rename(place)
        remove(self.replaced, ours)

    def add(self, name: str, write: Callable[[Path], object]) -> None:
        """Adds a file, such as a record or a picture, to the finished folder. A failure is printed and stops nothing.

        `write` is called with the folder.
        """

        def do() -> None:
            mark = read_mark(self.folder)
            if mark is None:
                raise UserError(f"{self.path} has lost its mark {MARK}; somebody changed it meanwhile.")
            write_mark(self.folder, self.stage, mark["files"] | {name: None})
            write(self.folder)
            written = mark["files"] | {name: (self.folder / name).lstat().st_size}
            write_mark(self.folder, self.stage, written)

        attempt(f"{self.path / name}", do)

    @property
    def work(self) -> Path:
        """The folder of unfinished work inside the output."""
        return self.path / WORK[self.stage][0]

    @property
    def owns_work(self) -> bool:
        return (read_mark(self.folder / WORK[self.stage][0]) or {}).get("stage") == self.stage

    @property
    def is_finished(self) -> bool:
        return (self.folder / MARK).exists()

    def is_own_work(self, path: str | Path | None) -> bool:
        """Whether `path` is in the folder of unfinished work and Fledge wrote that folder."""
        return path is not None and self.owns_work and self.work.resolve() in Path(path).resolve().parents

    def begin_work(self, going_on_from: str | Path | None) -> None:
        """Creates the folder of unfinished work, empty unless the run resumes from something in it.

        Raises:
            UserError: it cannot be written.
        """
        if not self.is_main:
            return
        name, anew = WORK[self.stage][0], not self.is_own_work(going_on_from)
        with writing(self.work):
            if anew and self.work.exists():
                remove(self.folder, [path for path in sort_out(self.folder, self.stage)[0] if path.parts[0] == name])
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            write_mark(self.folder / name, self.stage, {})

    def tidy(self, was_there: bool) -> None:
        """Removes an empty folder of unfinished work, and then the output if this run created it and it is empty."""
        work = self.folder / self.work.name if self.stage in WORK else None
        if work and work.is_dir() and not work.is_symlink():
            marks = [Path(MARK)] if self.owns_work else []
            if list(files_in(work)) == marks:
                remove(work, marks)
        if not was_there:
            for place in (self.folder, *self.folder.parents):
                with contextlib.suppress(OSError):
                    place.rmdir()


def _let_all_read(folder: Path, files: Iterable[str]) -> None:
    """Gives files the permissions of the mark, those of any new file: safetensors lets their owner alone read."""
    usual = (folder / MARK).stat().st_mode
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).chmod((folder / name).stat().st_mode | usual)


def _unused(path: Path) -> Path:
    names = (f"{path.name}-{number}" if number else path.name for number in itertools.count())
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())
