"""Checkpoints in several files with an index that says which tensor lies in which, as transformers saves them."""

import re
from pathlib import Path

from fledge.checkpoints.loading.opening import open_file
from fledge.cli import read_json
from fledge.errors import UserError

INDEX = ".index.json"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SHARD = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.\w+")  # one of several


def files_of(file: Path) -> list[Path]:
    """The files of a checkpoint: those that an index names, or the file itself.

    Raises:
        UserError: an index that names no files or one that is not there, or a file that is only a part.
    """
    if not file.name.endswith(INDEX):
        if SHARD.fullmatch(file.name):
            raise UserError(f"{file} holds only a part of the model; pass the folder that has all parts and an index.")
        return [file]
    content = read_json(file, "the script that saved it")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{file} has no weight_map that says which file holds which tensor.")
    files = [file.parent / name for name in sorted({*places.values()})]
    for part in files:
        if part.parent != file.parent or not part.is_file():
            raise UserError(f"{file} names {part.name}, and there is no such file beside it.")
    return files


def joined(files: list[Path]) -> object:
    """The content of a checkpoint's files: of one as it is, of several the tensors of all.

    Raises:
        UserError: a file cannot be read, is not a state dict, or repeats a tensor of another.
    """
    if len(files) == 1:
        return open_file(files[0])
    state: dict[str, object] = {}
    for file in files:
        part = open_file(file)
        if not isinstance(part, dict):
            raise UserError(f"{file} holds a {type(part).__name__}, not a part of a state dict.")
        if twice := sorted(part.keys() & state.keys()):
            raise UserError(f"{file} holds {twice[0]!r}, which another file of the model holds too.")
        state |= part
    return state
