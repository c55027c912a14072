"""Opens a checkpoint file with the reader of its format, without running code from it."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from fledge.checkpoints.loading import pickled
from fledge.checkpoints.loading.token_ids import says_token_ids
from fledge.checkpoints.loading.unwrapping import CLASS, WRAPPERS
from fledge.errors import UserError

# A class of this name holds settings; one of another name stays refused.
RECORDS = re.compile(r"argparse\.Namespace|([\w.]+\.)?\w*(Config|Args|Arguments|HParams|Params|Settings)")


class Record(dict):
    """A stand-in for a class that the file names. It keeps the pickled values.

    build-nanogpt saves its config as a dataclass, others as argparse.Namespace; their code is never looked for.
    """

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


def first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(512)


def open_file(file: Path, records: tuple[str, ...] = ()) -> object:
    """The content of a checkpoint file, read without running any code from it.

    `records` names classes that hold plain values, and whose instances are read as `Record`.

    Raises:
        UserError: the file is damaged, of another kind, or needs its code to run.
    """
    start = first_bytes(file)
    if start[257:262] == b"ustar":
        raise UserError(
            f"{file} is a tar archive: unpack it if it is a packed folder; if torch wrote it before 2017, only running "
            "its code opens it, so save model.state_dict() again with a later torch."
        )
    try:
        if file.suffix.lower() == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Record, name) for name in records]):
            warnings.simplefilter("ignore")
            mapped = start[:2] == b"PK" and _is_stored(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # on damaged bytes torch's unpickler raises whatever Python does
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and RECORDS.fullmatch(wanted[1]) and wanted[1] not in records:
            return open_file(file, (*records, wanted[1]))
        if (content := _read_inert(file, start)) is not None:
            return content
        if wanted:
            raise UserError(
                f"{file} is a pickle that wants to run {wanted[1]}, and Fledge runs no code from a file; "
                "save model.state_dict() and plain numbers instead."
            ) from error
        raise UserError(f"{file} is not a readable checkpoint: it is damaged, cut off, or of another kind.") from error


def _read_inert(file: Path, start: bytes) -> Mapping | None:
    """What a pickle of a whole module, or of a mapping with objects beside its tensors, holds; None if it is none."""
    if start[:2] != b"PK" and start[:1] not in (b"\x80", b"(", b"c"):
        return None
    try:
        content = pickled.read_inert(file)
    except Exception:  # on damaged bytes the unpickler raises whatever Python does
        return None
    for place, module in pickled.modules_in(content):
        if place in ("", *WRAPPERS):
            said = content if isinstance(content, Mapping) else {}
            beside = {key: value for key, value in said.items() if key != place}
            return {
                **beside,
                CLASS: module.kind,
                "state_dict": pickled.state_of(module),
                "config": pickled.config_of(module),
            }
    if not isinstance(content, Mapping):
        return None
    told: dict[str, object] = {}  # what objects beside the weights hold, such as the vocabulary of a tokenizer
    for value in content.values():
        if isinstance(value, pickled.Record):
            told |= {k: v for k, v in vars(value).items() if says_token_ids(k)}
    return {**told, **content}


def _is_stored(file: Path) -> bool:
    # Of a zip that was packed again with compression, torch would map the compressed bytes and take them for weights.
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
