"""Answers from a model: batched, seeded, never past its context.

The loop is Fledge's own, for three things that `generate` does not do. A row that ends makes room for the next prompt,
so a batch never waits for its longest answer. Keys and values lie in buffers made once, where `generate` copies its
whole cache for every token. And each prompt draws from a random stream of its own, so an answer does not depend on what
it was batched with, nor on whether a run was interrupted. Architectures that cannot be batched so (`is_batched`) answer
one prompt at a time, with transformers' cache for them, and are slower.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from fledge.cli import UserError
from fledge.generation.onednn import by_onednn
from fledge.guards import check_overrides
from fledge.messages import Answer
from fledge.models import attention_of, context_of
from fledge.sampling import Sampling

# Prompts read together. Their logits are kept at every place where one of them ends: the square of this, times V.
PREFILL = 8
# Most draws are among so few tokens; a whole vocabulary is sorted only for a draw that is not.
LIKELIEST = (256, 4096)


@dataclass
class _Row:
    """A prompt under way: its tokens so far (the prompt's among them), where it must end, and its random stream."""

    number: int
    ids: list[int]
    prompt_length: int
    limit: int
    random: np.random.Generator

    def is_done(self, end: int | None) -> bool:
        return self.ids[-1] == end or len(self.ids) >= self.limit


@check_overrides
class _Slots(Cache):
    """Keys and values (rows, heads, capacity, head width) of each layer. Row i's tokens lie at 0 … lengths[i] − 1."""

    def __init__(self, rows: int, capacity: int):
        super().__init__(layers=[])
        self.shape = rows, capacity
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # the row that takes what is read in
        self.lengths: Tensor | None = None  # (rows,) during a step, None while prompts are read in
        self.longest = 0

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = key_states, value_states
        if layer_idx == len(self.buffers):
            rows, capacity = self.shape
            shape = rows, keys.shape[1], capacity, keys.shape[3]
            # Zeros, not whatever memory held: a masked NaN is still a NaN.
            self.buffers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        count, length = keys.shape[0], keys.shape[2]
        if self.lengths is None:
            for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
                buffer[self.first : self.first + count, :, :length] = new
            return keys, values
        each = torch.arange(count, device=keys.device)
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[each, :, self.lengths] = new[:, :, 0]
        held_keys, held_values = self.buffers[layer_idx]
        return held_keys[:count, :, : self.longest + 1], held_values[:count, :, : self.longest + 1]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.lengths is None else self.longest

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def move(self, source: int, target: int) -> None:
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[target] = buffer[source]


def answer_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    numbers: list[int] | None = None,
    told: Callable[[int, int], None] = lambda number, token: None,
) -> Iterator[tuple[int, Answer]]:
    """Continues prompts of token ids and yields each one's number and answer as soon as it is complete.

    See `continue_each`, which does the work and gives token ids instead of text.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context, or the model keeps no keys and values.
    """
    end = cast(int | None, tokenizer.eos_token_id)
    for number, made in continue_each(model, end, prompts, sampling, batch_size, numbers, told):
        stopped = made[-1] == end
        # A role token in an answer is a fault that must be seen.
        text = cast(str, tokenizer.decode(made[:-1] if stopped else made, skip_special_tokens=False)).strip()
        yield number, Answer(text, len(made), stopped)


@torch.inference_mode()
def continue_each(
    model: PreTrainedModel,
    end: int | None,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    numbers: list[int] | None = None,
    told: Callable[[int, int], None] = lambda number, token: None,
) -> Iterator[tuple[int, list[int]]]:
    """Continues prompts of token ids and yields each one's number and new tokens as soon as it is complete.

    A continuation that the model ended has the token `end` as its last; any other ran into a limit. `numbers`
    (default: 0, 1, …) and the seed decide what a prompt draws. `told` hears of every token, with the number of its
    prompt.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context, or the model keeps no keys and values.
    """
    waiting = _rows(model, prompts, sampling, list(range(len(prompts))) if numbers is None else numbers)
    if not is_batched(model):
        yield from _one_by_one(model, end, waiting, sampling, told)
        return
    batch_size = min(batch_size, len(prompts))
    cache = _Slots(batch_size, max((row.limit for row in waiting), default=0))
    rows: list[_Row] = []
    with by_onednn(model):
        while waiting or rows:
            read_in = []
            # Reading in one prompt costs about as much as a few: wait for room for several, unless all are done.
            if waiting and len(rows) <= batch_size - min(PREFILL, batch_size, len(waiting)):
                read_in = [waiting.popleft() for _ in range(min(PREFILL, batch_size - len(rows), len(waiting)))]
                logits = _read_in(model, cache, read_in, len(rows))
            else:
                logits = _step(model, cache, rows)
            drawing = read_in or rows
            for row, token in zip(drawing, choose(logits, drawing, sampling), strict=True):
                row.ids.append(token)
                told(row.number, token)
            rows += read_in
            for i in reversed(range(len(rows))):
                row = rows[i]
                if not row.is_done(end):
                    continue
                if i < len(rows) - 1:
                    cache.move(len(rows) - 1, i)
                    rows[i] = rows[-1]
                rows.pop()
                yield row.number, row.ids[row.prompt_length :]


def _rows(model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> deque[_Row]:
    """A row for each prompt, the shortest first.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context, or the model keeps no keys and values.
    """
    context = context_of(model.config)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__} keeps no keys and values, as recurrent models do; use pipeline().")
    longest = max(map(len, prompts), default=0)
    if longest >= context:
        raise UserError(f"A prompt of {longest} tokens leaves no room in the model's context of {context}; shorten it.")
    rows = [
        _Row(
            number=number,
            ids=list(prompt),
            prompt_length=len(prompt),
            limit=min(len(prompt) + sampling.max_new_tokens, context),
            random=np.random.default_rng([sampling.seed, number]),
        )
        for number, prompt in zip(numbers, prompts, strict=True)
    ]
    return deque(sorted(rows, key=lambda row: row.prompt_length))


def is_batched(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can share a step: each token sees all before it, where `position_ids` say."""
    config = model.config.to_dict()
    # GPT-Neo's windows and Falcon's ALiBi count places in the buffer, and so does what takes no `position_ids`.
    counted = "local" in config.get("attention_layers", ()) or config.get("alibi")
    whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return whole and not counted and "position_ids" in inspect.signature(model.forward).parameters


def _one_by_one(
    model: PreTrainedModel,
    end: int | None,
    rows: Iterable[_Row],
    sampling: Sampling,
    told: Callable[[int, int], None],
) -> Iterator[tuple[int, list[int]]]:
    """The tokens of `continue_each` from a model that is not batched."""
    with by_onednn(model):
        for row in rows:
            cache, new = DynamicCache(config=model.config), row.ids
            while True:
                ids = torch.tensor([new], device=model.device)
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                new = choose(logits.float(), [row], sampling)
                row.ids += new
                told(row.number, new[0])
                if row.is_done(end):
                    break
            yield row.number, row.ids[row.prompt_length :]


def _read_in(model: PreTrainedModel, cache: _Slots, rows: list[_Row], first: int) -> Tensor:
    """Reads prompts into the cache from row `first` on; logits (rows, V) after each."""
    cache.first, cache.lengths = first, None
    longest = max(len(row.ids) for row in rows)
    # Padding on the right needs no mask: causal attention never looks there, and what it left is overwritten.
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=model.device)
    ends = sorted({len(row.ids) - 1 for row in rows})
    kept = torch.tensor(ends, device=model.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
    return torch.stack([logits[i, ends.index(len(row.ids) - 1)] for i, row in enumerate(rows)]).float()


def _step(model: PreTrainedModel, cache: _Slots, rows: list[_Row]) -> Tensor:
    """The logits (rows, V) after each row's last token."""
    lengths = [len(row.ids) - 1 for row in rows]
    cache.lengths, cache.longest = torch.tensor(lengths, device=model.device), max(lengths)
    mask = None
    if min(lengths) < cache.longest:
        places = torch.arange(cache.longest + 1, device=model.device)
        mask = (places <= cache.lengths[:, None])[:, None, None]
        if attention_of(model) in ("eager", None):  # eager attention adds the mask to the scores; sdpa takes both kinds
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return (
        model(
            input_ids=torch.tensor([row.ids[-1:] for row in rows], device=model.device),
            position_ids=cache.lengths[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        .logits[:, -1]
        .float()
    )


def choose(logits: Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row from its logits (rows, V): the likeliest at temperature 0, else one that is drawn."""
    if sampling.repetition_penalty != 1:  # https://arxiv.org/abs/1909.05858
        for i, row in enumerate(rows):
            seen = torch.tensor(row.ids, device=logits.device)
            scores = logits[i, seen]
            factor = torch.where(scores < 0, sampling.repetition_penalty, 1 / sampling.repetition_penalty)
            logits[i, seen] = scores * factor
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    drawn = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
    probabilities, ids = likely(logits, sampling)
    sums = probabilities.cumsum(-1)
    places = torch.searchsorted(sums, drawn[:, None] * sums[:, -1:], right=True)
    return ids.gather(-1, places.clamp(max=ids.shape[-1] - 1))[:, 0].tolist()


def likely(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that a draw may give: their probabilities (rows, n), 0 beyond the draw's limits, and ids (rows, n).

    As in transformers, `top_k` limits first, and `top_p` then applies to what it left, whose probabilities sum to 1.
    The results are in float64 on the CPU: not every device has float64, and only a few numbers are brought over.
    """
    logits = logits / sampling.temperature
    V = logits.shape[-1]
    if 0 < sampling.top_k < V:
        top, ids = logits.topk(sampling.top_k)
        sizes: tuple[int, ...] = (sampling.top_k,)
        total = top.logsumexp(-1, keepdim=True)
    elif sampling.top_p == 1:
        return logits.cpu().double().softmax(-1), torch.arange(V).expand_as(logits)
    else:
        sizes, total = (*LIKELIEST, V), logits.logsumexp(-1, keepdim=True)
    for n in sizes:
        top, ids = logits.topk(min(n, V))
        probabilities = (top - total).cpu().double().exp()
        before = probabilities.cumsum(-1) - probabilities
        if bool((before[:, -1] >= sampling.top_p).all()):
            break  # what was left out lies beyond `top_p`
    return probabilities.where((before < sampling.top_p) | (sampling.top_p == 1), 0), ids.cpu()


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Continues any number of prompts; `progress` is told how many are done."""
    answers: dict[int, Answer] = {}
    for number, answer in answer_each(model, tokenizer, prompts, sampling, batch_size):
        answers[number] = answer
        progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Continues a few prompts together; a streamer hears the tokens of a single one as they are made."""

    def told(number: int, token: int) -> None:
        if streamer and token != tokenizer.eos_token_id:
            streamer.put(torch.tensor([token]))

    sampling = replace(sampling, seed=seed)
    answers = dict(answer_each(model, tokenizer, prompts, sampling, min(len(prompts), 64), told=told))
    if streamer:
        streamer.end()
    return [answers[i] for i in range(len(prompts))]
