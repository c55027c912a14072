"""The tensors of a checkpoint under canonical names: heads joined, fused projections split, every shape checked."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.mixing import by_block
from fledge.checkpoints.structure import SQUARES, SWAPS, Structure
from fledge.errors import UserError

REQUIRED_IN_BLOCK = ("query", "key", "value")
POSITIONS = ("rotary", "sinusoidal", "alibi", "none")
"""The kinds of positions without a tensor."""
QKV_ORDERS = tuple("".join(order) for order in permutations("qkv"))
"""The possible orders of query, key and value among three matrices."""
PARTS = {"q": "query", "k": "key", "v": "value"}
ORDERS = ("qkv_order", *SWAPS, *SQUARES)
"""Facts about which tensor is which, where only the order of definition proposes it, and how square ones are stored."""


def assemble(source: Mapping[str, Tensor], structure: Structure) -> tuple[dict[str, Tensor], int | None]:
    """Canonical tensors in the source's precision, and the number of heads if they were saved one by one.

    Heads are concatenated, fused projections split, (in, out) turned to (out, in). Where possible these are views.
    """
    read = {name: _read(name, source[name], name in structure.transposed) for name in structure.roles}
    by_role = {role: read[name] for name, role in structure.roles.items()}
    width = by_role["token_embedding.weight"].shape[-1] if "token_embedding.weight" in by_role else 0
    tensors: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for name, role in structure.roles.items():
        tensor = read[name]
        head = re.fullmatch(r"(.*\.(?:query|key|value))\.(\d+)\.(weight|bias)", role)
        fused = re.fullmatch(r"(blocks\.\d+)\.([qkv]{3})\.(weight|bias)", role)
        if head:
            heads.setdefault(f"{head[1]}.{head[3]}", {})[int(head[2])] = tensor
        elif fused:
            block, letters, kind = fused.groups()
            output = by_role.get(f"{block}.output.weight")
            parts = _split_fused(name, tensor, letters, width if output is None else output.shape[-1])
            tensors |= {f"{block}.{part}.{kind}": piece for part, piece in parts.items()}
        elif ".mlp_gate_in." in role:
            halves = zip(("mlp_gate", "mlp_in"), tensor.chunk(2), strict=True)
            tensors |= {role.replace("mlp_gate_in", part): half for part, half in halves}
        elif role == "alibi.slopes":
            tensors[role] = tensor.flatten()
        elif role in tensors:
            raise UserError(f"Two tensors were taken for {role}, one of them {name}; name it in a --mapping.")
        else:
            tensors[role] = tensor
    joined, count = _join_heads(heads)
    return by_block(_with_gains(tensors | joined)), count


def _with_gains(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with LayerScale's gains (D,) in the matrices whose output they multiply (Touvron et al. 2021).

    Raises:
        UserError: there is no such matrix.
    """
    for name in [name for name in tensors if name.endswith("_gain.weight")]:
        block, part = name.removesuffix("_gain.weight").rsplit(".", 1)
        gain, matrix = tensors.pop(name).double(), f"{block}.{'output' if part == 'attention' else 'mlp_out'}"
        if f"{matrix}.weight" not in tensors:
            raise UserError(f"{name} multiplies what {matrix} gives, and the checkpoint has no {matrix}.")
        tensors[f"{matrix}.weight"] = gain[:, None] * tensors[f"{matrix}.weight"].double()
        if f"{matrix}.bias" in tensors:
            tensors[f"{matrix}.bias"] = gain * tensors[f"{matrix}.bias"].double()
    return tensors


def _read(name: str, tensor: Tensor, transposed: bool) -> Tensor:
    """A tensor of the source without dimensions of one, as (out, in)."""
    tensor = tensor.squeeze() if tensor.dim() > 2 else tensor
    if not tensor.dim():
        raise UserError(f"{name} has the shape (), and no weight is a single number.")
    return tensor.T if transposed and tensor.dim() == 2 else tensor


def _split_fused(name: str, tensor: Tensor, letters: str, queries: int) -> dict[str, Tensor]:
    """The parts of a fused projection, whose `letters` (`qkv`) stand in the order of its rows; `queries` are of q."""
    key_rows, odd = divmod(len(tensor) - queries, 2)
    if key_rows <= 0 or odd:
        raise UserError(f"{name} has {len(tensor)} rows, which query, key and value cannot share.")
    pieces = tensor.split([queries if letter == "q" else key_rows for letter in letters])
    return {PARTS[letter]: piece for letter, piece in zip(letters, pieces, strict=True)}


def _join_heads(heads: Mapping[str, Mapping[int, Tensor]]) -> tuple[dict[str, Tensor], int | None]:
    """Projections whose heads were saved one by one, and how many heads there are; None if there are none such."""
    count = max((len(indices) for indices in heads.values()), default=None)
    joined = {}
    for name, indices in heads.items():
        if sorted(indices) != list(range(count or 0)):
            raise UserError(
                f"The attention heads of {name} are numbered {sorted(indices)}; every block needs them all."
            )
        if len({tensor.shape for tensor in indices.values()}) > 1:
            raise UserError(f"The attention heads of {name} have different shapes.")
        joined[name] = torch.cat([indices[h] for h in sorted(indices)])
    return joined, count


def check_shapes(tensors: dict[str, Tensor]) -> int:
    """Checks that no block is missing, that all are alike, and each shape; returns the number of blocks.

    Raises:
        UserError: a tensor that is missing, or has another shape than the others demand.
    """
    layers = Counter(int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))
    if not layers or sorted(layers) != list(range(len(layers))):
        raise UserError(f"The checkpoint's layers are numbered {sorted(layers)}; they must run from 0 without a gap.")
    first = _parts(tensors, 0)
    mlp = "experts.0.mlp_in" if "router.weight" in first else "mlp_in"
    required = ["token_embedding", *(f"blocks.{n}.{role}" for n in layers for role in (*REQUIRED_IN_BLOCK, mlp))]
    for role in required:
        if f"{role}.weight" not in tensors:
            raise UserError(f"The checkpoint has no {role}, which every GPT has; name it in a --mapping.")
    for n in sorted(layers):
        own = _parts(tensors, n)
        if own != first:
            raise UserError(f"Layer {n} and layer 0 differ in {', '.join(sorted(own ^ first))}; all must be alike.")
    width, queries = tensors["token_embedding.weight"].shape[-1], len(tensors["blocks.0.query.weight"])
    if queries != width and "blocks.0.output.weight" not in tensors:
        raise UserError(
            f"The heads are {queries} wide together, and nothing leads back to the model's width of {width}."
        )
    shapes = _shapes(tensors)
    for name, tensor in tensors.items():
        role, kind = name.split(".")[-2:]
        if kind == "bias" and role in ("token_embedding", "position_embedding"):
            raise UserError(f"{name} is a bias, and no embedding has one; name in a --mapping what it is.")
        expected = shapes(name.rpartition(".")[0])
        expected = expected if kind != "bias" else expected[:1]
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} has the shape {tuple(tensor.shape)}, and the other tensors demand {expected}.")
    return len(layers)


def _parts(tensors: Mapping[str, Tensor], n: int) -> set[str]:
    """The parts of block `n`; value embeddings may exist in only some blocks."""
    parts = {name.removeprefix(f"blocks.{n}.") for name in tensors if name.startswith(f"blocks.{n}.")}
    return {part for part in parts if not part.startswith("value_")}


def _shapes(tensors: Mapping[str, Tensor]) -> Callable[[str], tuple[int, ...]]:
    """The shape that the weight of each module must have, by its canonical name."""
    vocab_size, width = tensors["token_embedding.weight"].shape[0], tensors["token_embedding.weight"].shape[-1]
    rows = {role: len(tensors[f"blocks.0.{role}.weight"]) for role in REQUIRED_IN_BLOCK}
    free = ("position_embedding", "router", "alibi", "query_norm", "key_norm", "value_gate", "smear_gate")
    scalars = {"residual_lambdas": 2, "value_lambdas": 2, "smear_lambda": 1, "backout_lambda": 1}

    def shape(module: str) -> tuple[int, ...]:
        place, _, role = module.rpartition(".")
        if role in free:
            own = tensors[f"{module}.slopes" if role == "alibi" else f"{module}.weight"]
            gate = role in ("value_gate", "smear_gate") and own.dim() > 1 and own.shape[1] <= width
            return tuple(own.shape) if gate else (len(own), width) if own.dim() > 1 else (len(own),)
        if role in scalars:
            return (scalars[role],)
        if role.startswith("mlp_"):
            # The MLPs of two blocks may differ, and those of two experts may not.
            first = re.sub(r"blocks.[0-9]+", "blocks.0", place) if "." in place.removeprefix("blocks.") else place
            inner = len(tensors[f"{first}.mlp_in.weight"])
            return (width, inner) if role == "mlp_out" else (inner, width)
        if "norm" in role:
            return (width,)
        return {
            "token_embedding": (vocab_size, width),
            "head": (vocab_size, width),
            "value_embedding": (vocab_size, rows["value"]),
            "shared_gate": (1, width),
            "query": (rows["query"], width),
            "output": (width, rows["query"]),
        }.get(role, (rows["key"], width))

    return shape


def reordered(gpt: CanonicalGPT, fact: str, value: Any, undo: bool = False) -> CanonicalGPT:
    """The model with tensors of one shape reordered as a `fact` says, or back again (`undo`).

    `qkv_order` (`kqv`, for example) says what the first, second and third of three matrices are that were taken for
    query, key and value; a fact of `SWAPS` whether its two tensors are the other way round; one of `SQUARES` whether
    its matrices are stored (in, out).
    """
    if fact in SQUARES:
        return _turned(gpt, SQUARES[fact]) if value else gpt
    if fact == "qkv_order":
        places = {role: PARTS[letter] for role, letter in zip(PARTS.values(), value, strict=True)}
    else:
        places = dict(zip(SWAPS[fact], reversed(SWAPS[fact]), strict=True)) if value else {}
    places = {new: old for old, new in places.items()} if undo else places
    return replace(gpt, tensors={_renamed(name, places): tensor for name, tensor in gpt.tensors.items()})


def _turned(gpt: CanonicalGPT, roles: tuple[str, ...]) -> CanonicalGPT:
    """The model with the square matrices of these roles transposed."""
    return replace(gpt, tensors={name: x.T if is_square(gpt, name, roles) else x for name, x in gpt.tensors.items()})


def is_square(gpt: CanonicalGPT, name: str, roles: tuple[str, ...]) -> bool:
    """Whether the tensor of this name is a square matrix of one of `roles`, and not a part of another tensor."""
    shape = gpt.tensors[name].shape if name in gpt.tensors else ()
    return name.split(".")[-2] in roles and len(shape) == 2 and shape[0] == shape[1]


def with_positions(gpt: CanonicalGPT, kind: str) -> CanonicalGPT:
    """A model that has no table of positions with one of `POSITIONS`; the table of sinusoids is never trained."""
    tensors = {name: tensor for name, tensor in gpt.tensors.items() if name != "position_embedding.weight"}
    if kind == "sinusoidal":
        tensors["position_embedding.weight"] = sinusoids(gpt.context_length, gpt.width)
    rope = (gpt.rope or "interleaved") if kind == "rotary" else None
    return replace(gpt, tensors=tensors, rope=rope, alibi=kind == "alibi")


def within_table(gpt: CanonicalGPT) -> CanonicalGPT:
    """The model with a context no longer than its table of positions has rows behind the offset."""
    table = gpt.tensors.get("position_embedding.weight")
    rows = gpt.context_length if table is None else len(table) - gpt.position_offset
    return replace(gpt, context_length=min(gpt.context_length, rows))


def sinusoids(length: int, width: int) -> Tensor:
    """The table (T, D) of Vaswani et al. 2017, section 3.5: sines in the even columns, cosines in the odd ones."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def _renamed(name: str, places: Mapping[str, str]) -> str:
    *path, role, kind = name.split(".")
    return ".".join([*path, places.get(role, role), kind])
