"""The KV cache of a batch, and attention over it.

On a CPU the time of attention is the time to read keys and values. So rows of similar length are neighbours, and
attention reads each group of them up to the longest row of the group instead of the longest of all.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import override

from fledge.guards import check_overrides
from fledge.models import attention_of

NAME = "groups_of_rows"
GROUP = 16  # rows that are read up to the same length
# The longest row of each group during a step, new token included; `None` outside of a step.
LENGTHS: ContextVar[list[int] | None] = ContextVar("lengths", default=None)


@check_overrides
class Slots(Cache):
    """Keys and values (rows, heads, capacity, head width) of each layer. Row i's tokens are at 0 … lengths[i] − 1."""

    def __init__(self, rows: int, capacity: int, wide: bool):
        """`wide` stores those of a half-precision model in float32, which `groups_of_rows` computes in."""
        super().__init__(layers=[])
        self.shape = rows, capacity
        self.wide = wide
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # the first row of the prefill
        self.copies: Tensor | None = None  # for each row of the prefill, the number of its prompt
        self.lengths: Tensor | None = None  # (rows,) during a step, `None` during prefill
        self.longest = 0

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = key_states, value_states
        if layer_idx == len(self.buffers):
            rows, capacity = self.shape
            shape = rows, keys.shape[1], capacity, keys.shape[3]
            dtype = torch.promote_types(keys.dtype, torch.float32) if self.wide else keys.dtype
            # Zeros, not whatever memory held: a masked NaN is still a NaN.
            self.buffers.append((keys.new_zeros(shape, dtype=dtype), values.new_zeros(shape, dtype=dtype)))
        count, length = keys.shape[0], keys.shape[2]
        if self.lengths is None:
            for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
                copied = new if self.copies is None else new[self.copies]
                buffer[self.first : self.first + len(copied), :, :length] = copied
            return keys, values
        each = torch.arange(count, device=keys.device)
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[each, :, self.lengths] = new[:, :, 0].to(buffer.dtype)
        held_keys, held_values = self.buffers[layer_idx]
        return held_keys[:count, :, : self.longest + 1], held_values[:count, :, : self.longest + 1]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.lengths is None else self.longest

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def move(self, source: int, target: int, length: int) -> None:
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]


def groups_of_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers: `sdpa`, applied to each group of rows separately during a step.

    A step computes in the dtype of the cache: on a CPU, torch's attention in bfloat16 takes twice as long as in
    float32.
    """
    sdpa, lengths = AttentionInterface()["sdpa"], LENGTHS.get()
    if lengths is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        dtype = key.dtype if attention_mask.is_floating_point() else attention_mask.dtype
        attention_mask = attention_mask.expand(len(query), -1, -1, -1).to(dtype)
    mixed = []
    for i, longest in enumerate(lengths):
        rows = slice(i * GROUP, (i + 1) * GROUP)
        mask = None if attention_mask is None else attention_mask[rows, ..., :longest]
        held = key[rows, :, :longest], value[rows, :, :longest]
        with torch.autocast("cpu", enabled=False):  # it would make another copy of the cache for every token
            mixed.append(sdpa(module, query[rows].to(key.dtype), *held, mask, **kwargs)[0])
    return torch.cat(mixed).to(query.dtype), None


def can_group(model: PreTrainedModel) -> bool:
    """Whether `groups_of_rows` can replace the attention of `model` and is faster: on a CPU, for `sdpa`."""
    return model.device.type == "cpu" and attention_of(model) == "sdpa" and model._supports_attention_backend


@contextlib.contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` uses `groups_of_rows` if it can. Outside of a step that is transformers' `sdpa`."""
    if not can_group(model):
        yield
        return
    AttentionInterface.register(NAME, groups_of_rows)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def step(lengths: list[int]) -> Iterator[None]:
    """Inside, `groups_of_rows` reads rows of these `lengths`, new token included, group by group."""
    token = LENGTHS.set([max(lengths[i : i + GROUP]) for i in range(0, len(lengths), GROUP)])
    try:
        yield
    finally:
        LENGTHS.reset(token)
