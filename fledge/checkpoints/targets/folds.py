"""Folds rewrite a model exactly, so that a class can represent features that it has no parameter for.

Each returns the rewritten model and sentences that say what was done."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT

ACROSS_ROTATION = "The norm of queries and keys stands on the other side of the rotation here, which keeps lengths."
WELL_SOLVED = 1e-12
"""Largest error of a folded head bias, as a share of the largest bias."""


def fold_norms(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Gives each norm a weight without an offset, and each block two norms."""
    tensors, folds = dict(gpt.tensors), []
    for name in _norm_names(gpt):
        if f"{name}.weight" in tensors and gpt.norm_offset:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].double() + gpt.norm_offset
        elif f"{name}.weight" not in tensors:
            first = name.removesuffix("2") + "1"
            if name.endswith(".norm_2") and f"{first}.weight" in tensors:
                tensors |= {name + key.removeprefix(first): tensors[key].clone() for key in _of(tensors, first)}
                folds = ["The one norm of a block stands there twice."]
            else:
                tensors[f"{name}.weight"] = torch.ones(_norm_width(gpt, name))
    if gpt.norm_offset:
        folds.append(f"The weights of norms hold the {gpt.norm_offset:g} that their author adds to them.")
    window = gpt.window if gpt.window and gpt.window < gpt.context_length else None
    gpt = replace(gpt, tensors=tensors, norm_offset=0.0, window=window)
    if not gpt.norm_unbiased or gpt.norm_eps_outside or gpt.norm != "layernorm" or gpt.qk_norm or not _norm_names(gpt):
        return gpt, folds
    return _with_biased_deviation(gpt), [*folds, "The norms' weights and epsilon make up for D − 1 in the variance."]


def _with_biased_deviation(gpt: CanonicalGPT) -> CanonicalGPT:
    """x / √(S/(D−1) + ε) = √((D−1)/D) · x / √(S/D + ε(D−1)/D), where S is the sum of squares."""
    share = (gpt.width - 1) / gpt.width
    names = {f"{name}.weight" for name in _norm_names(gpt)}
    tensors = {name: x.double() * share**0.5 if name in names else x for name, x in gpt.tensors.items()}
    own = None if gpt.final_norm_eps is None else gpt.final_norm_eps * share
    return replace(gpt, tensors=tensors, norm_unbiased=False, norm_eps=gpt.norm_eps * share, final_norm_eps=own)


def _of(tensors: Mapping[str, Tensor], module: str) -> list[str]:
    return [f"{module}.{kind}" for kind in ("weight", "bias") if f"{module}.{kind}" in tensors]


def _norm_names(gpt: CanonicalGPT) -> list[str]:
    inside = [] if gpt.norm_placement == "none" else ["norm_1", "norm_2"]
    inside += ["norm_1_after", "norm_2_after"] if gpt.norm_placement == "both" else []
    inside += ["query_norm", "key_norm"] if gpt.qk_norm else []
    outside = ["final_norm"] * gpt.final_norm + ["embedding_norm"] * gpt.embedding_norm
    return [*outside, *(f"blocks.{n}.{role}" for n in range(gpt.n_layer) for role in inside)]


def _norm_width(gpt: CanonicalGPT, name: str) -> int:
    if not name.endswith(("query_norm", "key_norm")):
        return gpt.width
    if gpt.qk_norm == "head":
        return gpt.head_width
    return len(gpt.tensors[f"{name.removesuffix('_norm')}.weight"])


def fold_missing(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Adds the tensors that the author left out: an identity for a matrix, zeros for positions."""
    tensors, folds = dict(gpt.tensors), []
    if "blocks.0.output.weight" not in tensors:
        tensors |= {f"blocks.{n}.output.weight": torch.eye(gpt.width) for n in range(gpt.n_layer)}
        folds.append("The missing attention output projection is an identity.")
    single = [f"blocks.{n}" for n in range(gpt.n_layer) if f"blocks.{n}.mlp_in.weight" in tensors]
    single = [block for block in single if f"{block}.mlp_out.weight" not in tensors]
    if single:
        tensors |= {f"{block}.mlp_out.weight": torch.eye(gpt.width) for block in single}
        folds.append("The MLP's missing second matrix is an identity.")
    if not (gpt.rope or gpt.alibi or "position_embedding.weight" in tensors):
        tensors["position_embedding.weight"] = torch.zeros(gpt.context_length, gpt.width)
        folds.append("The model has no positions, so that their table is zero.")
    return replace(gpt, tensors=tensors), folds


def fold_scales(gpt: CanonicalGPT, own_scale: float | None) -> tuple[CanonicalGPT, list[str]]:
    """Moves the scales of attention and embeddings into the weights.

    The class scales embeddings by `own_scale`, or has a multiplier for each scale if that is None.
    """
    if own_scale is None:
        return gpt, []
    tensors, folds, tied = dict(gpt.tensors), [], gpt.tied
    if gpt.embedding_scale != own_scale:
        name = "token_embedding.weight"
        tensors[name] = gpt.tensors[name].double() * (gpt.embedding_scale / own_scale)
        tied = False
        folds.append(f"The embeddings hold their scale {gpt.embedding_scale:g}, and the head is untied from them.")
    if not math.isclose(gpt.attention_scale, gpt.usual_scale, rel_tol=1e-12):
        role = "query_norm" if gpt.qk_norm else "query"
        for name in [name for name in tensors if f".{role}." in name]:
            tensors[name] = tensors[name].double() * (gpt.attention_scale / gpt.usual_scale)
        folds.append(f"The attention scale {gpt.attention_scale:g} instead of {gpt.usual_scale:g} is in the queries.")
    folded = replace(gpt, tensors=tensors, tied=tied, embedding_scale=own_scale, attention_scale=gpt.usual_scale)
    return folded, folds


def fold_positions(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Cuts the table of positions to the rows that the context reads."""
    table, first = gpt.tensors.get("position_embedding.weight"), gpt.position_offset
    if table is None or len(table) == gpt.context_length:
        return gpt, []
    kept = table[first : first + gpt.context_length]
    folds = [f"The table of positions begins with its row {first}, which the first position reads."] if first else []
    return replace(gpt, tensors={**gpt.tensors, "position_embedding.weight": kept}, position_offset=0), folds


def fold_residual_scale(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Moves the scale of what attention and MLP add into the last thing that they compute: a matrix, or a norm."""
    if gpt.residual_scale == 1 or gpt.residual_scaled == "stream":
        return gpt, []
    last = {"both": ("norm_1_after", "norm_2_after"), "sublayer": ("norm_1", "norm_2")}
    roles = dict(zip(("attention", "mlp"), last.get(gpt.norm_placement, ("output", "mlp_out")), strict=True))
    scaled = {role for place, role in roles.items() if gpt.residual_scaled in ("both", place)}
    tensors = {
        name: x.double() * gpt.residual_scale if name.split(".")[-2] in scaled else x for name, x in gpt.tensors.items()
    }
    return replace(gpt, tensors=tensors, residual_scale=1.0), [
        f"What is added to the residual stream holds its scale {gpt.residual_scale:.6g} ({gpt.residual_scaled})."
    ]


def fold_stream_scale(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """norm(s · x + f(x)) is norm(x + f(x) / s), if the epsilon under its root is divided by s²."""
    is_post = gpt.norm_placement == "post" and not (gpt.parallel or gpt.norm_eps_outside or gpt.qk_norm)
    if gpt.residual_scaled != "stream" or gpt.residual_scale == 1 or not is_post or gpt.embedding_norm:
        return gpt, []
    scale, last = gpt.residual_scale, gpt.norm_eps if gpt.final_norm_eps is None else gpt.final_norm_eps
    folded = replace(gpt, residual_scale=1 / scale, residual_scaled="both", norm_eps=gpt.norm_eps / scale**2)
    folded = replace(folded, final_norm_eps=last if gpt.final_norm else None)
    return folded, [f"The norms' epsilon and what is added make up for the residual stream's scale {scale:.6g}."]


def fold_logit_scale(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Moves the scale of the logits into the head, or into the final norm of a tied one."""
    if gpt.logit_scale == 1:
        return gpt, []
    weighted = "final_norm.weight" in gpt.tensors and not bool((gpt.tensors["final_norm.weight"] == 1).all())
    in_norm = gpt.tied and gpt.final_norm and weighted
    names = {"head.bias", *(("final_norm.weight", "final_norm.bias") if in_norm else ("head.weight",))}
    tensors = {name: x.double() * gpt.logit_scale if name in names else x for name, x in gpt.tensors.items()}
    place = "final norm holds" if in_norm else "head holds"
    folded = replace(gpt, tensors=tensors, tied=gpt.tied and in_norm, logit_scale=1.0)
    return folded, [f"The {place} the scale {gpt.logit_scale:.6g} of the logits."]


def repeat_shared_heads(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Repeats keys and values that several query heads share, so that each query head has its own."""
    if gpt.n_kv_head == gpt.n_head:
        return gpt, []
    tensors, times = dict(gpt.tensors), gpt.n_head // gpt.n_kv_head
    for name in [name for name in tensors if name.split(".")[-2] in ("key", "value")]:
        by_head = tensors[name].unflatten(0, (gpt.n_kv_head, gpt.head_width))
        tensors[name] = by_head.repeat_interleave(times, dim=0).flatten(0, 1)
    folded = replace(gpt, tensors=tensors, n_kv_head=gpt.n_head)
    return folded, [f"Keys and values are repeated {times} times: their heads are shared, and this class has no such."]


def open_shared_expert(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Gives each block a shared expert and its gate: a gate of zeros is open by half, so the expert is doubled."""
    tensors, folds = dict(gpt.tensors), []
    for block in [f"blocks.{n}" for n in range(gpt.n_layer)]:
        if f"{block}.shared.mlp_in.weight" not in tensors:
            for role, shape in (("mlp_gate", (1, gpt.width)), ("mlp_in", (1, gpt.width)), ("mlp_out", (gpt.width, 1))):
                tensors[f"{block}.shared.{role}.weight"] = torch.zeros(shape)
            folds = ["The shared expert, which the model does not have, is zero."]
        elif f"{block}.shared_gate.weight" not in tensors:
            tensors[f"{block}.shared.mlp_out.weight"] = 2 * tensors[f"{block}.shared.mlp_out.weight"].double()
            folds = ["The shared expert is doubled, and a gate that it does not have always lets half of it through."]
        if f"{block}.shared_gate.weight" not in tensors:
            tensors[f"{block}.shared_gate.weight"] = torch.zeros(1, gpt.width)
    return replace(gpt, tensors=tensors), folds


def move_norm(gpt: CanonicalGPT, after_rope: bool) -> tuple[CanonicalGPT, list[str]]:
    """Moves an RMSNorm of queries and keys with equal weights to the other side of the rotation."""
    if gpt.qk_norm != "head" or not gpt.rope or gpt.qk_norm_after_rope == after_rope:
        return gpt, []
    return replace(gpt, qk_norm_after_rope=after_rope), [ACROSS_ROTATION]


def order_rotation(gpt: CanonicalGPT, direction: int) -> tuple[CanonicalGPT, list[str]]:
    """Permutes the rows of queries and keys: transformers rotates coordinates i and i + half a head together."""
    if not gpt.rope or (gpt.rope == "half" and gpt.rope_direction == direction):
        return gpt, []
    order = torch.arange(gpt.head_width)
    width = gpt.turned_width
    if gpt.rope == "interleaved":
        order[:width] = torch.cat([order[0:width:2], order[1:width:2]])
    if gpt.rope_direction != direction:  # turning (a, b) back is turning (b, a) on
        order[:width] = torch.cat([order[width // 2 : width], order[: width // 2]])
    place = _within_heads(order)
    roles = ["query", "key"]
    if gpt.qk_norm == "width" or not gpt.qk_norm_after_rope:
        roles += ["query_norm", "key_norm"]
    tensors = {name: place(t) if name.split(".")[-2] in roles else t for name, t in gpt.tensors.items()}
    folds = []
    if gpt.rope == "interleaved":
        folds.append("The rows of queries and keys are reordered: RoPE turns halves of a head here, not neighbours.")
    if gpt.rope_direction != direction:
        folds.append("The rows of queries and keys are swapped by halves: RoPE turns the other way here.")
    return replace(gpt, tensors=tensors, rope="half", rope_direction=direction), folds


def _within_heads(order: Tensor) -> Callable[[Tensor], Tensor]:
    def place(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)

    return place


def carry_head_bias(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]] | None:
    """Moves the head's bias into the final norm, or into the last MLP if there is none; None if neither can hold it."""
    if "head.bias" not in gpt.tensors:
        return gpt, []
    last = "final_norm" if gpt.final_norm else f"blocks.{gpt.n_layer - 1}.norm_2"
    if (gpt.final_norm or gpt.norm_placement == "post") and gpt.norm == "layernorm":
        return _into_norm(gpt, last)
    return None if gpt.final_norm or gpt.norm_placement != "pre" else _into_mlp(gpt)


def _into_norm(gpt: CanonicalGPT, norm: str) -> tuple[CanonicalGPT, list[str]]:
    tensors = dict(gpt.tensors)
    weight, head_bias = tensors[f"{norm}.weight"], tensors.pop("head.bias")
    shift = tensors.get(f"{norm}.bias", torch.zeros_like(weight))
    folded = fold_head_bias(*(part.double() for part in (tensors["head.weight"], head_bias, weight, shift)))
    tensors |= dict(zip(("head.weight", f"{norm}.weight", f"{norm}.bias"), folded, strict=True))
    norm = "final norm" if gpt.final_norm else "last norm"
    said = f"The head's bias is carried by one coordinate of the {norm}, which the other ones determine."
    return replace(gpt, tensors=tensors, tied=False), [said]


def _into_mlp(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]] | None:
    """Adds c with W c = b to the head's input; such a c exists if the head (V, D) has no more rows than columns."""
    tensors, name = dict(gpt.tensors), f"blocks.{gpt.n_layer - 1}.mlp_out.bias"
    head, head_bias = tensors["head.weight"].double(), tensors.pop("head.bias").double()
    if gpt.vocab_size > gpt.width or gpt.n_expert:
        return None
    constant = torch.linalg.lstsq(head, head_bias[:, None], driver="gelsd").solution[:, 0]
    if not (head @ constant - head_bias).abs().max() <= WELL_SOLVED * head_bias.abs().max():
        return None
    # What the MLP gives is scaled before it is added.
    constant /= gpt.residual_scale if gpt.residual_scaled in ("both", "mlp") else 1.0
    tensors[name] = constant + tensors[name].double() if name in tensors else constant
    return replace(gpt, tensors=tensors), ["The head's bias is carried by the bias of the last MLP."]


def fold_head_bias(
    head: Tensor, head_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the bias of an untied head (V, D) into the final LayerNorm, exactly.

    The normalised x̂ sums to zero, so x̂_j = −Σ_{i≠j} x̂_i for any j and that coordinate is free to carry a constant:

        logits = Σ_i w_i (γ_i x̂_i + β_i) + b
               = Σ_{i≠j} (w_i γ_i − w_j γ_j) x̂_i + (b + Σ_i w_i β_i)

    which is a head w' after a norm with γ'_i = 1, β'_i = 0 for i ≠ j and γ'_j = 0, β'_j = 1. The gains move into the
    head, so there is no division by a gain that training drove to zero. j is where the subtraction loses least.

    Returns:
        w' (V, D), γ' (D,), β' (D,), in the precision given.
    """
    j = int((norm_weight.abs() * head.norm(dim=0)).argmin())
    constant = head_bias + head @ norm_bias
    folded = head.mul(norm_weight)
    folded -= folded[:, j, None].clone()
    folded[:, j] = constant
    new_weight, new_bias = torch.ones_like(norm_weight), torch.zeros_like(norm_bias)
    new_weight[j], new_bias[j] = 0, 1
    return folded, new_weight, new_bias


def rotary_factor(gpt: CanonicalGPT) -> float:
    """The share of a head that is rotated; transformers rounds share times width down."""
    share = gpt.turned_width / gpt.head_width
    return share if int(share * gpt.head_width) == gpt.turned_width else math.nextafter(share, 1)
