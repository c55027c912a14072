"""Splits three-dimensional parameters with one matrix per head, as in TransformerLens, into matrices."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from fledge.checkpoints.modules import Module
from fledge.checkpoints.words import OUTPUT


def split_heads(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Splits queries, keys and values (heads, in, out) or (heads, out, in) by head, and joins the heads of an output.

    A weight `W_in` and its bias `b_in` become the module `W_in`.

    Returns:
        The tensors, in their order, and the names of those that are stored (out, in), whatever the others are.
    """
    width = _width(tensors)
    found: dict[str, Tensor] = {}
    oriented: set[str] = set()
    for name, tensor in tensors.items():
        home, dot, last = name.rpartition(".")
        letter, place = last[:2], f"{home}{dot}"
        weight = next((f"{place}{w}{last[1:]}" for w in "Ww" if f"{place}{w}{last[1:]}" in tensors), None)
        if letter in ("W_", "w_") and (tensor.dim() == 3 or f"{place}b{last[1:]}" in tensors):
            parts = _parts(name, tensor, width)
            oriented |= {part for part in parts if tensor.dim() == 3}
        elif letter == "b_" and weight and tensor.dim() == 2 and tensors[weight].dim() == 3:
            parts = {f"{weight}.{h}.bias": row for h, row in enumerate(tensor)}
        else:
            parts = {f"{weight}.bias" if letter == "b_" and weight else name: tensor}
        found |= parts
    return found, frozenset(oriented)


def _parts(name: str, tensor: Tensor, width: int) -> dict[str, Tensor]:
    """The matrices (out, in) of a weight of three dimensions under their names; other weights stay as they are."""
    if tensor.dim() < 3:
        return {f"{name}.w": tensor}
    module = Module(name)
    inputs = [side for side in (1, 2) if tensor.shape[side] == width]
    if len(inputs) != 1 or 1 in tensor.shape:
        return {name: tensor}
    if module.projection in ("query", "key", "value"):
        heads = tensor.transpose(1, 2) if inputs == [1] else tensor
        return {f"{name}.{h}.weight": head for h, head in enumerate(heads)}
    if module.count(OUTPUT):
        heads = tensor.transpose(1, 2) if inputs == [2] else tensor
        return {f"{name}.weight": torch.cat(list(heads), dim=1)}
    return {name: tensor}


def _width(tensors: Mapping[str, Tensor]) -> int:
    """The most frequent length of a vector, or, where there are none, of a side of a matrix."""
    vectors = Counter(len(tensor) for tensor in tensors.values() if tensor.dim() == 1)
    sides = Counter(side for tensor in tensors.values() if tensor.dim() == 2 for side in tensor.shape)
    return max(vectors or sides or {0: 0}, key=(vectors or sides or {0: 0}).__getitem__)
