"""The next token of each row from its logits: the most likely one, or a sample.

A vocabulary is large, and one token of it is needed, so no whole row is sorted. A sample is found by the sums of blocks
first and within one block afterwards; the largest values of a row are found among the maxima of its parts.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fledge.sampling import Sampling

BLOCK = 256  # tokens per block; its sum in float32 is exact to seven digits
FOLDS = 8  # tokens per part, of which only the largest is compared first
# Most samples come from this few tokens; the whole vocabulary is sorted only if more are needed.
LIKELIEST = (256, 4096)


def choose(
    logits: Tensor, texts: list[list[int]], generators: list[np.random.Generator], sampling: Sampling
) -> list[int]:
    """The next token of each row, from its logits (rows, V), its tokens so far, and its own random stream."""
    if sampling.repetition_penalty != 1:  # https://arxiv.org/abs/1909.05858
        for i, text in enumerate(texts):
            seen = torch.tensor(text, device=logits.device)
            scores = logits[i, seen]
            factor = torch.where(scores < 0, sampling.repetition_penalty, 1 / sampling.repetition_penalty)
            logits[i, seen] = scores * factor
    if sampling.temperature == 0:
        return likeliest(logits).tolist()
    drawn = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    if sampling.top_p == 1 and not 0 < sampling.top_k < logits.shape[-1]:
        return draw(tempered(logits, sampling).softmax(-1), drawn).tolist()
    probabilities, ids = likely(logits, sampling)
    places, _ = find(probabilities, drawn)
    return ids.gather(-1, places[:, None])[:, 0].tolist()


def tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    return logits if sampling.temperature == 1 else logits / sampling.temperature


def likeliest(logits: Tensor) -> Tensor:
    """The argmax (rows,) of each row, the first of several; about ten times as fast as torch's argmax."""
    block = by_block(logits, torch.amax).argmax(-1, keepdim=True)
    inside, places = of_block(logits, block, float("-inf"))
    return places.gather(-1, inside.argmax(-1, keepdim=True))[:, 0]


def draw(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """Samples a token (rows,) from `probabilities` (rows, V) by inverting the cumulative distribution at `drawn`.

    `drawn` (rows,) is from 0 to 1, in float64 on the CPU. Not every device has float64, so only the blocks' sums and
    the probabilities of one block are copied to the CPU.
    """
    block, left = find(by_block(probabilities, torch.sum).cpu().double(), drawn)
    inside, places = of_block(probabilities, block[:, None].to(probabilities.device), 0)
    place, _ = find(inside.cpu().double(), left)
    return places.cpu().gather(-1, place[:, None])[:, 0]


def find(weights: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the cumulative sum of `weights` (rows, n) passes the share `drawn` (rows,) of its total.

    Also returns how far into that weight it falls, from 0 to 1. A weight of 0 is never chosen.
    """
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    point = torch.minimum(drawn[:, None] * total, total.nextafter(torch.zeros_like(total)))
    places = torch.searchsorted(sums, point, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, places)
    into = (point - sums.gather(-1, places) + weight) / weight
    return places[:, 0], into[:, 0].clamp(0, 1)


def by_block(values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`reduce` of each block of `values` (rows, V); the last one may be shorter."""
    whole = values.shape[-1] // BLOCK * BLOCK
    blocks = values[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK))
    reduced = reduce(blocks, -1)
    if whole == values.shape[-1]:
        return reduced
    return torch.cat([reduced, reduce(values[:, whole:], -1)[:, None]], -1)


def of_block(values: Tensor, block: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """The values of a block (rows, 1) and their indices, both (rows, BLOCK); `fill` beyond the last value."""
    V = values.shape[-1]
    places = block * BLOCK + torch.arange(BLOCK, device=values.device)
    inside = places < V
    places = places.clamp(max=V - 1)
    return values.gather(-1, places).where(inside, fill), places


def largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`values.topk(n)` of (rows, V), in a fifth of the time if n is much smaller than V.

    The n parts with the largest maxima contain the n largest values: each of these is the maximum of its part, or in a
    part with an even larger value.
    """
    V = values.shape[-1]
    parts = V // FOLDS
    if 4 * n > parts:
        return values.topk(min(n, V))
    # Part i has the values at i, i + parts, i + 2 · parts, …, because maxima over contiguous rows are fast.
    best = values[:, : parts * FOLDS].unflatten(-1, (FOLDS, parts)).amax(1).topk(n, sorted=False).indices
    steps = torch.arange(0, parts * FOLDS, parts, device=values.device)
    left_over = torch.arange(parts * FOLDS, V, device=values.device).expand(len(values), -1)
    places = torch.cat([(best[:, None] + steps[:, None]).flatten(1), left_over], -1)
    top, found = values.gather(-1, places).topk(n)
    return top, places.gather(-1, found)


def likely(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates of a sample: probabilities (rows, n), 0 for what top-k or top-p exclude, and token ids (rows, n).

    As in transformers, `top_k` comes first, and `top_p` applies to the renormalised rest. The results are in float64 on
    the CPU: not every device has float64, and only a few numbers are copied.
    """
    V = logits.shape[-1]
    if 0 < sampling.top_k < V:
        top, ids = largest(tempered(logits, sampling), sampling.top_k)
        probabilities = top.cpu().double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
    else:
        shares = tempered(logits, sampling).softmax(-1)
        for n in (*LIKELIEST, V) if sampling.top_p < 1 else (V,):
            top, ids = largest(shares, n)
            probabilities = top.cpu().double()
            before = probabilities.cumsum(-1) - probabilities
            if bool((before[:, -1] >= sampling.top_p).all()):
                break  # the candidates reach `top_p`
    return probabilities.where((before < sampling.top_p) | (sampling.top_p == 1), 0), ids.cpu()
