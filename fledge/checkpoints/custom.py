"""The canonical GPT as a model with code of its own: nothing is folded, each feature has a field in config.json."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from fledge.checkpoints.canonical import CanonicalGPT, alibi_slopes
from fledge.checkpoints.targets import to_target
from fledge.cli import UserError
from fledge.custom.configuration_fledge_gpt import FledgeGPTConfig

BLOCK = ("query", "key", "value", "output", "query_norm", "key_norm")
SAME = (
    *(
        "activation",
        "attention_scale",
        "attention_cap",
        "norm",
        "norm_eps",
        "norm_offset",
        "norm_placement",
        "parallel",
    ),
    *("final_norm", "embedding_norm", "rope", "rope_theta", "rope_direction", "rope_width", "qk_norm", "qk_norm_type"),
    *("qk_norm_after_rope", "experts_per_token", "renormalise_experts", "embedding_scale"),
)
"""Fields that are called alike on both sides."""


def represent(
    gpt: CanonicalGPT, token_ids: dict[str, int | None], target: str, allow_custom_code: bool
) -> tuple[PreTrainedConfig, dict[str, Tensor], list[str]]:
    """`to_target`, or a model with code of its own where no class of transformers holds `gpt` and that is allowed.

    Raises:
        UserError: no target holds it and code of its own is not allowed; or the target asked for does not hold it.
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


def to_custom(gpt: CanonicalGPT, token_ids: dict[str, int | None]) -> tuple[FledgeGPTConfig, dict[str, Tensor]]:
    """The config and the state dict of `FledgeGPTForCausalLM`.

    Raises:
        UserError: it looks ahead, or its blocks do not have the same tensors.
    """
    if not gpt.causal:
        raise UserError("A model that was trained without a causal mask cannot write text; train it again with a mask.")
    parameters = _parameters(gpt.tensors, gpt.n_layer)
    slopes = gpt.tensors.get("alibi.slopes", alibi_slopes(gpt.n_head)).tolist() if gpt.alibi else None
    expert = "experts.0." if gpt.n_expert else ""
    shared = gpt.tensors.get("blocks.0.shared.mlp_in.weight", ())
    config = FledgeGPTConfig(
        vocab_size=gpt.vocab_size,
        hidden_size=gpt.width,
        num_hidden_layers=gpt.n_layer,
        num_attention_heads=gpt.n_head,
        num_key_value_heads=gpt.n_kv_head,
        head_dim=gpt.head_width,
        intermediate_size=len(gpt.tensors[f"blocks.0.{expert}mlp_in.weight"]),
        shared_intermediate_size=len(shared),
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
    if "position_embedding.weight" in gpt.tensors:
        weights["model.position_embedding.weight"] = gpt.tensors["position_embedding.weight"][: gpt.context_length]
    if gpt.tied:
        weights.pop("lm_head.weight")
    return config, weights


def _parameters(tensors: Mapping[str, Tensor], n_layer: int) -> list[str]:
    """The names of what there is, those of a block and of an expert once."""
    blocks = [{} for _ in range(n_layer)]
    ends = set()
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            ends.add(name)
            continue
        _, number, part = name.split(".", 2)
        if part.startswith("experts."):
            part = f"experts.{part.split('.', 2)[2]}"
        blocks[int(number)][part] = tuple(tensor.shape)
    for number, block in enumerate(blocks):
        if block != blocks[0]:
            odd = sorted(part for part in blocks[0].keys() | block.keys() if blocks[0].get(part) != block.get(part))
            raise UserError(f"Block {number} has another {odd[0]} than block 0, and the blocks must be alike.")
    return sorted(ends - {"alibi.slopes"}) + [f"block.{part}" for part in sorted(blocks[0])]


def _place(name: str) -> str:
    if name.startswith("head."):
        return f"lm_{name}"
    if not name.startswith("blocks."):
        return f"model.{name}"
    _, number, part = name.split(".", 2)
    room = "attention." if part.split(".")[0] in BLOCK else "" if part.startswith("norm_") else "mlp."
    return f"model.blocks.{number}.{room}{part}"
