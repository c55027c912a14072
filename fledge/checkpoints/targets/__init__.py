"""Represents the canonical GPT exactly as a model of transformers: the plainest class that fits, and the folds."""

from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.targets.classes import TARGETS
from fledge.checkpoints.targets.folds import (
    carry_head_bias,
    fold_head_bias,
    fold_logit_scale,
    fold_missing,
    fold_norms,
    fold_positions,
    fold_residual_scale,
    fold_scales,
    fold_stream_scale,
    move_norm,
    open_shared_expert,
    order_rotation,
    repeat_shared_heads,
)
from fledge.checkpoints.targets.needs import biased, needs
from fledge.checkpoints.targets.target import Target
from fledge.errors import UserError

__all__ = ["TARGETS", "fold_head_bias", "obstacles", "refuse_unconvertible", "to_target"]


def to_target(
    gpt: CanonicalGPT, token_ids: dict[str, int | None], target: str = "auto"
) -> tuple[PreTrainedConfig, dict[str, Tensor], list[str]]:
    """Represents `gpt` as one of the classes in `TARGETS`.

    Args:
        gpt: the model to represent.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config.
        target: a key of `TARGETS`, or `auto` for the first of them that holds the model exactly.

    Returns:
        The config, the state dict (what was folded in float64, the rest as the checkpoint holds it), and one sentence
        for each fold.

    Raises:
        UserError: no target holds it, or not the one asked for, with the feature that stands in the way.
    """
    if target not in ("auto", *TARGETS):
        raise UserError(f"--target {target} is unknown; choose auto, {', '.join(TARGETS)}.")
    refuse_unconvertible(gpt)
    plain, folds = _plain(gpt)
    found = obstacles(gpt)
    missing = {*needs(plain)}
    nearest = min(found, key=lambda name: (len(missing & {*found[name]}), len(found[name])))
    name = _preferred(gpt, found) or nearest if target == "auto" else target
    if found[name]:
        lacks = " and no ".join(found[name])
        if target == "auto":
            raise UserError(f"No class of transformers holds this model exactly: the nearest, {name}, has no {lacks}.")
        raise UserError(f"--target {target} cannot hold this model exactly: it has no {lacks}.")
    chosen = TARGETS[name]
    for step in (
        fold_missing,
        lambda gpt: (gpt, []) if chosen.multipliers else _without_multipliers(gpt, chosen.scale(gpt.width)),
        lambda gpt: (gpt, []) if chosen.shares_heads else repeat_shared_heads(gpt),
        lambda gpt: open_shared_expert(gpt) if "shared_gate" in chosen.names else (gpt, []),
        lambda gpt: move_norm(gpt, chosen.norm_after_rope),
        lambda gpt: order_rotation(gpt, chosen.rope_direction),
    ):
        plain, said = step(plain)
        folds += said
    config = chosen.config(plain, {"vocab_size": gpt.vocab_size, "tie_word_embeddings": plain.tied, **token_ids})
    return config, _weights(plain, chosen), folds


def _preferred(gpt: CanonicalGPT, found: dict[str, list[str]]) -> str | None:
    """The first class with multipliers, for scaled embeddings that the head shares: others need a head of its own."""
    held = (name for name, lacks in found.items() if TARGETS[name].multipliers and not lacks)
    return next(held, None) if gpt.tied and gpt.embedding_scale != 1 else None


def _without_multipliers(gpt: CanonicalGPT, own_scale: float) -> tuple[CanonicalGPT, list[str]]:
    folds: list[str] = []
    for step in (lambda gpt: fold_scales(gpt, own_scale), fold_residual_scale, fold_logit_scale):
        gpt, said = step(gpt)
        folds += said
    return gpt, folds


def obstacles(gpt: CanonicalGPT) -> dict[str, list[str]]:
    """What each target lacks, in words that end the sentence "it has no …"; nothing for one that holds `gpt`."""
    plain, _ = _plain(gpt)
    return {name: _obstacles(gpt, plain, target) for name, target in TARGETS.items()}


def _plain(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """The folds that every target needs alike."""
    plain, folds = gpt, []
    for step in (fold_positions, fold_stream_scale, fold_norms):
        plain, said = step(plain)
        folds += said
    if "head.bias" in plain.tensors:
        plain, said = fold_logit_scale(plain)
        folds += said
    carried = carry_head_bias(plain)
    return (carried[0], folds + carried[1]) if carried else (plain, folds)


def _obstacles(gpt: CanonicalGPT, plain: CanonicalGPT, target: Target) -> list[str]:
    if found := [need for need in needs(plain) if need not in target.holds]:
        return found
    unheld = biased(plain) - {"head", *target.always, *(role for group in target.grouped for role in group)}
    # The head's bias may have moved into a norm or an MLP that had none.
    own = unheld & biased(gpt)
    found = [f"bias in {', '.join(sorted(own))}"] if own else []
    found += ["bias on the head"] if unheld - own or "head.bias" in plain.tensors else []
    return found + target.limits(plain)


def refuse_unconvertible(gpt: CanonicalGPT) -> None:
    """Refuses a GPT that is not causal.

    Raises:
        UserError: each position sees those behind it.
    """
    if not gpt.causal:
        raise UserError(
            "It was trained without a causal mask (each position saw the ones after it), and such a model cannot "
            "write text: train it again with a mask."
        )


def _weights(gpt: CanonicalGPT, target: Target) -> dict[str, Tensor]:
    """The state dict: each name of the target with the tensors of its roles, stacked if there are several."""
    weights, has_bias = {}, target.has_bias(gpt)
    for roles, pattern in target.names.items():
        roles = roles if isinstance(roles, tuple) else (roles,)
        if target.unused(gpt) & {*roles}:
            continue
        kinds = ("weight", "bias") if roles[0] in has_bias else ("weight",)
        for n, kind in product(range(gpt.n_layer) if "{n}" in pattern else [None], kinds):
            parts = [part for role in roles if (part := _part(gpt, role, n, kind)) is not None]
            if not parts:
                continue
            stacked = torch.cat(parts, dim=-2 if parts[0].dim() == 3 else 0) if len(parts) > 1 else parts[0]
            for h in range(gpt.n_head if "query" in roles[0] else gpt.n_kv_head) if "{h}" in pattern else [None]:
                name = pattern.format(n=n, h=h) + ("" if stacked.dim() == 3 else f".{kind}")
                weights[name] = target.place(gpt, name, stacked)
    if gpt.tied:
        weights.pop("lm_head.weight")
    return weights


def _part(gpt: CanonicalGPT, role: str, n: int | None, kind: str) -> Tensor | None:
    """A role's tensor, with zeros for a missing bias; of experts (E, out, in); None if the model has no such role."""
    if role.startswith("experts."):
        experts = [f"blocks.{n}.experts.{e}.{role.removeprefix('experts.')}.{kind}" for e in range(gpt.n_expert)]
        return torch.stack([gpt.tensors[name] for name in experts])
    module = role if n is None else f"blocks.{n}.{role}"
    if f"{module}.weight" not in gpt.tensors or f"{module}.{kind}" in gpt.tensors:
        return gpt.tensors.get(f"{module}.{kind}")
    return torch.zeros(len(gpt.tensors[f"{module}.weight"]))
