"""The KV cache of a batch, and attention over it.

On a CPU the time of attention is the time to read keys and values. So rows of similar length are neighbours, and
attention reads each group of them up to the longest row of the group instead of the longest of all. Keys and values in
bfloat16 are read in half the time, where the processor multiplies it.
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
GROUP = 16  # rows that are read up to the same length
ROWS, PLACES = 2 * GROUP, 32  # in bfloat16 the rows of a step, and the places that are read, are multiples of these
# The rows of each group during a step, and how many places of them are read; `None` outside of a step.
GROUPS: ContextVar[list[tuple[slice, int]] | None] = ContextVar("groups", default=None)


@check_overrides
class Slots(Cache):
    """Keys and values (rows, heads, places, head width) of each layer. Row i's tokens are at 0 … lengths[i] − 1.

    In bfloat16 the sizes of a step are multiples of `ROWS` and `PLACES`, because oneDNN makes a kernel for each shape
    of a product, in a millisecond, and keeps it, in half a megabyte. Its products copy what is only a part of a buffer,
    so buffers grow and shrink with the texts and are read whole, all rows up to one length. In other types a buffer has
    room for `capacity` tokens from the start, and rows are read in groups.
    """

    def __init__(self, rows: int, capacity: int, kept_in: torch.dtype | None):
        """`kept_in` is the type of keys and values; `None` keeps that of the model (see `cache_type`)."""
        super().__init__(layers=[])
        self.kept_in, self.few_shapes = kept_in, kept_in == torch.bfloat16
        self.in_groups = self.few_shapes and rows > GROUP
        self.rows = self.padded(rows)
        self.places = 0 if self.few_shapes else capacity
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # the first row of the prefill
        self.copies: Tensor | None = None  # for each row of the prefill, the number of its prompt
        self.lengths: Tensor | None = None  # (rows,) during a step, `None` during prefill
        self.longest = 0

    def padded(self, rows: int) -> int:
        """How many rows take part in a step of `rows`."""
        if not self.in_groups:
            return rows
        return up_to(rows, ROWS) if rows > GROUP else GROUP

    def begin_step(self, lengths: list[int], device: torch.device) -> Tensor | None:
        """Makes room for another token after each row's `lengths`; returns which places a row sees, if not all do.

        The mask (rows, 1, 1, places) is `None` if each row sees all places.
        """
        self.lengths, self.longest = torch.tensor(lengths, device=device), max(lengths)
        if self.few_shapes:
            needed = up_to(self.longest + 1, PLACES)
            if not self.places // 2 < needed <= self.places:
                self.places = needed
        if min(lengths) + 1 == self.read:
            return None
        return (torch.arange(self.read, device=device) <= self.lengths[:, None])[:, None, None]

    @property
    def read(self) -> int:
        """How many places of each row are read in a step."""
        return self.places if self.few_shapes else self.longest + 1

    def groups(self) -> list[tuple[slice, int]]:
        """The rows of each group of a step, and how many places of them are read."""
        assert self.lengths is not None
        if self.few_shapes:
            return [(slice(0, len(self.lengths)), self.places)]
        longest = [int(lengths.max()) + 1 for lengths in self.lengths.split(GROUP)]
        return [(slice(i * GROUP, (i + 1) * GROUP), places) for i, places in enumerate(longest)]

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = key_states, value_states
        count, length = keys.shape[0], keys.shape[2]
        if self.few_shapes and self.lengths is None:
            self.places = max(self.places, up_to(length, PLACES))
        if layer_idx == len(self.buffers):
            dtype = self.kept_in or keys.dtype
            self.buffers.append((keys[:0].to(dtype), values[:0].to(dtype)))
        held_keys, held_values = self.buffers[layer_idx]
        if held_keys.shape[::2] != (self.rows, self.places):
            held_keys, held_values = self.buffers[layer_idx] = self.fitted(held_keys), self.fitted(held_values)
        if self.lengths is None:
            for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
                copied = new if self.copies is None else new[self.copies]
                buffer[self.first : self.first + len(copied), :, :length] = copied
            return keys, values
        each = torch.arange(count, device=keys.device)
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[each, :, self.lengths] = new[:, :, 0].to(buffer.dtype)
        return held_keys[:count, :, : self.read], held_values[:count, :, : self.read]

    def fitted(self, buffer: Tensor) -> Tensor:
        """A buffer with as many rows and places as are needed now, and what `buffer` holds of them."""
        # Zeros, not whatever memory held: a masked NaN is still a NaN.
        new = buffer.new_zeros(self.rows, buffer.shape[1], self.places, buffer.shape[3])
        rows, places = min(len(buffer), self.rows), min(buffer.shape[2], self.places)
        new[:rows, :, :places] = buffer[:rows, :, :places]
        return new

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

    A step computes in the dtype of the cache: see `cache_type`.
    """
    sdpa, groups = AttentionInterface()["sdpa"], GROUPS.get()
    if groups is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        dtype = key.dtype if attention_mask.is_floating_point() else attention_mask.dtype
        attention_mask = attention_mask.expand(len(query), -1, -1, -1).to(dtype)
    attend = by_products if key.dtype == torch.bfloat16 else sdpa
    mixed = []
    with torch.autocast("cpu", enabled=False):  # it would make another copy of the cache for every token
        for rows, places in groups:
            mask = None if attention_mask is None else attention_mask[rows, ..., :places]
            held = key[rows, :, :places], value[rows, :, :places]
            mixed.append(attend(module, query[rows].to(key.dtype), *held, mask, **kwargs)[0])
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
    """transformers' `sdpa` of one query a row, in bfloat16, with a mask of True and False.

    Torch's own kernel takes about five times as long for it. Rounds as `fledge.training.attention` does.
    """
    rows, heads, _one, width = query.shape
    shared = query.reshape(rows * key.shape[1], -1, width)  # the queries of each head of keys
    unseen = query.new_zeros(rows, 1, 1, key.shape[2])
    if attention_mask is not None:
        unseen.masked_fill_(~attention_mask, float("-inf"))
    unseen = unseen.expand(-1, key.shape[1], -1, -1).flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(unseen, shared, key.flatten(0, 1).transpose(1, 2), alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return mixed.view(rows, 1, heads, -1), None


def can_group(model: PreTrainedModel) -> bool:
    """Whether `groups_of_rows` can replace the attention of `model` and is faster: on a CPU, for `sdpa`."""
    return model.device.type == "cpu" and attention_of(model) == "sdpa" and model._supports_attention_backend


def cache_type(model: PreTrainedModel) -> torch.dtype | None:
    """The type that keys and values of `model` are kept in; `None` is that of the model.

    On a CPU torch's attention takes half the time in float32 that it takes in half precision. Products in bfloat16 take
    even less, where the processor multiplies it.
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
    """Inside, `groups_of_rows` reads the rows of a step group by group."""
    token = GROUPS.set(cache.groups())
    try:
        yield
    finally:
        GROUPS.reset(token)


def up_to(count: int, size: int) -> int:
    """The next multiple of `size` from `count` on."""
    return -(-count // size) * size
