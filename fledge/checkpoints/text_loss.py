"""The loss of a model on a text, and those of unigram and bigram models of the text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.errors import UserError

BATCH_NUMBERS = 1 << 24
"""Logits in memory at a time."""

SEEN = 20
"""How often a pair of tokens must occur on average for its frequency to be meaningful."""


@torch.no_grad()
def text_losses(gpt: CanonicalGPT, windows: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window of token ids (N, T + 1) → (N,), in float32."""
    rows = max(1, BATCH_NUMBERS // ((windows.shape[1] - 1) * gpt.vocab_size))
    batches = windows.split(min(rows, 256))
    return torch.cat([losses_of(canonical_logits(gpt, some[:, :-1], torch.float32), some) for some in batches])


def losses_of(logits: Tensor, windows: Tensor) -> Tensor:
    """The mean cross-entropy (N,) of each window (N, T + 1) under the logits (N, T, V) of all but its last token."""
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nats.view(len(windows), -1).mean(1)


def text_windows(ids: list[int], length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Windows (N, T + 1) that share no predicted token, of up to `tokens` in all, spread over the text.

    Returns:
        The windows in random order, the same on every run, and the place of each in the text (N,).

    Raises:
        UserError: the text is shorter than two tokens.
    """
    length = min(length, len(ids) - 1)
    if length < 1:
        raise UserError("The --probe_text holds fewer than two tokens; give some pages of the training text.")
    starts = torch.arange(0, len(ids) - length, length)
    kept = torch.linspace(0, len(starts) - 1, min(len(starts), max(1, tokens // length))).round().long()
    places = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    return torch.tensor(ids)[starts[places, None] + torch.arange(length + 1)], places


def pair_loss(ids: list[int]) -> float:
    """The loss of a bigram model of the text in nats per token; infinite for a text that is too short.

    A model above it has hardly been trained, and its loss may fall under a wrong reading that makes its parts louder.
    """
    tokens = torch.tensor(ids)
    pairs = torch.stack([tokens[:-1], tokens[1:]], dim=1).unique(dim=0, return_counts=True)[1].double()
    if len(ids) < SEEN * len(pairs):
        return math.inf
    return -(pairs / pairs.sum() * (pairs / pairs.sum()).log()).sum().item() - unigram_loss(ids)


def unigram_loss(ids: list[int]) -> float:
    """The loss of a unigram model of the text in nats per token."""
    counts = torch.tensor(ids).unique(return_counts=True)[1].double()
    return -(counts / len(ids) * (counts / len(ids)).log()).sum().item()
