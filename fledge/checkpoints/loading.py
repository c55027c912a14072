"""Checkpoint files → tensors by name. Nothing in a file is ever executed."""

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fledge.cli import UserError, read_json

WRAPPERS = ("model_state_dict", "model_state", "state_dict", "model")
CONFIGS = ("config", "model_args", "model_config", "args", "hparams")
PREFIXES = ("module.", "_orig_mod.", "model.")
# Buffers that hand-written modules register beside their weights: causal masks and rotary tables.
BUFFERS = re.compile(r"(^|\.)(mask|tril|causal_mask|freqs_cis|masked_bias)$")


@dataclass
class Checkpoint:
    """A state dict without wrappers, prefixes and buffers, with what was left aside and why."""

    tensors: dict[str, Tensor]
    config: dict[str, object]
    left_out: dict[str, str]
    source: dict[str, object]


def load_checkpoint(path: str) -> Checkpoint:
    """Loads a `.pt`/`.pth`/`.bin` file, a `.safetensors` file, or a folder that holds one beside its `config.json`.

    Raises:
        UserError: no such file, not a checkpoint, a pickle that wants to run code, or weights that are not finite.
    """
    file, config = Path(path), {}
    if file.is_dir():
        config_file = file / "config.json"
        if config_file.exists():
            config = read_json(config_file, "the script that saved it")
            if not isinstance(config, dict):
                raise UserError(f"{config_file} holds a {type(config).__name__}, not a mapping.")
        found = [file / name for name in ("model.safetensors", "pytorch_model.bin") if (file / name).exists()]
        if not found:
            raise UserError(f"{file} holds neither model.safetensors nor pytorch_model.bin; name the checkpoint file.")
        file = found[0]
    if not file.is_file():
        raise UserError(f"There is no checkpoint at {file}.")
    content = _read(file)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead.")
    tensors, found_config, left_out = _unwrap(content)
    if not tensors:
        raise UserError(f"{file} holds no tensors under {', '.join(WRAPPERS)} or at its top level.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype.itemsize < 2:
            raise UserError(
                f"{file} holds {name} as a {tensor.device} {tensor.layout} {tensor.dtype} tensor, not as plain numbers."
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file} has values that are not finite in {name}: the training that saved it diverged.")
    return Checkpoint(
        tensors=tensors,
        config=config | found_config,
        left_out=left_out,
        source={"file": Path(path).name, "bytes": file.stat().st_size, "sha256": _sha256(file)},
    )


def _read(file: Path):
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # torch's memory-mapped reader takes the zip format only; older files are read whole.
        with file.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)|`?(\S+)`? was not an allowed global", str(error))
        if wanted:
            raise UserError(
                f"{file} is a pickle that wants to run {wanted[1] or wanted[2]}, and Fledge runs no code from a file; "
                "save model.state_dict() and plain numbers instead."
            ) from error
        raise UserError(f"{file} is not a PyTorch checkpoint.") from error
    except Exception as error:  # on damaged bytes torch's unpickler raises whatever Python does
        raise UserError(f"{file} is not a readable checkpoint: it is damaged, cut off, or of another kind.") from error


def _unwrap(content: Mapping) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str]]:
    config = {}
    for key in CONFIGS:
        if isinstance(content.get(key), Mapping):
            config |= content[key]
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    left_out = {}
    if wrapper:
        left_out = {str(key): f"beside {wrapper}" for key in content if key != wrapper and key not in CONFIGS}
        content = content[wrapper]
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value
        else:
            left_out[str(key)] = "not a tensor"
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for name in list(tensors):
        # nanoGPT calls its (1, 1, T, T) causal mask `attn.bias`.
        if BUFFERS.search(name) or (name.endswith("attn.bias") and tensors[name].dim() == 4):
            left_out[name] = "a buffer"
            del tensors[name]
        elif not tensors[name].is_floating_point():
            left_out[name] = f"{tensors[name].dtype} is not a weight"
            del tensors[name]
    return tensors, config, left_out


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
