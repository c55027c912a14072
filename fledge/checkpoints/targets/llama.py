"""LLaMA and the classes that share the names of its modules and of its config keys."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    ArceeConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.targets.folds import rotary_factor
from fledge.checkpoints.targets.needs import biased
from fledge.checkpoints.targets.target import (
    ACTIVATION_NAMES,
    ATTENTION,
    MLP,
    NORMS,
    OWN_HEADS,
    PLAIN,
    QK_RMS,
    QKV,
    ROPE_RMS,
    USUAL,
    WINDOW,
    WINDOWS,
    Config,
    Names,
    Target,
    attention_bias,
    mlp_width,
)

LLAMA_NAMES: Names = {
    "token_embedding": "model.embed_tokens",
    "norm_1": "model.layers.{n}.input_layernorm",
    "query": "model.layers.{n}.self_attn.q_proj",
    "key": "model.layers.{n}.self_attn.k_proj",
    "value": "model.layers.{n}.self_attn.v_proj",
    "output": "model.layers.{n}.self_attn.o_proj",
    "norm_2": "model.layers.{n}.post_attention_layernorm",
    "mlp_gate": "model.layers.{n}.mlp.gate_proj",
    "mlp_in": "model.layers.{n}.mlp.up_proj",
    "mlp_out": "model.layers.{n}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
UNGATED_NAMES: Names = {role: name for role, name in LLAMA_NAMES.items() if role != "mlp_gate"}
QK_NORM_NAMES: Names = {
    "query_norm": "model.layers.{n}.self_attn.q_norm",
    "key_norm": "model.layers.{n}.self_attn.k_norm",
}


def common(gpt: CanonicalGPT, given: Config) -> Config:
    """The config keys that LLaMA's family has in common."""
    sizes = {
        "hidden_size": gpt.width,
        "num_hidden_layers": gpt.n_layer,
        "num_attention_heads": gpt.n_head,
        "num_key_value_heads": gpt.n_kv_head,
        "max_position_embeddings": gpt.context_length,
        "hidden_act": ACTIVATION_NAMES[gpt.activation],
        "rope_parameters": {"rope_type": "default", "rope_theta": gpt.rope_theta},
    }
    return sizes | given | ({} if gpt.n_expert else {"intermediate_size": mlp_width(gpt)})


def rms(gpt: CanonicalGPT, given: Config, **more: Any) -> Config:
    """The same for a class with RMSNorm, and `more` keys."""
    return common(gpt, given) | {"rms_norm_eps": gpt.norm_eps} | more


def _mlp_bias(gpt: CanonicalGPT) -> bool:
    return bool(biased(gpt) & MLP)


def _whole_share(gpt: CanonicalGPT) -> list[str]:
    return [f"width {gpt.width} with {gpt.n_head} heads"] if gpt.width % gpt.n_head else []


def layer_types(gpt: CanonicalGPT) -> list[str]:
    return ["sliding_attention" if gpt.window_of(n) else "full_attention" for n in range(gpt.n_layer)]


def windowed(gpt: CanonicalGPT) -> Config:
    """Qwen's config keys for a sliding window."""
    return {"use_sliding_window": gpt.window is not None, "sliding_window": gpt.window}


LLAMA = Target(
    config=lambda gpt, given: LlamaConfig(
        **rms(gpt, given, attention_bias=attention_bias(gpt), mlp_bias=_mlp_bias(gpt), head_dim=gpt.head_width)
    ),
    names=LLAMA_NAMES,
    holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | {"gated MLP"},
    grouped=(ATTENTION, MLP),
    limits=_whole_share,
)


def _stablelm(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": gpt.rope_theta, "partial_rotary_factor": rotary_factor(gpt)}
    return StableLmConfig(
        **common(gpt, given) | {"rope_parameters": rope},
        layer_norm_eps=gpt.norm_eps,
        use_qkv_bias=bool(biased(gpt) & {*QKV}),
        use_parallel_residual=gpt.parallel,
        qk_layernorm=gpt.qk_norm is not None,
    )


def _stablelm_limits(gpt: CanonicalGPT) -> list[str]:
    def differs(kind: str) -> bool:
        pairs = [[gpt.tensors.get(f"blocks.{n}.norm_{i}.{kind}") for i in (1, 2)] for n in range(gpt.n_layer)]
        return any(a is not b and (a is None or b is None or not torch.equal(a, b)) for a, b in pairs)

    return ["two norms in parallel blocks"] if gpt.parallel and (differs("weight") or differs("bias")) else []


STABLELM = Target(
    config=_stablelm,
    names=LLAMA_NAMES
    | {
        "query_norm": "model.layers.{n}.self_attn.q_layernorm.norms.{h}",
        "key_norm": "model.layers.{n}.self_attn.k_layernorm.norms.{h}",
    },
    holds=USUAL
    | PLAIN
    | {"rotary positions", "LayerNorm", "gated MLP", "rotation of a part of each head", "parallel blocks"}
    | {"LayerNorm of each head's queries and keys", "weights in a norm of queries and keys"},
    always=NORMS,
    grouped=(frozenset(QKV),),
    limits=_stablelm_limits,
    unused=lambda gpt: {"norm_2"} if gpt.parallel else set(),
)


STARCODER2 = Target(
    config=lambda gpt, given: Starcoder2Config(
        **common(gpt, given),
        norm_epsilon=gpt.norm_eps,
        sliding_window=gpt.window,
        use_bias=attention_bias(gpt) or _mlp_bias(gpt),
    ),
    names=UNGATED_NAMES | {"mlp_in": "model.layers.{n}.mlp.c_fc", "mlp_out": "model.layers.{n}.mlp.c_proj"},
    holds=USUAL | PLAIN | WINDOW | {"rotary positions", "LayerNorm", "MLP without a gate"},
    always=NORMS,
    grouped=(ATTENTION | {"mlp_in", "mlp_out"},),
)


ARCEE = Target(
    config=lambda gpt, given: ArceeConfig(
        **rms(gpt, given, attention_bias=attention_bias(gpt), mlp_bias=_mlp_bias(gpt), head_dim=gpt.head_width)
    ),
    names=UNGATED_NAMES,
    holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | {"MLP without a gate"},
    grouped=(ATTENTION, frozenset({"mlp_in", "mlp_out"})),
    limits=_whole_share,
)


MISTRAL = Target(
    config=lambda gpt, given: MistralConfig(**rms(gpt, given, head_dim=gpt.head_width, sliding_window=gpt.window)),
    names=LLAMA_NAMES,
    holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | WINDOW | {"gated MLP"},
)


QWEN3 = Target(
    config=lambda gpt, given: Qwen3Config(
        **rms(gpt, given, attention_bias=attention_bias(gpt), head_dim=gpt.head_width),
        **windowed(gpt),
        layer_types=layer_types(gpt),
    ),
    names=LLAMA_NAMES | QK_NORM_NAMES,
    holds=USUAL | ROPE_RMS | QK_RMS | OWN_HEADS | WINDOWS | {"gated MLP"},
    grouped=(ATTENTION,),
)


NANOCHAT = Target(
    config=lambda gpt, given: NanoChatConfig(
        **rms(gpt, given, attention_bias=attention_bias(gpt), final_logit_softcapping=gpt.logit_cap)
    ),
    names={role: name for role, name in UNGATED_NAMES.items() if role not in NORMS}
    | {"mlp_in": "model.layers.{n}.mlp.fc1", "mlp_out": "model.layers.{n}.mlp.fc2"},
    holds=ROPE_RMS
    | {"pre-norm blocks", "final norm", "norm of the embeddings", "MLP without a gate", "soft cap on logits"}
    | {"RMSNorm of each head's queries and keys"},
    grouped=(ATTENTION,),
    rope_direction=-1,
    norm_after_rope=True,
)


def _gemma2(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    keys = rms(gpt, given, head_dim=gpt.head_width, attention_bias=attention_bias(gpt))
    return Gemma2Config(
        hidden_activation=keys.pop("hidden_act"),
        query_pre_attn_scalar=gpt.head_width,
        sliding_window=gpt.window or gpt.context_length,
        layer_types=layer_types(gpt),
        attn_logit_softcapping=gpt.attention_cap,
        final_logit_softcapping=gpt.logit_cap,
        **keys,
    )


def _gemma2_place(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """Gemma adds one to the weights of its norms."""
    return tensor.double() - 1 if "norm" in name else tensor


GEMMA2 = Target(
    config=_gemma2,
    names=LLAMA_NAMES
    | {
        "norm_1_after": "model.layers.{n}.post_attention_layernorm",
        "norm_2": "model.layers.{n}.pre_feedforward_layernorm",
        "norm_2_after": "model.layers.{n}.post_feedforward_layernorm",
    },
    holds=USUAL - {"pre-norm blocks"}
    | PLAIN
    | ROPE_RMS
    | OWN_HEADS
    | WINDOWS
    | {"norms before and behind each sublayer", "gated MLP", "soft cap on logits", "soft cap on attention scores"},
    grouped=(ATTENTION,),
    limits=_whole_share,
    place=_gemma2_place,
    scale=lambda width: width**0.5,
)


OLMO2 = Target(
    config=lambda gpt, given: Olmo2Config(**rms(gpt, given, attention_bias=attention_bias(gpt))),
    names=LLAMA_NAMES
    | QK_NORM_NAMES
    | {
        "norm_1": "model.layers.{n}.post_attention_layernorm",
        "norm_2": "model.layers.{n}.post_feedforward_layernorm",
    },
    holds=USUAL - {"pre-norm blocks"}
    | ROPE_RMS
    | {"norm behind each sublayer alone", "gated MLP"}
    | {"RMSNorm over all queries and over all keys", "weights in a norm of queries and keys"},
    grouped=(ATTENTION,),
)


GRANITE = Target(
    config=lambda gpt, given: GraniteConfig(
        **rms(gpt, given, attention_bias=attention_bias(gpt), mlp_bias=_mlp_bias(gpt)),
        embedding_multiplier=gpt.embedding_scale,
        residual_multiplier=gpt.residual_scale,
        attention_multiplier=gpt.attention_scale,
        logits_scaling=1 / gpt.logit_scale,
    ),
    names=LLAMA_NAMES,
    holds=USUAL | PLAIN | ROPE_RMS | {"gated MLP"},
    grouped=(ATTENTION, MLP),
    limits=lambda gpt: (
        []
        if gpt.residual_scaled == "both" or gpt.residual_scale == 1
        else [f"scale of its {gpt.residual_scaled} alone"]
    ),
    multipliers=True,
)
