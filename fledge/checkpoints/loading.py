"""Checkpoint files → tensors by name. Nothing in a file is ever executed."""

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fledge.checkpoints import pickled
from fledge.checkpoints.binary import is_binary, read_binary
from fledge.checkpoints.file_kinds import other_kind
from fledge.cli import UserError, read_json

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model_state_dict", "model_state", "state_dict", "model")
CONFIGS = ("config", "hyper_parameters", "model_args", "model_config", "args", "hparams")
PREFIXES = ("module.", "_orig_mod.", "model.")
PROGRESS = re.compile(r"epoch|step|iter|loss|(^|_)lr|learning|seed|version|time|best|perplexity|acc|score|date|name")
CLASS = "class of the pickled module"
BESIDE = {"optim": "optimizer state", "sched": "scheduler state", r"(^|_)(ema|swa)(_|$)": "an EMA copy"}
# Buffers that hand-written modules register beside their weights: causal masks, rotary tables, counted positions.
BUFFERS = re.compile(
    r"(^|\.)(mask|tril|triu|(causal|attn|attention)_mask|masked_bias|freqs_(cis|cos|sin)|inv_freq|cos|sin|"
    r"(cos|sin)_cache(d)?|(position|pos)_ids)$"
)
# A class of this name holds settings; one of another name stays refused.
RECORDS = re.compile(r"argparse\.Namespace|([\w.]+\.)?\w*(Config|Args|Arguments|HParams|Params|Settings)")
LARGEST_UNSTORED = 1 << 24
"""Numbers that a tensor may have beyond those it stores: a small one may be one row that was expanded."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKEN, ID = "(s|ch|chr|char|str|string|tok|token|word|vocab)s?", "(i|ix|id|idx|int|index)s?"
TOKEN_IDS = re.compile(f"{TOKEN}_?(to|2)_?{ID}|{ID}_?(to|2)_?{TOKEN}")
TOKEN_LISTS = ("vocab", "vocabulary", "chars")


class LeftOut(StrEnum):
    """Why something in the file is not a weight; other reasons name an entry or a type."""

    BUFFER = "a buffer"
    MASK = "a triangular mask"
    NO_TENSOR = "not a tensor"


@dataclass
class Checkpoint:
    """A state dict without wrappers, prefixes and buffers, with what was left aside and why.

    `tensors` are plain floating-point numbers, all of them finite. `vocabulary`, if the file holds one, says which id
    each token has; the ids run from 0 without a gap.
    """

    tensors: dict[str, Tensor]
    config: dict[str, object]
    left_out: dict[str, str]
    source: dict[str, object]
    vocabulary: dict[str, int] | None = None


def load_checkpoint(path: str) -> Checkpoint:
    """Loads what `torch.save`, safetensors, Lightning, llama2.c or llm.c wrote, or a folder that holds one such file.

    Weights stay mapped from the file where its format allows.

    Raises:
        UserError: no such file, several, not a checkpoint, a pickle that wants to run code, quantised weights, weights
            that are not finite, or two vocabularies that disagree.
    """
    try:
        file, config = _locate(Path(path))
        binary, other = is_binary(file), other_kind(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if other:
        raise UserError(other)
    if binary:
        state, said, left_out = read_binary(file)
        levels = [state]
    else:
        state, said, left_out, levels = _unwrap(file, _read(file))
    config |= said
    tensors, not_weights = _weights(file, state)
    if not tensors:
        held = ", ".join(repr(str(key)) for key in list(levels[0])[:5]) or "nothing"
        raise UserError(
            f"{file} holds no tensors that are weights under {', '.join(WRAPPERS)} or at its top level, only {held}."
        )
    left_out |= not_weights
    vocabulary, taken = _vocabulary(file, [*levels, config])
    of_class = {"class": levels[0][CLASS]} if CLASS in levels[0] else {}
    return Checkpoint(
        tensors=tensors,
        config=config,
        left_out={name: reason for name, reason in left_out.items() if name not in taken and name != CLASS},
        source={"file": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)} | of_class,
        vocabulary=vocabulary,
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
    found = [path / name for name in HUB_NAMES if (path / name).is_file()][:1]
    found = found or sorted(file for file in path.iterdir() if file.is_file() and _looks_like_checkpoint(file))
    if not found:
        raise UserError(f"{path} holds no checkpoint ({', '.join(SUFFIXES)}); name the file.")
    if len(found) > 1:
        raise UserError(f"{path} holds {', '.join(file.name for file in found)}; name the one to convert.")
    return found[0], config


def _looks_like_checkpoint(file: Path) -> bool:
    # Tokenizers and token ids are called .bin as well.
    return file.suffix.lower() in SUFFIXES and (
        file.suffix.lower() != ".bin" or is_binary(file) or _start(file)[:2] in (b"PK", b"\x80\x02")
    )


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(512)


class Record(dict):
    """Stands for a class of the author's that the file names, and keeps the values that it was pickled with.

    build-nanogpt saves its config as a dataclass, others as argparse.Namespace; their code is never looked for.
    """

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


def _read(file: Path, records: tuple[str, ...] = ()) -> object:
    start = _start(file)
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
            return _read(file, (*records, wanted[1]))
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
    told = {}  # what objects beside the weights hold, such as the vocabulary of a tokenizer
    for value in content.values():
        if isinstance(value, pickled.Record):
            told |= {k: v for k, v in vars(value).items() if k in TOKEN_LISTS or TOKEN_IDS.fullmatch(k.lower())}
    return {**told, **content}


def _is_stored(file: Path) -> bool:
    # Of a zip that was packed again with compression, torch would map the compressed bytes and take them for weights.
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _unwrap(file: Path, content: object) -> tuple[Mapping, dict[str, object], dict[str, str], list[Mapping]]:
    """The state dict, the config beside it, what else is beside it and why, and every mapping on the way there."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead.")
    config, left_out, levels = {}, {}, [content]
    while True:
        config = _beside(content) | config
        for key in _configs(content):
            config |= content[key]
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), _only_state(content))
        # Two levels of wrapping are all that people write; a damaged file may hold itself.
        if wrapper is None or len(levels) == 3:
            return content, config, left_out, levels
        for key, value in content.items():
            if key != wrapper and key not in _configs(content):
                left_out[str(key)] = _why_beside(str(key), value) or f"beside {wrapper}"
        content = content[wrapper]
        levels.append(content)


def _only_state(content: Mapping) -> str | None:
    """The one key, whatever it is called, that holds a mapping of tensors, where no tensors stand beside it."""
    if any(isinstance(value, Tensor) and value.dim() for value in content.values()):
        return None
    found = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping)
        and not _why_beside(str(key), value)
        and any(isinstance(tensor, Tensor) and tensor.dim() for tensor in value.values())
    ]
    return found[0] if len(found) == 1 else None


def _beside(content: Mapping) -> dict[str, object]:
    """Sizes that people save beside the state dict without a config around them."""
    plain = {key: value for key, value in content.items() if isinstance(key, str) and key != CLASS}
    return {
        key: value
        for key, value in plain.items()
        if isinstance(value, (bool, int, float, str)) and not PROGRESS.search(key.lower())
    }


def _configs(content: Mapping) -> list[str]:
    return [key for key in CONFIGS if isinstance(content.get(key), Mapping)]


def _why_beside(key: str, value: object) -> str | None:
    if isinstance(value, (Mapping, list)):
        return next((reason for pattern, reason in BESIDE.items() if re.search(pattern, key.lower())), None)
    return None


def _weights(file: Path, state: Mapping) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are weights, under their names without prefixes, and what is none and why."""
    weights, left_out = {}, {}
    for name, value in state.items():
        name = str(name)
        if not isinstance(value, Tensor):
            if name not in _configs(state):
                left_out[name] = LeftOut.NO_TENSOR
        elif reason := _why_not_a_weight(file, name, value):
            left_out[name] = reason
        else:
            weights[name] = value.detach()
    while prefix := next((p for p in PREFIXES if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        # A sum is finite only if all numbers are, and takes a tenth of the time of isfinite().
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{file} has values that are not finite in {name!r}: the training that saved it diverged.")
    return weights, left_out


def _why_not_a_weight(file: Path, name: str, tensor: Tensor) -> str | None:
    # nanoGPT calls its (1, 1, T, T) causal mask `attn.bias`.
    if BUFFERS.search(name) or (name.endswith("attn.bias") and tensor.dim() == 4):
        return LeftOut.BUFFER
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise UserError(f"{file} holds {name!r} as a {tensor.device} {tensor.layout} tensor, not as plain numbers.")
    if tensor.numel() > max(LARGEST_UNSTORED, tensor.untyped_storage().nbytes() // tensor.element_size()):
        raise UserError(
            f"{file} says that {name!r} has the shape {tuple(tensor.shape)}, and holds "
            f"{tensor.untyped_storage().nbytes():,} bytes for it; save the model again with .contiguous() weights."
        )
    if tensor.dtype in FLOATS:
        return LeftOut.MASK if _is_triangular(tensor) else None
    if tensor.is_floating_point() or tensor.is_quantized or (name.endswith("weight") and tensor.dim() == 2):
        raise UserError(
            f"{file} holds {name!r} as {tensor.dtype}, and quantised weights are not supported; save the model in "
            "float32, float16 or bfloat16."
        )
    return f"{tensor.dtype} is not a weight"


def _is_triangular(tensor: Tensor) -> bool:
    """One number on and below the diagonal (or on and above it) of a square, and another in the rest.

    The square is of more than one row: (T, T), (1, T, T) or (1, 1, T, T).
    """
    if not 2 <= tensor.dim() <= 4 or tensor.shape[-1] < 2 or tensor.numel() != tensor.shape[-1] ** 2:
        return False
    if tensor.shape[-2] != tensor.shape[-1]:
        return False
    square = tensor.reshape(tensor.shape[-2:])
    diagonal, above, below = square[0, 0], square[0, 1], square[1, 0]
    if above == below or diagonal not in (above, below):
        return False
    full = torch.ones(square.shape, dtype=torch.bool)
    return torch.equal(square, torch.where(full.tril() if diagonal == below else full.tril(-1), below, above))


def _vocabulary(file: Path, places: list[Mapping]) -> tuple[dict[str, int] | None, list[str]]:
    """Token → id as `stoi`, `itos`, `chars` and the like say it, and the names of the entries that do."""
    found = []
    for place in places:
        for key, value in place.items():
            if isinstance(key, str) and (key in TOKEN_LISTS or TOKEN_IDS.fullmatch(key.lower())):
                found += [(key, ids)] if (ids := _token_ids(value)) else []
    # `chars` may lack the special tokens that `stoi` or `vocab` has, so the longest list counts, and only alone.
    lists = sorted(found, key=lambda entry: -len(entry[1]))
    found = [(key, ids) for key, ids in found if key not in TOKEN_LISTS] or lists[:1]
    if not found:
        return None, []
    first, vocabulary = found[0]
    for key, ids in found:
        if ids != vocabulary:
            token = next(token for token in (*ids, *vocabulary) if ids.get(token) != vocabulary.get(token))
            raise UserError(
                f"{file} holds {first!r} and {key!r}, which disagree on the token {token!r} "
                f"({vocabulary.get(token)} and {ids.get(token)}); keep the one that the model was trained with."
            )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return None, []
    return vocabulary, [key for key, _ in found]


def _token_ids(value: object) -> dict[str, int] | None:
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if all(isinstance(token, str) for token in value.values()):
            pairs = [(token, number) for number, token in pairs]
    elif isinstance(value, (list, tuple)):
        pairs = [(token, number) for number, token in enumerate(value)]
    else:
        return None
    if all(isinstance(token, str) and type(number) is int for token, number in pairs):
        return dict(pairs)
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
