"""Recognises files that are not torch checkpoints by their first bytes, because suffixes can be wrong."""

import zipfile
from pathlib import Path

STARTS = {
    b"GGUF": "a GGUF file of llama.cpp",
    b"ggml": "a GGML file of llama.cpp",
    b"\x89HDF": "an HDF5 file, as Keras saves weights",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet table",
}
TORCHSCRIPT = "a TorchScript program"
ADVICE = {
    TORCHSCRIPT: "Fledge runs no code from a file, so save its state_dict() instead",
    "a gzip archive": "unpack it first",
    "a folder of torch.distributed.checkpoint": "join it with torch.distributed.checkpoint.format_utils first",
}
ELSE = "load it in the program that wrote it, and save its state dict with torch.save"


def other_kind(file: Path) -> str | None:
    """What a file or folder is if it only looks like a checkpoint, with advice; None if it may be a checkpoint."""
    if file.is_dir():
        kind = "a folder of torch.distributed.checkpoint" if (file / ".metadata").is_file() else None
    else:
        with file.open("rb") as opened:
            start = opened.read(8)
        kind = next((kind for magic, kind in STARTS.items() if start.startswith(magic)), None)
        kind = kind or (_of_zip(file) if start.startswith(b"PK") else None)
    return kind and f"{file} is {kind}; {ADVICE.get(kind, ELSE)}."


def _of_zip(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):  # damaged, names and versions among it
        return None  # said by who reads it
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    if "model.weights.h5" in names:
        return "a Keras model"
    return TORCHSCRIPT if any("/code/" in name for name in names) else None
