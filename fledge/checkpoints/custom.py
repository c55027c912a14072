"""The canonical GPT as a model with a custom class: nothing is folded, each feature has a field in config.json."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from fledge.checkpoints.canonical import CanonicalGPT, alibi_slopes
from fledge.checkpoints.targets import to_target
from fledge.checkpoints.targets.folds import fold_positions
from fledge.custom.configuration_fledge_gpt import FledgeGPTConfig
from fledge.errors import UserError

VALUE = ("value_embedding", "value_gate", "value_lambdas")
BLOCK = ("query", "key", "value", "output", "query_norm", "key_norm", *VALUE)
LAMBDAS = ("value_lambdas", "residual_lambdas", "smear_lambda", "backout_lambda")
SAME = (
    *(
        "activation",
        "attention_scale",
        "attention_cap",
        "norm",
        "norm_eps",
        "norm_offset",
        "norm_unbiased",
        "norm_eps_outside",
        "final_norm_eps",
        "qk_norm_eps",
        "norm_placement",
        "parallel",
    ),
    *(
        "final_norm",
        "embedding_norm",
        "rope",
        "rope_theta",
        "rope_direction",
        "rope_width",
        "rope_span",
        "qk_norm",
        "qk_norm_type",
    ),
    *("qk_norm_after_rope", "experts_per_token", "renormalise_experts", "embedding_scale", "window_pattern"),
    *("value_gate_factor", "backout_layer", "residual_scale", "residual_scaled", "logit_scale"),
)
"""Fields with the same name in both."""


def represent(
    gpt: CanonicalGPT, token_ids: dict[str, Any], target: str, allow_custom_code: bool
) -> tuple[PreTrainedConfig, dict[str, Tensor], list[str]]:
    """`to_target`, or a model with the custom class if no class of transformers represents `gpt` and it is allowed.

    Raises:
        UserError: no target represents it and custom code is not allowed; or the requested target does not represent
            it.
    """
    try:
        return to_target(gpt, token_ids, target)
    except UserError as reason:
        if target != "auto":
            raise
        if not allow_custom_code:
            raise UserError(
                f"{reason} --allow_custom_code writes it exactly, with a small modeling file beside the weights."
            ) from reason
        return *to_custom(gpt, token_ids), [f"{reason} So it gets code of its own."]


def to_custom(gpt: CanonicalGPT, token_ids: dict[str, Any]) -> tuple[FledgeGPTConfig, dict[str, Tensor]]:
    """The config and the state dict of `FledgeGPTForCausalLM`.

    Raises:
        UserError: it looks ahead, or its blocks do not have the same tensors.
    """
    if not gpt.causal:
        raise UserError("A model that was trained without a causal mask cannot write text; train it again with a mask.")
    parameters, value_layers = _parameters(gpt.tensors, gpt.n_layer)
    widths = mlp_widths(gpt)
    slopes = gpt.tensors.get("alibi.slopes", alibi_slopes(gpt.n_head)).tolist() if gpt.alibi else None
    expert = "experts.0." if gpt.n_expert else ""
    shared = gpt.tensors.get("blocks.0.shared.mlp_in.weight", ())
    gates = [gpt.tensors[name] for n in value_layers if (name := f"blocks.{n}.value_gate.weight") in gpt.tensors]
    smear_gate = gpt.tensors.get("smear_gate.weight")
    config = FledgeGPTConfig(
        vocab_size=gpt.vocab_size,
        hidden_size=gpt.width,
        num_hidden_layers=gpt.n_layer,
        num_attention_heads=gpt.n_head,
        num_key_value_heads=gpt.n_kv_head,
        head_dim=gpt.head_width,
        intermediate_size=len(gpt.tensors[f"blocks.0.{expert}mlp_in.weight"]),
        intermediate_sizes=widths if len({*widths}) > 1 else None,
        shared_intermediate_size=len(shared),
        value_layers=value_layers or None,
        value_gate_width=gates[0].shape[1] if gates else 0,
        smear_width=0 if smear_gate is None else smear_gate.shape[1],
        num_experts=gpt.n_expert,
        max_position_embeddings=gpt.context_length,
        parameters=parameters,
        alibi_slopes=slopes,
        visible_window=gpt.window,
        final_logit_softcapping=gpt.logit_cap,
        tie_word_embeddings=gpt.tied,
        **{name: getattr(gpt, name) for name in SAME},
        **token_ids,
    )
    weights = {_place(name): tensor for name, tensor in gpt.tensors.items() if name != "alibi.slopes"}
    if (table := fold_positions(gpt)[0].tensors.get("position_embedding.weight")) is not None:
        weights["model.position_embedding.weight"] = table
    if gpt.tied:
        weights.pop("lm_head.weight")
    return config, weights


def mlp_widths(gpt: CanonicalGPT) -> list[int]:
    """The width of each block's MLP; nothing for experts."""
    names = [f"blocks.{n}.mlp_in.weight" for n in range(gpt.n_layer)]
    return [len(gpt.tensors[name]) for name in names if name in gpt.tensors]


def _parameters(tensors: Mapping[str, Tensor], n_layer: int) -> tuple[list[str], list[int]]:
    """The names of what there is, those of a block and of an expert once, and the blocks with value embeddings.

    Raises:
        UserError: the blocks differ in more than these and the widths of their MLPs.
    """
    blocks: list[dict[str, tuple[int, ...] | None]] = [{} for _ in range(n_layer)]
    values: list[set[str]] = [set() for _ in range(n_layer)]
    ends = set()
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            ends.add(name)
            continue
        _, number, part = name.split(".", 2)
        if part.split(".")[0] in VALUE:
            values[int(number)].add(part)
            continue
        if part.startswith("experts."):
            part = f"experts.{part.split('.', 2)[2]}"
        blocks[int(number)][part] = None if part.startswith("mlp_") else tuple(tensor.shape)
    value_layers = [number for number, parts in enumerate(values) if parts]
    own = values[value_layers[0]] if value_layers else set()
    for place, (block, parts) in enumerate(zip(blocks, values, strict=True)):
        odd = {part for part in blocks[0].keys() | block.keys() if blocks[0].get(part, ()) != block.get(part, ())}
        odd |= parts ^ own if parts else set()
        if odd:
            raise UserError(f"Block {place} has another {min(odd)} than block 0, and the blocks must be alike.")
    return sorted(ends - {"alibi.slopes"}) + [f"block.{part}" for part in sorted({*blocks[0], *own})], value_layers


def _place(name: str) -> str:
    name = name.removesuffix(".weight") if name.split(".")[-2] in LAMBDAS else name
    if name.startswith("head."):
        return f"lm_{name}"
    if not name.startswith("blocks."):
        return f"model.{name}"
    _, number, part = name.split(".", 2)
    first = part.split(".")[0]
    room = "attention." if first in BLOCK else "" if first.startswith(("norm_", "residual_")) else "mlp."
    return f"model.blocks.{number}.{room}{part}"
