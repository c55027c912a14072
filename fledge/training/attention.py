"""Causal attention in bfloat16 on a CPU, one long row of the batch at a time, or a few short ones.

torch's fused kernel keeps its tiles in float32 on a CPU, so it does not use the bfloat16 matrix unit. Plain products of
one row's heads stay in a core's cache and take half the time up to a length of 512, forward and backward together. The
backward pass recomputes the probabilities instead of storing them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fledge.models import attention_of
from fledge.training.loss import CACHED, slices

NAME = "causal_rows"
LONGEST = 512


class CausalRows(torch.autograd.Function):
    """softmax(scale · q kᵀ, causal) v for `query`, `key` and `value` of shape (B, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, _ = query.shape
        mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu_(1)
        # As many rows at a time as keep the scores in a core's cache: one of long texts, several of short ones.
        ctx.scale, ctx.rows = scale, slices(batch, max(1, CACHED // (heads * length**2)))
        mixed = torch.empty(query.shape, dtype=query.dtype)
        for rows in ctx.rows:
            q, k, v, out = (x[rows].flatten(0, 1) for x in (query, key, value, mixed))
            torch.bmm(CausalRows.probabilities(q, k, mask, scale), v, out=out)
        ctx.save_for_backward(query, key, value, mixed, mask)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        # Σ_j p_ij · ∂p_ij, as in FlashAttention (https://arxiv.org/abs/2205.14135, appendix B.2).
        means = (grad_mixed.float() * mixed.float()).sum(-1, keepdim=True).to(query.dtype)
        for rows in ctx.rows:
            q, k, v, grad_out, mean = (x[rows].flatten(0, 1) for x in (query, key, value, grad_mixed, means))
            grad_q, grad_k, grad_v = (x[rows].flatten(0, 1) for x in (grad_query, grad_key, grad_value))
            probs = CausalRows.probabilities(q, k, mask, ctx.scale)
            torch.bmm(probs.transpose(1, 2), grad_out, out=grad_v)
            grad_scores = torch.bmm(grad_out, v.transpose(1, 2)).sub_(mean).mul_(probs)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None

    @staticmethod
    def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)


def causal_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers: `CausalRows` where it applies and is faster, else `sdpa`."""
    fits = attention_mask is None and module.is_causal and not dropout and query.shape == key.shape
    # Rotary embeddings may have made float32 of the queries; under autocast the fused kernel casts them back, too.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if not fits or dtype != torch.bfloat16 or not 1 < query.size(2) <= LONGEST:
        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return CausalRows.apply(*(x.to(dtype) for x in (query, key, value)), scale).transpose(1, 2), None


def attend_by_rows(model: PreTrainedModel) -> None:
    """Makes `model` attend by `causal_rows`. `model.set_attn_implementation("sdpa")` undoes it."""
    AttentionInterface.register(NAME, causal_rows)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)


@contextlib.contextmanager
def by_sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a `model` that attends by `causal_rows` does so by transformers' `sdpa`, as one that is served does."""
    by_rows = attention_of(model) == NAME
    if by_rows:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if by_rows:
            model.set_attn_implementation(NAME)
