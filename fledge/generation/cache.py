"""The KV cache of a batch, and attention over it.

On a CPU attention takes the time in which keys and values are read. So rows of similar length lie side by side, and
each group of them is read to its own longest row instead of the longest of all. Where the processor multiplies bfloat16
and the model is in it, keys and values are too, and are read in half the time.
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

from fledge.cpu import multiplies_bf16
from fledge.guards import check_overrides
from fledge.models import attention_of

NAME = "groups_of_rows"
GROUP = 16  # rows that are read to one length
PLACES = 32  # rows are read to a multiple of this: oneDNN makes, and keeps, a kernel for each length
# During a step the rows of each group, how many places they are read to, and what is added to their scores (rows, 1, 1,
# places), which hides what lies beyond a row's own text; None outside of a step.
Group = tuple[slice, int, Tensor | None]
GROUPS: ContextVar[list[Group] | None] = ContextVar("groups", default=None)


@check_overrides
class Slots(Cache):
    """Keys and values (rows, heads, places, head width) of each layer. Row i's tokens lie at 0 … lengths[i] − 1."""

    def __init__(self, rows: int, capacity: int, kept_in: torch.dtype | None):
        """`kept_in` is the type of keys and values; `None` is as the model makes them (see `cache_type`)."""
        super().__init__(layers=[])
        self.rows, self.kept_in = rows, kept_in
        self.places = 0 if kept_in else capacity  # where rows are grouped, buffers grow with the texts
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # the first row of the prefill
        self.copies: Tensor | None = None  # for each row of the prefill, the number of its prompt
        self.lengths: Tensor | None = None  # (rows,) during a step, `None` during prefill
        self.longest = 0

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        # Rotary positions, in float32 under autocast, leave keys in another type than values.
        keys, values = (x if self.kept_in is None else x.to(self.kept_in) for x in (key_states, value_states))
        count, length = keys.shape[0], keys.shape[2]
        if layer_idx == len(self.buffers):
            self.buffers.append((keys[:0], values[:0]))
        if self.lengths is None and self.kept_in:
            self.places = max(self.places, up_to(length, PLACES))
        if self.buffers[layer_idx][0].shape[2] != self.places or not len(self.buffers[layer_idx][0]):
            of_keys, of_values = self.buffers[layer_idx]
            self.buffers[layer_idx] = self.fitted(of_keys), self.fitted(of_values)
        if self.lengths is None:
            for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
                copied = new if self.copies is None else new[self.copies]
                buffer[self.first : self.first + len(copied), :, :length] = copied
            return keys, values
        each = torch.arange(count, device=keys.device)
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[each, :, self.lengths] = new[:, :, 0]
        held_keys, held_values = self.buffers[layer_idx]
        read = self.places if self.kept_in else self.longest + 1
        return held_keys[:count, :, :read], held_values[:count, :, :read]

    def fitted(self, buffer: Tensor) -> Tensor:
        """A buffer with as many rows and places as there are now, and what `buffer` holds of them."""
        # Zeros, not whatever memory held: a masked NaN is still a NaN.
        new = buffer.new_zeros(self.rows, buffer.shape[1], self.places, buffer.shape[3])
        rows, places = min(len(buffer), self.rows), min(buffer.shape[2], self.places)
        new[:rows, :, :places] = buffer[:rows, :, :places]
        return new

    def groups(self) -> list[Group]:
        """The groups of the rows that are in a step, for whose longest there is room after it."""
        assert self.lengths is not None
        needed = up_to(self.longest + 1, PLACES)
        if not self.places // 2 < needed <= self.places:
            self.places = needed
        groups: list[Group] = []
        for begin in range(0, len(self.lengths), GROUP):
            last = self.lengths[begin : begin + GROUP, None, None, None]
            places = up_to(int(last.max()) + 1, PLACES)
            if self.kept_in == torch.bfloat16 and places > self.places // 2:
                places = self.places  # a product of a part would copy it first
            hidden = torch.zeros(len(last), 1, 1, places).masked_fill_(torch.arange(places) > last, float("-inf"))
            groups.append((slice(begin, begin + GROUP), places, hidden))
        return groups

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

    A step is in the type of the cache. Each row sees all of its own text and no more, as `is_batched` demands.
    """
    sdpa, groups = AttentionInterface()["sdpa"], GROUPS.get()
    with torch.autocast("cpu", enabled=False):  # it would make another copy of the cache for every token
        query_in = query.to(key.dtype)
        if groups is None:
            return sdpa(module, query_in, key, value, attention_mask, **kwargs)[0].to(query.dtype), None
        attend = by_products if key.dtype == torch.bfloat16 else sdpa
        mixed = [
            attend(module, query_in[rows], key[rows, :, :places], value[rows, :, :places], hidden, **kwargs)[0]
            for rows, places, hidden in groups
        ]
    return torch.cat(mixed).to(query.dtype), None


def by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` of one query a row, in bfloat16: torch's own kernel takes a few times as long there."""
    rows, heads, _one, width = query.shape
    shared = query.reshape(rows * key.shape[1], -1, width)  # the queries of each head of keys
    scores = torch.bmm(shared, key.flatten(0, 1).transpose(1, 2)).float()
    scores = scores.mul_(width**-0.5 if scaling is None else scaling).unflatten(0, (rows, -1))
    if attention_mask is not None:
        scores += attention_mask
    mixed = torch.bmm(scores.softmax(-1).to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return mixed.view(rows, 1, heads, -1), None


def can_group(model: PreTrainedModel) -> bool:
    """Whether `groups_of_rows` can replace the attention of `model` and is faster: on a CPU, for `sdpa`."""
    return model.device.type == "cpu" and attention_of(model) == "sdpa" and model._supports_attention_backend


def cache_type(model: PreTrainedModel) -> torch.dtype | None:
    """What keys and values of `model` are to be kept in: as they are, except where `groups_of_rows` wants another type.

    In float32 torch's attention takes half the time of half precision's on a CPU. Products in bfloat16 are faster yet.
    """
    if not can_group(model):
        return None
    computed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype
    fast = computed == torch.bfloat16 and multiplies_bf16()
    return computed if fast else torch.promote_types(computed, torch.float32)


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
def step(cache: Slots) -> Iterator[None]:
    """Inside, `groups_of_rows` reads the rows of a step group by group, where the cache is grouped."""
    token = GROUPS.set(cache.groups() if cache.kept_in else None)
    try:
        yield
    finally:
        GROUPS.reset(token)


def up_to(count: int, size: int) -> int:
    """The next multiple of `size` from `count` on."""
    return -(-count // size) * size
