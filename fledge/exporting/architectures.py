"""The architectures of llama.cpp: the keys and tensors of each under GGUF's names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GPT2Config, LlamaConfig, StableLmConfig

from fledge.errors import UserError


def _gpt2(config: GPT2Config, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse(
        {
            f"activation {config.activation_function}": "gelu" not in config.activation_function,
            "attention without its scale": not config.scale_attn_weights,
            "attention scaled by layer": config.scale_attn_by_inverse_layer_idx,
        }
    )
    tensors = {
        "token_embd.weight": weights["transformer.wte.weight"],
        "position_embd.weight": weights["transformer.wpe.weight"],
    }
    names = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2"}
    names |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    pairs = [(f"blk.{n}.{to}", f"transformer.h.{n}.{of}") for n in range(config.n_layer) for to, of in names.items()]
    for target, source in [*pairs, ("output_norm", "transformer.ln_f")]:
        weight = weights[f"{source}.weight"]
        # transformers' GPT-2 stores its projections as (in, out), GGUF as (out, in).
        tensors[f"{target}.weight"] = weight.T if ".c_" in source else weight
        tensors[f"{target}.bias"] = weights[f"{source}.bias"]
    inner = config.n_inner or 4 * config.n_embd
    return {"feed_forward_length": inner, "attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}, tensors


def _llama(config: LlamaConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse({f"activation {config.hidden_act}": config.hidden_act != "silu"})
    keys, tensors = _rotary(config, weights)
    # RoPE in llama.cpp rotates neighbouring coordinates, in transformers coordinates i and i + half a head.
    for name in [name for name in tensors if ".attn_q." in name or ".attn_k." in name]:
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        weight = tensors[name]
        tensors[name] = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    # Heads may have another width than their share of the model's.
    keys |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), config.head_dim)
    return keys | {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}, tensors


def _stablelm(config: StableLmConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse(
        {
            f"activation {config.hidden_act}": config.hidden_act != "silu",
            "norms of queries and keys": config.qk_layernorm,
            "parallel sublayers": config.use_parallel_residual,
        }
    )
    keys, tensors = _rotary(config, weights)
    return keys | {"attention.layer_norm_epsilon": float(config.layer_norm_eps)}, tensors


def _rotary(
    config: LlamaConfig | StableLmConfig, weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys and tensors that LLaMA and StableLM have in common."""
    rope: Any = config.rope_parameters
    _refuse({f"RoPE of the kind {rope['rope_type']}": rope["rope_type"] != "default"})
    head = config.hidden_size // config.num_attention_heads
    keys = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    pairs = [
        (f"blk.{n}.{to}", f"model.layers.{n}.{of}") for n in range(config.num_hidden_layers) for to, of in names.items()
    ]
    tensors = {
        f"{target}.{kind}": weights[f"{source}.{kind}"]
        for target, source in [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), *pairs]
        for kind in ("weight", "bias")
        if f"{source}.{kind}" in weights
    }
    return keys, tensors


Written = tuple[dict[str, Any], dict[str, Tensor]]  # keys below the architecture's name, tensors by GGUF's names
ARCHITECTURES: dict[str, Callable[[Any, dict[str, Tensor]], Written]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "stablelm": _stablelm,
}


def _refuse(obstacles: dict[str, bool]) -> None:
    if found := next((obstacle for obstacle, there in obstacles.items() if there), None):
        raise UserError(f"llama.cpp cannot run this model: it has no {found}.")
