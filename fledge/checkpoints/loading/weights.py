"""Which tensors of a state dict are weights, and why the others are not."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoints.loading.unwrapping import configs_in
from fledge.errors import UserError

PREFIXES = ("module.", "_orig_mod.", "model.")

# Buffers that hand-written modules register beside their weights: causal masks, rotary tables, counted positions.
BUFFERS = re.compile(
    r"(^|\.)(mask|IGNORE|tril|triu|(causal|attn|attention)_mask|masked_bias|freqs_(cis|cos|sin)|inv_freq|cos|sin|"
    r"(cos|sin)_cache(d)?|(position|pos)_ids)$"
)

LARGEST_UNSTORED = 1 << 24
"""Numbers that a tensor may have beyond those it stores: a small one may be one row that was expanded."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LeftOut(StrEnum):
    """Why something in the file is not a weight; other reasons name an entry or a type."""

    BUFFER = "a buffer"
    MASK = "a triangular mask"
    NO_TENSOR = "not a tensor"


def weights_in(file: Path, state: Mapping) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are weights, under their names without prefixes, and what is none and why."""
    weights: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, value in state.items():
        name = str(name)
        if not isinstance(value, Tensor):
            if name not in configs_in(state):
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
