"""Marks: which files of a folder Fledge wrote. Only these are ever replaced.

A finished folder has a mark, `.fledge.json`, with the name of the script and the size of each file. A folder of
unfinished work inside it (`checkpoints/`, `unfinished/`) has its own mark, and its files are recognised by name.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import NoReturn

from fledge.cli import write_json

MARK = ".fledge.json"
# Files that trainers and trackers write into a folder of checkpoints, at any time and from any process.
TRAINER_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.distcp", "*.jinja",
    ".metadata", "README.md", "adapter_config.json", "added_tokens.json", "config.json", "emissions.csv",
    "events.out.tfevents.*", "generation_config.json", "latest", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "trainer_state.json", "vocab.json", "vocab.txt",
    "modeling_*.py", "zero_to_fp32.py", "completions_*.parquet",
)  # fmt: skip
TRAINER_FOLDERS = re.compile(r"checkpoint-\d+|runs|completions")
# Stage → the folder of its unfinished work, and the names of the files that are Fledge's there.
WORK = {
    "train_sft.py": ("checkpoints", TRAINER_FILES),
    "train_dpo.py": ("checkpoints", TRAINER_FILES),
    "train_grpo.py": ("checkpoints", TRAINER_FILES),
    "pretrain.py": ("checkpoints", TRAINER_FILES),
    "evaluate_model.py": ("unfinished", ("answers.jsonl", "judgements.jsonl")),
}


def read_mark(folder: Path) -> dict | None:
    """The mark in `folder`: `stage`, and `files`, path → size in bytes (`None` for any size). `None` without a mark."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return mark if isinstance(mark["stage"], str) and isinstance(mark["files"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_mark(folder: Path, stage: str, files: Mapping[str, int | None]) -> None:
    building = folder / f"{MARK}.new"
    write_json(building, {"stage": stage, "files": files})
    building.replace(folder / MARK)


def files_in(folder: Path) -> Iterator[Path]:
    """All files below `folder`, relative to it. Links to folders are not followed."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from ((Path(place) / name).relative_to(folder) for name in sorted(files + links))


def sort_out(folder: Path, stage: str) -> tuple[list[Path], list[Path]]:
    """The files in `folder` that `stage` wrote, marks included, and the files of others, as relative paths.

    A file that was changed later, so that its size differs from the mark's, counts as a file of others.
    """
    mark = read_mark(folder)
    listed = mark["files"] if mark and mark["stage"] == stage else None
    work, names = WORK.get(stage, (None, ()))
    is_working = work is not None and (read_mark(folder / work) or {}).get("stage") == stage

    def is_ours(path: Path) -> bool:
        if is_working and path.parts[0] == work and not (folder / work).is_symlink():
            return _is_of_work(PurePath(*path.parts[1:]), names)
        if listed is None:
            return False
        size = listed.get(path.as_posix(), -1)
        return path in (Path(MARK), Path(f"{MARK}.new")) or size in (None, (folder / path).lstat().st_size)

    ours: list[Path] = []
    foreign: list[Path] = []
    for path in files_in(folder):
        (ours if is_ours(path) else foreign).append(path)
    return ours, foreign


def _is_of_work(path: PurePath, names: tuple[str, ...]) -> bool:
    if path.name in (MARK, f"{MARK}.new"):
        return len(path.parts) == 1
    is_placed = len(path.parts) == 1 or TRAINER_FOLDERS.fullmatch(path.parts[0])
    return bool(is_placed) and any(fnmatch.fnmatchcase(path.name, like) for like in names)


def remove(folder: Path, files: list[Path]) -> None:
    """Deletes these files, marks last, and then empty folders."""
    for path in sorted(files, key=lambda path: (path.name == MARK, -len(path.parts))):
        (folder / path).unlink(missing_ok=True)
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            Path(place).rmdir()
