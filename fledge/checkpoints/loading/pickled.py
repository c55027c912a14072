"""Reads tensors and plain values from pickles of whole modules. Classes that a pickle names are never imported or run.

`torch.save(model)` and `pickle.dump(model)` store a module as the name of its class and the contents of its
`__dict__`. Only the contents are needed, so every object becomes an inert `Record` of what was stored.
"""

import collections
import io
import pickle
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
NORMS = ("LayerNorm", "RMSNorm")
MOST_DEPTH = 60
TORCH_LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"
OF_TORCH_LAYER: dict[object, str] = {1: "relu", 2: "gelu"}  # by its `activation_relu_or_gelu`
UNKNOWN = ""  # another activation of such a layer
PLAIN = (int, float, str)
HOSTILE = {
    "os", "posix", "nt", "subprocess", "builtins", "__builtin__", "sys", "shutil", "runpy", "importlib", "socket",
    "pty", "code", "ctypes", "webbrowser",
}  # fmt: skip
"""Packages whose functions no model needs; nothing of them would run, but a file that names one is refused."""


class Record:
    """What a pickle stored of one object; `kind` is the class that it names."""

    kind = ""
    stored: list[object]

    def __new__(cls, *args: object, **kwargs: object) -> "Record":
        made = super().__new__(cls)
        made.__dict__["stored"] = list(args)
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def append(self, value: object) -> None:
        self.stored.append(value)

    def extend(self, values: list) -> None:
        self.stored.extend(values)

    def __setitem__(self, key: object, value: object) -> None:
        self.stored.append((key, value))

    def __hash__(self) -> int:
        return id(self)


def _tensor(
    storage: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: object = None,
    metadata: object = None,
) -> Tensor:
    """Like torch's own function, but refuses a tensor that is larger than its storage."""
    untyped, dtype = storage.untyped(), storage.dtype
    last = offset + sum((dim - 1) * step for dim, step in zip(size, stride, strict=True) if dim)
    count = 1
    for dim in size:
        count *= dim
    if min((offset, *size, *stride), default=0) < 0 or count * dtype.itemsize > untyped.nbytes():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    if count and (last + 1) * dtype.itemsize > untyped.nbytes():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, tuple(size), tuple(stride))


def _parameter(data: Tensor, *rest: object) -> Tensor:
    return data


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _made(kind: type, base: type, state: object) -> object:
    """`copyreg._reconstructor`, which protocols 0 and 1 use."""
    return kind() if isinstance(kind, type) and issubclass(kind, Record) else Record(state)


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


SAFE = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): lambda *args: torch.device("cpu"),
    ("copyreg", "_reconstructor"): _made,
    ("copy_reg", "_reconstructor"): _made,
    ("_codecs", "encode"): _bytes,
}
for _name in ("set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "complex", "slice", "range"):
    SAFE[("builtins", _name)] = SAFE[("__builtin__", _name)] = getattr(__import__("builtins"), _name)


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors and containers, refuses names that only an attack uses, and makes a `Record` of the rest."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in SAFE:
            return SAFE[module, name]
        if module.split(".")[0] in HOSTILE:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return type(name.rpartition(".")[2], (Record,), {"kind": f"{module}.{name}"})


INERT = types.ModuleType("fledge_inert_pickle")
INERT.__dict__.update(Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load())


def read_inert(file: Path) -> object:
    """What a pickle, or a file of torch.save, holds, with a `Record` for each object of a class.

    Raises:
        pickle.UnpicklingError and whatever else damaged bytes lead to.
    """
    with file.open("rb") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes whose source torch cannot find
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith(("constants.pkl", "/code/")) or "/code/" in name for name in archive.namelist()):
                    raise pickle.UnpicklingError("a TorchScript program")
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=INERT)
        content = Unpickler(opened, encoding="latin1").load()
        if isinstance(content, int):  # the magic number before what an old torch.save wrote
            opened.seek(0)
            content = torch.load(opened, map_location="cpu", weights_only=False, pickle_module=INERT)
        return content


def is_module(content: object) -> TypeGuard[Record]:
    return isinstance(content, Record) and isinstance(content.__dict__.get("_modules"), Mapping)


def modules_in(content: object) -> Iterator[tuple[str, Record]]:
    """Finds the whole modules in a file's content, with their place: the content itself, or an entry of a mapping."""
    if is_module(content):
        yield "", content
    elif isinstance(content, Mapping):
        yield from ((str(key), value) for key, value in content.items() if is_module(value))


def state_of(module: Record, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """The state dict of a module that was pickled whole."""
    found, inside = {}, module.__dict__
    skipped = inside.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (inside.get(kind) or {}).items():
            if isinstance(tensor, Tensor) and name not in skipped:
                found[prefix + str(name)] = tensor
    for name, part in (inside.get("_modules") or {}).items():
        if is_module(part) and depth < MOST_DEPTH:
            found |= state_of(part, f"{prefix}{name}.", depth + 1)
    return found


def config_of(module: Record) -> dict[str, object]:
    """Collects the plain values of a pickled module: its own, and those on which all modules inside it agree.

    A module's class says more: one kind of activation, or norms that share an epsilon.
    """
    parts = list(_modules_inside(module))
    configs = [value for value in vars(module).values() if isinstance(value, Record) and not is_module(value)]
    stated = [pair for part in parts for pair in _stated_by(part)]
    stated += [(key, value) for config in configs for key, value in vars(config).items() if isinstance(value, PLAIN)]
    values: dict[str, set] = {}
    for key, value in stated:
        values.setdefault(key, set()).add((type(value), value))
    agreed = {key: next(iter(found))[1] for key, found in values.items() if len(found) == 1}
    agreed |= {key: value for key, value in vars(module).items() if isinstance(value, PLAIN) and key[0] != "_"}
    agreed = {key: value for key, value in agreed.items() if key not in ("in_features", "out_features", "training")}
    kinds = {kind for part in parts if (kind := _activation_of(part)) is not None}
    return agreed | ({"activation": kinds.pop()} if len(kinds) == 1 and UNKNOWN not in kinds else {})


def _modules_inside(module: Record, depth: int = 0) -> Iterator[Record]:
    """A module, and the modules inside it at any depth."""
    yield module
    for below in (vars(module).get("_modules") or {}).values():
        if is_module(below) and depth < MOST_DEPTH:
            yield from _modules_inside(below, depth + 1)


def _stated_by(part: Record) -> Iterator[tuple[str, object]]:
    """The plain values of one module. The epsilon and the bias of a norm get names of their own."""
    if part.kind == TORCH_LAYER:
        yield "norm_placement", "pre" if vars(part).get("norm_first") else "post"
    is_norm = part.kind.rpartition(".")[2] in NORMS
    for key, value in vars(part).items():
        if isinstance(value, PLAIN) and not key.startswith("_") and key != "training":
            yield f"norm_{key}" if is_norm and key in ("eps", "p", "bias") else key, value


def _activation_of(part: Record) -> str | None:
    """The activation that a module is or names, if any."""
    name = part.kind.rpartition(".")[2]
    if part.kind == TORCH_LAYER:
        return OF_TORCH_LAYER.get(vars(part).get("activation_relu_or_gelu"), UNKNOWN)
    if name in ACTIVATIONS:
        return "gelu_tanh" if vars(part).get("approximate") == "tanh" else ACTIVATIONS[name]
    return None
