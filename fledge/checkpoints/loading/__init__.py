"""Checkpoint files → tensors by name. Nothing in a file is ever executed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fledge.checkpoints.loading.binary import is_binary, read_binary
from fledge.checkpoints.loading.configs import is_no_model, origins, read_config_beside, stated_by_litgpt
from fledge.checkpoints.loading.file_kinds import other_kind
from fledge.checkpoints.loading.opening import first_bytes
from fledge.checkpoints.loading.shards import INDICES, files_of, joined
from fledge.checkpoints.loading.token_ids import vocabulary_in
from fledge.checkpoints.loading.unwrapping import CLASS, CONFIGS, WRAPPERS, unwrap
from fledge.checkpoints.loading.weights import weights_in
from fledge.cli import read_json
from fledge.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")

HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class Checkpoint:
    """A state dict without wrappers, prefixes and buffers, with what was left out and why.

    `tensors` are plain floating-point numbers, all of them finite. `vocabulary`, if the file holds one, says which id
    each token has; the ids run from 0 without a gap. `origins` says where each entry of the config is from, and
    `stated` holds the facts that the config states in words of its own.
    """

    tensors: dict[str, Tensor]
    config: dict[str, object]
    left_out: dict[str, str]
    source: dict[str, object]
    vocabulary: dict[str, int] | None = None
    origins: dict[str, str] = field(default_factory=dict)
    stated: dict[str, object] = field(default_factory=dict)


def load_checkpoint(path: str) -> Checkpoint:
    """Loads what `torch.save`, safetensors, Lightning, llama2.c or llm.c wrote, or a folder that holds one such file.

    A model in several files is loaded from their folder, or by their index.

    Weights stay mapped from the file where its format allows.

    Raises:
        UserError: no such file, several, not a checkpoint, a pickle that wants to run code, quantised weights, weights
            that are not finite, or two vocabularies that disagree.
    """
    try:
        file, config = _locate(Path(path))
        files = files_of(file)
        binary, other = is_binary(file), other_kind(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if other:
        raise UserError(other)
    if binary:
        state: Mapping
        state, said, left_out = read_binary(file)
        levels: list[Mapping] = [state]
    else:
        state, said, left_out, levels = unwrap(file, joined(files))
    beside, name = read_config_beside(file)
    is_pickled = CLASS in levels[0]
    places = dict.fromkeys(config, "config.json") | dict.fromkeys(said, "the file's header")
    places |= origins(levels, CONFIGS, is_pickled) | dict.fromkeys(beside, name)
    config |= said | beside
    tensors, not_weights = weights_in(file, state)
    if not tensors:
        held = ", ".join(repr(str(key)) for key in list(levels[0])[:5]) or "nothing"
        raise UserError(
            f"{file} holds no tensors that are weights under {', '.join(WRAPPERS)} or at its top level, only {held}."
        )
    left_out |= not_weights
    vocabulary, taken = vocabulary_in(file, [*levels, config])
    of_class = {"class": levels[0][CLASS]} if is_pickled else {}
    return Checkpoint(
        tensors=tensors,
        config=config,
        left_out={name: reason for name, reason in left_out.items() if name not in taken and name != CLASS},
        source={"file": file.name, "bytes": sum(f.stat().st_size for f in files), "sha256": _sha256(files)} | of_class,
        vocabulary=vocabulary,
        origins={key: place for key, place in places.items() if key in config},
        stated=stated_by_litgpt(config),
    )


def _locate(path: Path) -> tuple[Path, dict[str, object]]:
    """The checkpoint file, and the config.json beside it if `path` is a folder."""
    if path.is_file():
        return path, {}
    if not path.is_dir():
        raise UserError(f"There is no checkpoint at {path}.")
    if other := other_kind(path):
        raise UserError(other)
    config_file = path / "config.json"
    config = read_json(config_file, "the script that saved it") if config_file.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{config_file} holds a {type(config).__name__}, not a mapping.")
    found = [path / name for name in (*HUB_NAMES, *INDICES) if (path / name).is_file()][:1]
    found = found or sorted(file for file in path.iterdir() if file.is_file() and _looks_like_checkpoint(file))
    if not found:
        raise UserError(f"{path} holds no checkpoint ({', '.join(SUFFIXES)}); name the file.")
    if len(found) > 1:
        raise UserError(f"{path} holds {', '.join(file.name for file in found)}; name the one to convert.")
    return found[0], config


def _looks_like_checkpoint(file: Path) -> bool:
    # Tokenizers and token ids are called .bin as well.
    suffix = file.suffix.lower()
    is_binary_or_torch = suffix != ".bin" or is_binary(file) or first_bytes(file)[:2] in (b"PK", b"\x80\x02")
    return suffix in SUFFIXES and is_binary_or_torch and not is_no_model(file)


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
