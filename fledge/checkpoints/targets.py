"""The canonical GPT as a transformers model, exactly: what a target seems unable to hold is folded into what it has."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, StableLmConfig

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.cli import UserError

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
# What every target computes alike.
COMMON = {"norm_offset": 0.0, "norm_placement": "pre", "parallel": False, "final_norm": True, "embedding_norm": False}
COMMON |= {"rope_direction": 1, "rope_width": None, "alibi": False, "qk_norm": None, "attention_cap": None}
COMMON |= {"window": None, "causal": True, "n_expert": 0, "logit_cap": None}


def to_target(
    gpt: CanonicalGPT, token_ids: dict[str, int | None], target: str = "auto"
) -> tuple[PreTrainedConfig, dict[str, Tensor], list[str]]:
    """Represents `gpt` as GPT-2, StableLM or LLaMA.

    Args:
        gpt: the model to represent.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config.
        target: `gpt2`, `stablelm`, `llama`, or `auto` for the first of them that holds the model exactly.

    Returns:
        The config, the state dict (what was folded in float64, the rest as the checkpoint holds it), and one sentence
        for each fold.

    Raises:
        UserError: no target holds it, or not the one asked for, with the feature that stands in the way.
    """
    if target not in ("auto", *TARGETS):
        raise UserError(f"--target {target} is unknown; choose auto, {', '.join(TARGETS)}.")
    for name, value in COMMON.items():
        if getattr(gpt, name) != value:
            raise UserError(f"No target holds this model exactly: none computes {name} {getattr(gpt, name)}.")
    obstacles = {name: obstacle(gpt) for name, (obstacle, _) in TARGETS.items()}
    name = next((name for name in TARGETS if not obstacles[name]), None) if target == "auto" else target
    if name is None:
        told = "; ".join(f"{name} has no {obstacle}" for name, obstacle in obstacles.items())
        raise UserError(f"No target holds this model exactly: {told}.")
    if obstacles[name]:
        raise UserError(f"--target {name} cannot hold this model exactly: it has no {obstacles[name]}.")
    gpt, folds = _fold_common(gpt)
    config, weights = TARGETS[name][1](gpt, token_ids)
    if gpt.tied:
        weights.pop("lm_head.weight")
    return config, weights, folds


def refuse_unconvertible(gpt: CanonicalGPT) -> None:
    """Raises:
    UserError: attention or norms work as in no target.
    """
    if not gpt.causal:
        raise UserError(
            "It was trained without a causal mask (each position saw the ones after it), and such a model cannot "
            "write text: train it again with a mask."
        )
    if gpt.norm_placement == "post":
        raise UserError(
            "Its blocks are post-norm (norm(x + sublayer(x))), and every target normalises before a sublayer; if they "
            "are pre-norm (norm_first=True), say norm_placement: pre in a --mapping."
        )


def _fold_common(gpt: CanonicalGPT) -> tuple[CanonicalGPT, list[str]]:
    """Folds that every target needs alike: head bias, embedding scale, attention scale, missing output projection."""
    source, tensors, folds, tied = gpt.tensors, dict(gpt.tensors), [], gpt.tied
    if "head.bias" in source:
        parts = (
            source["head.weight"],
            tensors.pop("head.bias"),
            source["final_norm.weight"],
            _bias(source, "final_norm"),
        )
        folded = fold_head_bias(*(part.double() for part in parts))
        tensors |= dict(zip(("head.weight", "final_norm.weight", "final_norm.bias"), folded, strict=True))
        tied = False
        folds.append("The head's bias is carried by one coordinate of the final norm, which the other ones determine.")
    if gpt.embedding_scale != 1:
        tensors["token_embedding.weight"] = source["token_embedding.weight"].double() * gpt.embedding_scale
        tied = False
        folds.append(f"The embeddings hold their scale {gpt.embedding_scale:g}, and the head is untied from them.")
    if gpt.attention_scale != gpt.usual_scale:
        for name in [name for name in tensors if ".query." in name]:
            tensors[name] = tensors[name].double() * (gpt.attention_scale / gpt.usual_scale)
        folds.append(f"The attention scale {gpt.attention_scale:g} instead of {gpt.usual_scale:g} is in the queries.")
    if "blocks.0.output.weight" not in source:
        for n in range(gpt.n_layer):
            tensors[f"blocks.{n}.output.weight"] = torch.eye(gpt.width)
        folds.append("The missing attention output projection is an identity.")
    if gpt.rope == "interleaved":
        folds.append("The rows of queries and keys are reordered: RoPE turns halves of a head here, not neighbours.")
    return replace(gpt, tensors=tensors, tied=tied), folds


def fold_head_bias(
    head: Tensor, head_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the bias of an untied head (V, D) into the final LayerNorm, exactly.

    The normalised x̂ sums to zero, so x̂_j = −Σ_{i≠j} x̂_i for any j and that coordinate is free to carry a constant:

        logits = Σ_i w_i (γ_i x̂_i + β_i) + b
               = Σ_{i≠j} (w_i γ_i − w_j γ_j) x̂_i + (b + Σ_i w_i β_i)

    which is a head w' behind a norm with γ'_i = 1, β'_i = 0 for i ≠ j and γ'_j = 0, β'_j = 1. The gains go into the
    head, so nothing is divided by one that training drove to zero. j is where the subtraction loses least.

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


def _gpt2_obstacle(gpt: CanonicalGPT) -> str | None:
    if gpt.rope:
        return "rotary positions"
    if gpt.norm != "layernorm":
        return "RMSNorm"
    if gpt.gated:
        return "gated MLP"
    return "shared key and value heads" if gpt.n_kv_head != gpt.n_head else None


def _to_gpt2(gpt: CanonicalGPT, token_ids: dict[str, int | None]) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    source, width = gpt.tensors, gpt.width
    weights = {
        "transformer.wte.weight": source["token_embedding.weight"],
        "transformer.wpe.weight": source["position_embedding.weight"],
        "transformer.ln_f.weight": source["final_norm.weight"],
        "transformer.ln_f.bias": _bias(source, "final_norm"),
        "lm_head.weight": source["head.weight"],
    }
    for n in range(gpt.n_layer):
        block, into = f"blocks.{n}", f"transformer.h.{n}"
        parts = [f"{block}.{part}" for part in ("query", "key", "value")]
        # GPT-2's Conv1D holds (in, out).
        weights[f"{into}.attn.c_attn.weight"] = torch.cat([source[f"{part}.weight"] for part in parts]).T
        weights[f"{into}.attn.c_attn.bias"] = torch.cat([_bias(source, part) for part in parts])
        for role, name in (("output", "attn.c_proj"), ("mlp_in", "mlp.c_fc"), ("mlp_out", "mlp.c_proj")):
            weights[f"{into}.{name}.weight"] = source[f"{block}.{role}.weight"].T
            weights[f"{into}.{name}.bias"] = _bias(source, f"{block}.{role}")
        for role, name in (("norm_1", "ln_1"), ("norm_2", "ln_2")):
            weights[f"{into}.{name}.weight"] = source[f"{block}.{role}.weight"]
            weights[f"{into}.{name}.bias"] = _bias(source, f"{block}.{role}")
    mlp_width = source["blocks.0.mlp_in.weight"].shape[0]
    config = GPT2Config(
        vocab_size=gpt.vocab_size,
        n_positions=gpt.context_length,
        n_ctx=gpt.context_length,  # llama.cpp's converter reads this name
        n_embd=width,
        n_layer=gpt.n_layer,
        n_head=gpt.n_head,
        n_inner=None if mlp_width == 4 * width else mlp_width,
        activation_function=ACTIVATION_NAMES[gpt.activation],
        layer_norm_epsilon=gpt.norm_eps,
        # A short fine-tuning is better without dropout; a long one may raise these in config.json.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=gpt.tied,
        **token_ids,
    )
    return config, weights


def _rotary_obstacle(gpt: CanonicalGPT, norm: str) -> str | None:
    if not gpt.rope:
        return "learned positions"
    if gpt.norm != norm:
        return {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[gpt.norm]
    return None if gpt.gated else "MLP without a gate"


def _stablelm_obstacle(gpt: CanonicalGPT) -> str | None:
    biased = {name.split(".")[-2] for name in gpt.tensors if name.endswith(".bias")} & {"output", *MLP_NAMES}
    return _rotary_obstacle(gpt, "layernorm") or (f"bias in {', '.join(sorted(biased))}" if biased else None)


def _llama_obstacle(gpt: CanonicalGPT) -> str | None:
    return _rotary_obstacle(gpt, "rmsnorm") or ("bias on the head" if "head.bias" in gpt.tensors else None)


ATTENTION_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MLP_NAMES = {"mlp_gate": "gate_proj", "mlp_in": "up_proj", "mlp_out": "down_proj"}


def _to_rotary(gpt: CanonicalGPT, token_ids: dict[str, int | None]) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """StableLM (LayerNorm) and LLaMA (RMSNorm), which transformers writes alike."""
    source, norms = gpt.tensors, {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    layernorm = gpt.norm == "layernorm"
    weights = {"model.embed_tokens.weight": source["token_embedding.weight"], "lm_head.weight": source["head.weight"]}
    weights["model.norm.weight"] = source["final_norm.weight"]
    if layernorm:
        weights["model.norm.bias"] = _bias(source, "final_norm")
    inputs = {f"blocks.0.{part}.bias" for part in ("query", "key", "value")} & source.keys()
    attention_bias = bool(inputs) or "blocks.0.output.bias" in source
    mlp_bias = any(f"blocks.0.{part}.bias" in source for part in MLP_NAMES)
    for n in range(gpt.n_layer):
        block, into = f"blocks.{n}", f"model.layers.{n}"
        for role, name in norms.items():
            weights[f"{into}.{name}.weight"] = source[f"{block}.{role}.weight"]
            if layernorm:
                weights[f"{into}.{name}.bias"] = _bias(source, f"{block}.{role}")
        for room, names, biased in (("self_attn", ATTENTION_NAMES, attention_bias), ("mlp", MLP_NAMES, mlp_bias)):
            for role, name in names.items():
                turned = gpt.rope == "interleaved" and role in ("query", "key")
                place: Callable[[Tensor], Tensor] = _half_split(gpt) if turned else lambda tensor: tensor
                weights[f"{into}.{room}.{name}.weight"] = place(source[f"{block}.{role}.weight"])
                if biased and not (layernorm and role == "output"):
                    weights[f"{into}.{room}.{name}.bias"] = place(_bias(source, f"{block}.{role}"))
    common = dict(
        vocab_size=gpt.vocab_size,
        hidden_size=gpt.width,
        intermediate_size=source["blocks.0.mlp_in.weight"].shape[0],
        num_hidden_layers=gpt.n_layer,
        num_attention_heads=gpt.n_head,
        num_key_value_heads=gpt.n_kv_head,
        hidden_act=ACTIVATION_NAMES[gpt.activation],
        max_position_embeddings=gpt.context_length,
        tie_word_embeddings=gpt.tied,
        **token_ids,
    )
    rope = {"rope_type": "default", "rope_theta": gpt.rope_theta}
    if layernorm:
        rope |= {"partial_rotary_factor": 1.0}
        return (
            StableLmConfig(layer_norm_eps=gpt.norm_eps, use_qkv_bias=attention_bias, rope_parameters=rope, **common),
            weights,
        )
    return (
        LlamaConfig(
            rms_norm_eps=gpt.norm_eps,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            rope_parameters=rope,
            **common,
        ),
        weights,
    )


def _half_split(gpt: CanonicalGPT) -> Callable[[Tensor], Tensor]:
    """Rows of a head from neighbouring pairs to halves: transformers turns i and i + half a head together."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, gpt.head_width // 2, 2)).transpose(1, 2).flatten(0, 2)

    return place


def _bias(source: dict[str, Tensor], module: str) -> Tensor:
    """The bias, or the zeros that stand for a missing one."""
    return source[f"{module}.bias"] if f"{module}.bias" in source else torch.zeros(len(source[f"{module}.weight"]))


TARGETS = {
    "gpt2": (_gpt2_obstacle, _to_gpt2),
    "stablelm": (_stablelm_obstacle, _to_rotary),
    "llama": (_llama_obstacle, _to_rotary),
}
