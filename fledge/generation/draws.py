"""The next token of each row from its logits: the likeliest, or one that is drawn.

A vocabulary is large and a draw takes one token of it. So a draw looks at sums of blocks first and at the tokens of one
block afterwards, and the largest of a row are looked for among the largest of its parts: no row is sorted as a whole.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fledge.sampling import Sampling

BLOCK = 256  # tokens of a block, whose sum in float32 is exact to seven digits
FOLDS = 8  # tokens of a part of which at most one is looked at first
# Most draws are among so few tokens; a whole vocabulary is sorted only for a draw that is not.
LIKELIEST = (256, 4096)


def choose(
    logits: Tensor, texts: list[list[int]], generators: list[np.random.Generator], sampling: Sampling
) -> list[int]:
    """The next token of each row from its logits (rows, V), what it holds so far, and its own random numbers."""
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
    """The place (rows,) of each row's largest logit, the first of several; some ten times as fast as torch's argmax."""
    block = by_block(logits, torch.amax).argmax(-1, keepdim=True)
    inside, places = of_block(logits, block, float("-inf"))
    return places.gather(-1, inside.argmax(-1, keepdim=True))[:, 0]


def draw(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """The token (rows,) in whose share of the `probabilities` (rows, V) each number of `drawn` falls.

    `drawn` (rows,) is from 0 to 1, in float64 on the CPU. Not every device has float64, so only the blocks' sums and
    the tokens of one block are brought over.
    """
    block, left = find(by_block(probabilities, torch.sum).cpu().double(), drawn)
    inside, places = of_block(probabilities, block[:, None].to(probabilities.device), 0)
    place, _ = find(inside.cpu().double(), left)
    return places.cpu().gather(-1, place[:, None])[:, 0]


def find(weights: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Where `drawn` (rows,) falls in `weights` (rows, n), laid end to end, and how far into that weight, from 0 to 1.

    A weight of 0 is never found.
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
    """The values of a block (rows, 1) and their places, both (rows, BLOCK); `fill` beyond the last one."""
    V = values.shape[-1]
    places = block * BLOCK + torch.arange(BLOCK, device=values.device)
    inside = places < V
    places = places.clamp(max=V - 1)
    return values.gather(-1, places).where(inside, fill), places


def largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`values.topk(n)` of (rows, V), in a fifth of the time where n is small against V.

    The n parts with the largest maxima hold the n largest: each of these is its part's maximum or beside a larger one.
    """
    V = values.shape[-1]
    parts = V // FOLDS
    if 4 * n > parts:
        return values.topk(min(n, V))
    # Part i is the values at i, i + parts, i + 2 · parts, …: maxima over rows of memory are taken fast.
    best = values[:, : parts * FOLDS].unflatten(-1, (FOLDS, parts)).amax(1).topk(n, sorted=False).indices
    steps = torch.arange(0, parts * FOLDS, parts, device=values.device)
    left_over = torch.arange(parts * FOLDS, V, device=values.device).expand(len(values), -1)
    places = torch.cat([(best[:, None] + steps[:, None]).flatten(1), left_over], -1)
    top, found = values.gather(-1, places).topk(n)
    return top, places.gather(-1, found)


def likely(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that a draw may give: their probabilities (rows, n), 0 beyond the draw's limits, and ids (rows, n).

    As in transformers, `top_k` limits first, and `top_p` then applies to what it left, whose probabilities sum to 1.
    The results are in float64 on the CPU: not every device has float64, and only a few numbers are brought over.
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
                break  # what was left out lies beyond `top_p`
    return probabilities.where((before < sampling.top_p) | (sampling.top_p == 1), 0), ids.cpu()
