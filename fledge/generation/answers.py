"""Answers from a model: batched, seeded, never past its context.

Fledge has its own loop because `generate` lacks three things. A row that ends makes room for the next prompt, so a
batch never waits for its longest answer. Keys and values are written into preallocated buffers, while `generate` copies
its whole cache for every token. Each prompt has its own random stream, so an answer does not depend on the other
prompts of its batch or on an interruption. Architectures that cannot be batched like this (see `is_batched`) answer one
prompt at a time with transformers' cache, and are slower.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from fledge.errors import UserError
from fledge.generation.cache import GROUP, PLACES, Slots, cache_type, grouped, step, up_to
from fledge.generation.draws import choose
from fledge.generation.onednn import by_onednn
from fledge.messages import Answer
from fledge.models import attention_of, context_of
from fledge.sampling import Sampling

# Different prompts per prefill. Logits are kept wherever one of the prompts ends: PREFILL² × V numbers.
PREFILL = 8


@dataclass
class _Row:
    """A row of the batch: its tokens so far, with the prompt's; its maximum length; and its random stream."""

    number: int
    ids: list[int]
    prompt_length: int
    limit: int
    random: np.random.Generator

    def is_done(self, end: int | None) -> bool:
        return self.ids[-1] == end or len(self.ids) >= self.limit

    @property
    def made(self) -> list[int]:
        return self.ids[self.prompt_length :]


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
        yield number, answer_of(tokenizer, made)


def answer_of(tokenizer: PreTrainedTokenizerBase, made: list[int]) -> Answer:
    """The answer with these new token ids. If the model stopped by itself, the last one is end-of-text."""
    stopped = bool(made) and made[-1] == tokenizer.eos_token_id
    # Special tokens stay visible: a role token in an answer is a fault that must be seen.
    text = cast(str, tokenizer.decode(made[:-1] if stopped else made, skip_special_tokens=False))
    return Answer(text.strip(), len(made), stopped)


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

    If the model ended a continuation, its last token is `end`; any other ran into a limit. `numbers` (default: 0, 1, …)
    and the seed determine the random stream of each prompt. `told` is called with each token and the number of its
    prompt.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context, or the model keeps no keys and values.
    """
    waiting = _rows(model, prompts, sampling, list(range(len(prompts))) if numbers is None else numbers)
    if not is_batched(model):
        yield from _one_by_one(model, end, waiting, sampling, told)
        return
    batch_size = min(batch_size, len(prompts))
    cache = Slots(batch_size, max((row.limit for row in waiting), default=0), cache_type(model))
    rows: list[_Row] = []  # the longest first, as far as groups go
    with by_onednn(model), grouped(model):
        while waiting or rows:
            # The prefill of one prompt costs about as much as that of a few: wait for room for several, unless all are
            # done.
            if waiting and len(rows) <= batch_size - min(PREFILL, batch_size, len(waiting)):
                drawing = _next(waiting, batch_size - len(rows))
                logits = _read_in(model, cache, drawing, len(rows))
                rows += drawing
            else:
                if not waiting and cache.in_groups:  # the rows that are done make room for no other
                    cache.rows = cache.padded(len(rows))
                drawing, logits = list(rows), _step(model, cache, rows)
            for row, token in zip(drawing, _choose(logits, drawing, sampling), strict=True):
                row.ids.append(token)
                told(row.number, token)
            for i in reversed(range(len(rows))):
                if rows[i].is_done(end):
                    yield rows[i].number, rows[i].made
                    _remove(rows, i, cache)


def _next(waiting: deque[_Row], room: int) -> list[_Row]:
    """As many rows as there is room for, of at most `PREFILL` different prompts."""
    rows: list[_Row] = []
    while waiting and len(rows) < room and len({tuple(row.ids) for row in [*rows, waiting[0]]}) <= PREFILL:
        rows.append(waiting.popleft())
    return rows


def _remove(rows: list[_Row], i: int, cache: Slots) -> None:
    """Removes row i; the longest row of the next group takes its place, and so on, so that groups stay in order."""
    begins = range((i // GROUP + 1) * GROUP, len(rows), GROUP)
    longest = [max(range(begin, len(rows))[:GROUP], key=lambda j: len(rows[j].ids)) for begin in begins]
    for j in [*longest, len(rows) - 1]:
        if j != i:
            cache.move(j, i, len(rows[j].ids))
            rows[i] = rows[j]
        i = j
    rows.pop()


def _rows(model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> deque[_Row]:
    """A row for each prompt, the shortest first, and equal ones together.

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
    return deque(sorted(rows, key=lambda row: (row.prompt_length, row.ids)))


def is_batched(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can share a step: full causal attention with explicit `position_ids`."""
    config = model.config.to_dict()
    # GPT-Neo's windows, Falcon's ALiBi and models without `position_ids` count positions in the buffer.
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
                new = _choose(logits.float(), [row], sampling)
                row.ids += new
                told(row.number, new[0])
                if row.is_done(end):
                    break
            yield row.number, row.made


def _choose(logits: Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
    return choose(logits, [row.ids for row in rows], [row.random for row in rows], sampling)


def _read_in(model: PreTrainedModel, cache: Slots, rows: list[_Row], first: int) -> Tensor:
    """Prefills the cache from row `first` on, equal prompts once; returns the logits (rows, V) after each prompt."""
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(row.ids), len(places)) for row in rows]
    cache.first, cache.lengths, cache.copies = first, None, torch.tensor(copies, device=model.device)
    longest = max(map(len, places))
    if cache.in_groups:
        longest = min(up_to(longest, PLACES), context_of(model.config))
    # Padding on the right needs no mask: causal attention never reads it, and its keys and values are overwritten.
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in places], device=model.device)
    ends = sorted({len(prompt) - 1 for prompt in places})
    kept = torch.tensor(ends, device=model.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
    each = [ends.index(len(row.ids) - 1) for row in rows]
    return logits[cache.copies, torch.tensor(each, device=model.device)].float()


def _step(model: PreTrainedModel, cache: Slots, rows: list[_Row]) -> Tensor:
    """The logits (rows, V) after each row's last token."""
    spare = cache.padded(len(rows)) - len(rows)  # rows of one token, whose logits nobody reads
    lengths = [len(row.ids) - 1 for row in rows] + [0] * spare
    mask = cache.begin_step(lengths, model.device)
    assert cache.lengths is not None
    if mask is not None and attention_of(model) in ("eager", None):
        # eager attention adds the mask to the scores; sdpa takes both kinds
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    with step(cache):
        output = model(
            input_ids=torch.tensor([row.ids[-1:] for row in rows] + [[0]] * spare, device=model.device),
            position_ids=cache.lengths[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
    return output.logits[: len(rows), -1].float()


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
    """Continues a few prompts in one batch; a `streamer` gets the tokens of a single prompt as they are made."""

    def told(number: int, token: int) -> None:
        if streamer and token != tokenizer.eos_token_id:
            streamer.put(torch.tensor([token]))

    sampling = replace(sampling, seed=seed)
    answers = dict(answer_each(model, tokenizer, prompts, sampling, 64, told=told))
    if streamer:
        streamer.end()
    return [answers[i] for i in range(len(prompts))]
