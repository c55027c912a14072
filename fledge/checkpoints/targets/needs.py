"""What a canonical GPT needs a class of transformers to have, in words that end the sentence "the class has no …"."""

import re

from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT

NORM_NAMES = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
PLACEMENTS = {
    "pre": "pre-norm blocks",
    "post": "post-norm blocks",
    "sublayer": "norm behind each sublayer alone",
    "both": "norms before and behind each sublayer",
    "replace": "norms that replace the residual stream",
    "none": "blocks without norms",
}
MIXING = {
    "value_embedding": "value embeddings",
    "residual_lambdas": "learned weights of the residual stream",
    "smear_gate": "mix of each embedding with the one before it",
    "backout_lambda": "middle of the residual stream taken off at its end",
}
MLP_IN = r"blocks\.\d+\.mlp_in\.weight"
QK_NORMS = {
    (None, "layernorm"): "attention without a norm of queries and keys",
    (None, "rmsnorm"): "attention without a norm of queries and keys",
    ("head", "layernorm"): "LayerNorm of each head's queries and keys",
    ("head", "rmsnorm"): "RMSNorm of each head's queries and keys",
    ("width", "layernorm"): "LayerNorm over all queries and over all keys",
    ("width", "rmsnorm"): "RMSNorm over all queries and over all keys",
}


def needs(gpt: CanonicalGPT) -> list[str]:
    """Every feature of the model that some class lacks; all norms must have weights."""
    found = [*_positions(gpt), NORM_NAMES[gpt.norm], PLACEMENTS[gpt.norm_placement], _mlp(gpt)]
    if gpt.rope and gpt.turned_width != gpt.head_width:
        found.append("rotation of a part of each head")
    if _any_weight(gpt, "norm_1", "norm_2", "norm_1_after", "norm_2_after", "final_norm", "embedding_norm"):
        found.append("weights in norms")
    found += _mixing(gpt) + _unusual_norms(gpt)
    if gpt.rope and gpt.rope_span == "width" and gpt.n_head > 1:
        found.append("rotation over all heads together")
    if gpt.window and gpt.window_pattern and "L" in gpt.window_pattern:
        found.append("sliding window in some of its blocks")
    if len({len(tensor) for name, tensor in gpt.tensors.items() if re.fullmatch(MLP_IN, name)}) > 1:
        found.append("MLPs of different widths")
    found.append("final norm" if gpt.final_norm else "model without a final norm")
    if gpt.final_norm and gpt.norm_placement == "post":
        found.append("final norm behind post-norm blocks")
    found.append("norm of the embeddings" if gpt.embedding_norm else "embeddings without a norm")
    if gpt.residual_scaled == "stream" and gpt.residual_scale != 1:
        found.append("scale of its residual stream")
    if gpt.parallel:
        found.append("parallel blocks")
    if len(gpt.tensors["blocks.0.query.weight"]) != gpt.width:
        found.append("heads of another width than the model's share")
    found.append(QK_NORMS[gpt.qk_norm, gpt.qk_norm_type])
    if gpt.qk_norm == "head" and gpt.qk_norm_type == "layernorm" and gpt.qk_norm_after_rope and gpt.rope:
        found.append("LayerNorm behind the rotation")
    scaled = gpt.attention_scale != gpt.usual_scale
    if gpt.qk_norm and (scaled or _any_weight(gpt, "query_norm", "key_norm")):
        found.append("weights in a norm of queries and keys")
        if gpt.qk_norm_after_rope and gpt.rope and _any_weight(gpt, "query_norm", "key_norm"):
            found.append("weights in a norm behind the rotation")
    for value, words in (
        (gpt.attention_cap, "soft cap on attention scores"),
        (gpt.logit_cap, "soft cap on logits"),
        (gpt.window, "sliding window"),
    ):
        if value is not None:
            found.append(words)
    return found


def biased(gpt: CanonicalGPT) -> set[str]:
    """The roles that have a bias: query, mlp_in, final_norm …"""
    return {name.split(".")[-2] for name in gpt.tensors if name.endswith(".bias")}


def _positions(gpt: CanonicalGPT) -> list[str]:
    """The kind of positions, and which others stand beside it."""
    if not (gpt.rope or gpt.alibi):
        return ["learned positions"]
    found = ["rotary positions" if gpt.rope else "ALiBi"]
    if gpt.rope and gpt.alibi:
        found.append("ALiBi beside rotary positions")
    if "position_embedding.weight" in gpt.tensors:
        found.append(f"learned positions beside {'rotary ones' if gpt.rope else 'ALiBi'}")
    return found


def _mixing(gpt: CanonicalGPT) -> list[str]:
    roles = {name.split(".")[-2] for name in gpt.tensors}
    return [words for role, words in MIXING.items() if role in roles]


def _unusual_norms(gpt: CanonicalGPT) -> list[str]:
    found = []
    if gpt.norm_unbiased and "layernorm" in (gpt.norm, gpt.qk_norm and gpt.qk_norm_type):
        found.append("LayerNorm with D − 1 in its variance")
    if gpt.norm_eps_outside:
        found.append("norm with its epsilon beside the root")
    if gpt.final_norm and gpt.final_norm_eps not in (None, gpt.norm_eps):
        found.append("other epsilon in its final norm")
    if gpt.qk_norm and gpt.qk_norm_eps not in (None, gpt.norm_eps):
        found.append("other epsilon in a norm of queries and keys")
    return found


def _mlp(gpt: CanonicalGPT) -> str:
    if gpt.n_expert:
        if not gpt.gated:
            return "experts without a gate"
        shared = "blocks.0.shared.mlp_in.weight" in gpt.tensors
        return "experts beside a shared one" if shared else "experts"
    return "gated MLP" if gpt.gated else "MLP without a gate"


def _any_weight(gpt: CanonicalGPT, *roles: str) -> bool:
    """Whether one of these norms has a weight that is not one."""

    def weighs(tensor: Tensor) -> bool:
        return not bool((tensor == 1).all())

    named = {f".{role}.weight" for role in roles}
    return any(weighs(tensor) for name, tensor in gpt.tensors.items() if any(f".{name}".endswith(n) for n in named))
