"""One entry for each class of transformers: its features, the names of its modules, and its config.

This file is long because it consists of tables: `TARGETS` at the end has one entry per class, and each function before
it makes the config of one class. `names` maps each role of the canonical GPT to a module; {n} is the layer. Several
roles under one name are stacked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ArceeConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NanoChatConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from fledge.checkpoints.canonical import CanonicalGPT, alibi_slopes
from fledge.checkpoints.targets.folds import rotary_factor
from fledge.checkpoints.targets.needs import biased

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
QKV = ("query", "key", "value")
ATTENTION = frozenset({*QKV, "output"})
MLP = frozenset({"mlp_in", "mlp_gate", "mlp_out"})
NORMS = frozenset({"norm_1", "norm_2", "final_norm"})

Config = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A class of transformers.

    `holds` lists what it has in the words of `needs`. Biases of `always` are there in any case, those of a group in
    `grouped` all or none. `limits` gives the sizes and numbers that it cannot have, `unused` the roles that it leaves
    out, and `place` turns a tensor into the one of that name. `shares_heads` says that query heads may share keys and
    values; `rope_direction` and `norm_after_rope` are as in `CanonicalGPT`; `scale` multiplies embeddings;
    with `multipliers` embeddings, attention, residuals and logits each have one in the config.
    """

    config: Callable[[CanonicalGPT, Config], PreTrainedConfig]
    names: Mapping[str | tuple[str, ...], str]
    holds: frozenset[str]
    always: frozenset[str] = frozenset()
    grouped: tuple[frozenset[str], ...] = ()
    limits: Callable[[CanonicalGPT], list[str]] = lambda gpt: []
    unused: Callable[[CanonicalGPT], set[str]] = lambda gpt: set()
    place: Callable[[CanonicalGPT, str, Tensor], Tensor] = lambda gpt, role, tensor: tensor
    shares_heads: bool = True
    rope_direction: int = 1
    norm_after_rope: bool = False
    scale: Callable[[int], float] = field(default=lambda width: 1.0)
    multipliers: bool = False

    def has_bias(self, gpt: CanonicalGPT) -> set[str]:
        """The roles that have a bias in this class when it holds `gpt`."""
        own = biased(gpt)
        return {*self.always, *(role for group in self.grouped if group & own for role in group)}


USUAL = frozenset({"pre-norm blocks", "final norm", "weights in norms", "embeddings without a norm"})
PLAIN = frozenset({"attention without a norm of queries and keys"})
ROPE_RMS = frozenset({"rotary positions", "RMSNorm"})
QK_RMS = frozenset({"RMSNorm of each head's queries and keys", "weights in a norm of queries and keys"})
OWN_HEADS = frozenset({"heads of another width than the model's share"})
WINDOW = frozenset({"sliding window"})

Names = dict[str | tuple[str, ...], str]  # the module of each role, or of several that are one tensor
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
EXPERT_NAMES: Names = {role: name for role, name in LLAMA_NAMES.items() if role not in MLP} | {
    "router": "model.layers.{n}.mlp.gate",
    ("experts.mlp_gate", "experts.mlp_in"): "model.layers.{n}.mlp.experts.gate_up_proj",
    "experts.mlp_out": "model.layers.{n}.mlp.experts.down_proj",
}
GPT2_NAMES: Names = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "norm_1": "transformer.h.{n}.ln_1",
    QKV: "transformer.h.{n}.attn.c_attn",
    "output": "transformer.h.{n}.attn.c_proj",
    "norm_2": "transformer.h.{n}.ln_2",
    "mlp_in": "transformer.h.{n}.mlp.c_fc",
    "mlp_out": "transformer.h.{n}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


def _common(gpt: CanonicalGPT, given: Config) -> Config:
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


def mlp_width(gpt: CanonicalGPT) -> int:
    return len(gpt.tensors["blocks.0.mlp_in.weight"])


def _whole_share(gpt: CanonicalGPT) -> list[str]:
    return [f"width {gpt.width} with {gpt.n_head} heads"] if gpt.width % gpt.n_head else []


def _rms(gpt: CanonicalGPT, given: Config, **more: Any) -> Config:
    return _common(gpt, given) | {"rms_norm_eps": gpt.norm_eps} | more


def _attention_bias(gpt: CanonicalGPT) -> bool:
    return bool(biased(gpt) & ATTENTION)


def _mlp_bias(gpt: CanonicalGPT) -> bool:
    return bool(biased(gpt) & MLP)


def _gpt2(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return GPT2Config(
        n_positions=gpt.context_length,
        n_embd=gpt.width,
        n_layer=gpt.n_layer,
        n_head=gpt.n_head,
        n_inner=None if mlp_width(gpt) == 4 * gpt.width else mlp_width(gpt),
        activation_function=ACTIVATION_NAMES[gpt.activation],
        layer_norm_epsilon=gpt.norm_eps,
        # A short fine-tuning is better without dropout; a long one may raise these in config.json.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **given | {"n_ctx": gpt.context_length},  # llama.cpp's converter reads this name
    )


def _in_out(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """GPT-2's Conv1D holds (in, out)."""
    return tensor.T if tensor.dim() == 2 and ".h." in name else tensor


def _stablelm(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": gpt.rope_theta, "partial_rotary_factor": rotary_factor(gpt)}
    return StableLmConfig(
        **_common(gpt, given) | {"rope_parameters": rope},
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


def _opt(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=gpt.width,
        word_embed_proj_dim=gpt.width,
        num_hidden_layers=gpt.n_layer,
        num_attention_heads=gpt.n_head,
        ffn_dim=mlp_width(gpt),
        max_position_embeddings=gpt.context_length,
        activation_function=ACTIVATION_NAMES[gpt.activation],
        do_layer_norm_before=gpt.norm_placement == "pre",
        _remove_final_layer_norm=not gpt.final_norm,
        dropout=0.0,
        **given,
    )


def _opt_place(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """OPT's table of positions has two rows before the first one."""
    return torch.cat([tensor.new_zeros(2, gpt.width), tensor]) if "embed_positions" in name else tensor


def _default_eps(gpt: CanonicalGPT) -> list[str]:
    return [] if gpt.norm_eps == 1e-5 else [f"norm_eps {gpt.norm_eps:g}"]


def _mpt(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return MptConfig(
        d_model=gpt.width,
        n_heads=gpt.n_head,
        n_layers=gpt.n_layer,
        max_seq_len=gpt.context_length,
        layer_norm_epsilon=gpt.norm_eps,
        **given,
    )


def _mpt_limits(gpt: CanonicalGPT) -> list[str]:
    found = [] if gpt.activation == "gelu" else [f"activation {gpt.activation}"]
    found += ["MLP more than four times as wide as the model"] if mlp_width(gpt) > 4 * gpt.width else []
    slopes = gpt.tensors.get("alibi.slopes")
    usual = slopes is None or torch.equal(slopes.double(), alibi_slopes(gpt.n_head).double())
    return found if usual else [*found, "slopes of ALiBi other than the paper's"]


def _mpt_place(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """Pads a narrower MLP with zeros: the activation of zero is zero."""
    missing = 4 * gpt.width - mlp_width(gpt)
    if name.endswith("up_proj.weight"):
        return torch.cat([tensor, tensor.new_zeros(missing, gpt.width)])
    return torch.cat([tensor, tensor.new_zeros(gpt.width, missing)], 1) if name.endswith("down_proj.weight") else tensor


def _gpt_neox(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    common = _common(gpt, given)
    del common["num_key_value_heads"]
    rope = {"rope_type": "default", "rope_theta": gpt.rope_theta, "partial_rotary_factor": rotary_factor(gpt)}
    return GPTNeoXConfig(
        **common | {"rope_parameters": rope},
        layer_norm_eps=gpt.norm_eps,
        attention_bias=_attention_bias(gpt),
        use_parallel_residual=gpt.parallel,
    )


def _by_head(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """GPT-NeoX stacks query, key and value head by head."""
    if "query_key_value" not in name:
        return tensor
    return tensor.unflatten(0, (3, gpt.n_head, -1)).transpose(0, 1).flatten(0, 2)


def _gpt_neo(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return GPTNeoConfig(
        hidden_size=gpt.width,
        num_layers=gpt.n_layer,
        num_heads=gpt.n_head,
        intermediate_size=mlp_width(gpt),
        max_position_embeddings=gpt.context_length,
        window_size=gpt.window or gpt.context_length,
        attention_types=[[["local"], gpt.n_layer]],
        activation_function=ACTIVATION_NAMES[gpt.activation],
        layer_norm_epsilon=gpt.norm_eps,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        **given,
    )


def _gpt_neo_place(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """GPT-Neo does not scale attention scores."""
    return tensor.double() * gpt.usual_scale if ".q_proj." in name else tensor


def _gemma2(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    common = _rms(gpt, given, head_dim=gpt.head_width, attention_bias=_attention_bias(gpt))
    return Gemma2Config(
        hidden_activation=common.pop("hidden_act"),
        query_pre_attn_scalar=gpt.head_width,
        sliding_window=gpt.window or gpt.context_length,
        layer_types=["sliding_attention" if gpt.window else "full_attention"] * gpt.n_layer,
        attn_logit_softcapping=gpt.attention_cap,
        final_logit_softcapping=gpt.logit_cap,
        **common,
    )


def _gemma2_place(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """Gemma adds one to the weights of its norms."""
    return tensor.double() - 1 if "norm" in name else tensor


def _windowed(gpt: CanonicalGPT) -> Config:
    return {"use_sliding_window": gpt.window is not None, "sliding_window": gpt.window}


def _expert_limits(gpt: CanonicalGPT) -> list[str]:
    """transformers multiplies by all experts at once, in blocks of 16 bytes."""
    widths = {gpt.width, _expert_width(gpt)}
    return [f"experts of a width that is no multiple of 8 ({min(widths)})"] if any(w % 8 for w in widths) else []


def _experts(gpt: CanonicalGPT) -> Config:
    return {"num_experts_per_tok": gpt.experts_per_token}


def _expert_width(gpt: CanonicalGPT) -> int:
    return len(gpt.tensors["blocks.0.experts.0.mlp_in.weight"])


def _qwen2_moe(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **_rms(gpt, given, **_experts(gpt), num_experts=gpt.n_expert, moe_intermediate_size=_expert_width(gpt)),
        shared_expert_intermediate_size=len(gpt.tensors["blocks.0.shared.mlp_in.weight"]),
        norm_topk_prob=gpt.renormalise_experts,
        qkv_bias=bool(biased(gpt) & {*QKV}),
    )


TARGETS: dict[str, Target] = {
    "gpt2": Target(
        config=_gpt2,
        names=GPT2_NAMES,
        holds=USUAL | PLAIN | {"learned positions", "LayerNorm", "MLP without a gate"},
        always=ATTENTION | {"mlp_in", "mlp_out"} | NORMS,
        place=_in_out,
        shares_heads=False,
    ),
    "stablelm": Target(
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
    ),
    "llama": Target(
        config=lambda gpt, given: LlamaConfig(
            **_rms(gpt, given, attention_bias=_attention_bias(gpt), mlp_bias=_mlp_bias(gpt), head_dim=gpt.head_width)
        ),
        names=LLAMA_NAMES,
        holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | {"gated MLP"},
        grouped=(ATTENTION, MLP),
        limits=_whole_share,
    ),
    "opt": Target(
        config=_opt,
        names={
            "token_embedding": "model.decoder.embed_tokens",
            "position_embedding": "model.decoder.embed_positions",
            "norm_1": "model.decoder.layers.{n}.self_attn_layer_norm",
            "query": "model.decoder.layers.{n}.self_attn.q_proj",
            "key": "model.decoder.layers.{n}.self_attn.k_proj",
            "value": "model.decoder.layers.{n}.self_attn.v_proj",
            "output": "model.decoder.layers.{n}.self_attn.out_proj",
            "norm_2": "model.decoder.layers.{n}.final_layer_norm",
            "mlp_in": "model.decoder.layers.{n}.fc1",
            "mlp_out": "model.decoder.layers.{n}.fc2",
            "final_norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        },
        holds=USUAL
        | PLAIN
        | {"learned positions", "LayerNorm", "MLP without a gate", "post-norm blocks", "model without a final norm"},
        always=ATTENTION | {"mlp_in", "mlp_out"} | NORMS,
        limits=_default_eps,
        place=_opt_place,
        shares_heads=False,
    ),
    "starcoder2": Target(
        config=lambda gpt, given: Starcoder2Config(
            **_common(gpt, given),
            norm_epsilon=gpt.norm_eps,
            sliding_window=gpt.window,
            use_bias=_attention_bias(gpt) or _mlp_bias(gpt),
        ),
        names=UNGATED_NAMES | {"mlp_in": "model.layers.{n}.mlp.c_fc", "mlp_out": "model.layers.{n}.mlp.c_proj"},
        holds=USUAL | PLAIN | WINDOW | {"rotary positions", "LayerNorm", "MLP without a gate"},
        always=NORMS,
        grouped=(ATTENTION | {"mlp_in", "mlp_out"},),
    ),
    "arcee": Target(
        config=lambda gpt, given: ArceeConfig(
            **_rms(gpt, given, attention_bias=_attention_bias(gpt), mlp_bias=_mlp_bias(gpt), head_dim=gpt.head_width)
        ),
        names=UNGATED_NAMES,
        holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | {"MLP without a gate"},
        grouped=(ATTENTION, frozenset({"mlp_in", "mlp_out"})),
        limits=_whole_share,
    ),
    "mistral": Target(
        config=lambda gpt, given: MistralConfig(**_rms(gpt, given, head_dim=gpt.head_width, sliding_window=gpt.window)),
        names=LLAMA_NAMES,
        holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | WINDOW | {"gated MLP"},
    ),
    "qwen3": Target(
        config=lambda gpt, given: Qwen3Config(
            **_rms(gpt, given, attention_bias=_attention_bias(gpt), head_dim=gpt.head_width, max_window_layers=0),
            **_windowed(gpt),
        ),
        names=LLAMA_NAMES | QK_NORM_NAMES,
        holds=USUAL | ROPE_RMS | QK_RMS | OWN_HEADS | WINDOW | {"gated MLP"},
        grouped=(ATTENTION,),
    ),
    "nanochat": Target(
        config=lambda gpt, given: NanoChatConfig(
            **_rms(gpt, given, attention_bias=_attention_bias(gpt), final_logit_softcapping=gpt.logit_cap)
        ),
        names={role: name for role, name in UNGATED_NAMES.items() if role not in NORMS}
        | {"mlp_in": "model.layers.{n}.mlp.fc1", "mlp_out": "model.layers.{n}.mlp.fc2"},
        holds=ROPE_RMS
        | {"pre-norm blocks", "final norm", "norm of the embeddings", "MLP without a gate", "soft cap on logits"}
        | {"RMSNorm of each head's queries and keys"},
        grouped=(ATTENTION,),
        rope_direction=-1,
        norm_after_rope=True,
    ),
    "gpt_neox": Target(
        config=_gpt_neox,
        names={
            "token_embedding": "gpt_neox.embed_in",
            "norm_1": "gpt_neox.layers.{n}.input_layernorm",
            QKV: "gpt_neox.layers.{n}.attention.query_key_value",
            "output": "gpt_neox.layers.{n}.attention.dense",
            "norm_2": "gpt_neox.layers.{n}.post_attention_layernorm",
            "mlp_in": "gpt_neox.layers.{n}.mlp.dense_h_to_4h",
            "mlp_out": "gpt_neox.layers.{n}.mlp.dense_4h_to_h",
            "final_norm": "gpt_neox.final_layer_norm",
            "head": "lm_head",
        },
        holds=USUAL
        | PLAIN
        | {"rotary positions", "LayerNorm", "MLP without a gate", "parallel blocks", "rotation of a part of each head"},
        always=NORMS | {"mlp_in", "mlp_out"},
        grouped=(ATTENTION,),
        place=_by_head,
        shares_heads=False,
    ),
    "mpt": Target(
        config=_mpt,
        names={
            "token_embedding": "transformer.wte",
            "norm_1": "transformer.blocks.{n}.norm_1",
            QKV: "transformer.blocks.{n}.attn.Wqkv",
            "output": "transformer.blocks.{n}.attn.out_proj",
            "norm_2": "transformer.blocks.{n}.norm_2",
            "mlp_in": "transformer.blocks.{n}.ffn.up_proj",
            "mlp_out": "transformer.blocks.{n}.ffn.down_proj",
            "final_norm": "transformer.norm_f",
            "head": "lm_head",
        },
        holds=USUAL | PLAIN | {"ALiBi", "LayerNorm", "MLP without a gate"},
        limits=_mpt_limits,
        place=_mpt_place,
        shares_heads=False,
    ),
    "gemma2": Target(
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
        | WINDOW
        | {"norms before and behind each sublayer", "gated MLP", "soft cap on logits", "soft cap on attention scores"},
        grouped=(ATTENTION,),
        limits=_whole_share,
        place=_gemma2_place,
        scale=lambda width: width**0.5,
    ),
    "olmo2": Target(
        config=lambda gpt, given: Olmo2Config(**_rms(gpt, given, attention_bias=_attention_bias(gpt))),
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
    ),
    "mixtral": Target(
        config=lambda gpt, given: MixtralConfig(
            **_rms(gpt, given, **_experts(gpt), num_local_experts=gpt.n_expert, intermediate_size=_expert_width(gpt)),
            head_dim=gpt.head_width,
            sliding_window=gpt.window,
        ),
        names=EXPERT_NAMES,
        holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | WINDOW | {"experts"},
        limits=lambda gpt: (
            _expert_limits(gpt) + ([] if gpt.renormalise_experts else ["experts whose shares do not sum to one"])
        ),
    ),
    "qwen3_moe": Target(
        config=lambda gpt, given: Qwen3MoeConfig(
            **_rms(gpt, given, **_experts(gpt), num_experts=gpt.n_expert, moe_intermediate_size=_expert_width(gpt)),
            norm_topk_prob=gpt.renormalise_experts,
            attention_bias=_attention_bias(gpt),
            **_windowed(gpt),
        ),
        names=EXPERT_NAMES | QK_NORM_NAMES,
        holds=USUAL | ROPE_RMS | QK_RMS | WINDOW | {"experts"},
        grouped=(ATTENTION,),
        limits=_expert_limits,
    ),
    "qwen2_moe": Target(
        config=_qwen2_moe,
        names=EXPERT_NAMES
        | {
            "shared.mlp_gate": "model.layers.{n}.mlp.shared_expert.gate_proj",
            "shared.mlp_in": "model.layers.{n}.mlp.shared_expert.up_proj",
            "shared.mlp_out": "model.layers.{n}.mlp.shared_expert.down_proj",
            "shared_gate": "model.layers.{n}.mlp.shared_expert_gate",
        },
        holds=USUAL | PLAIN | ROPE_RMS | {"experts", "experts beside a shared one"},
        grouped=(frozenset(QKV),),
        limits=_expert_limits,
    ),
    "gpt_neo": Target(
        config=_gpt_neo,
        names={role: name for role, name in GPT2_NAMES.items() if role != QKV}
        | {
            "query": "transformer.h.{n}.attn.attention.q_proj",
            "key": "transformer.h.{n}.attn.attention.k_proj",
            "value": "transformer.h.{n}.attn.attention.v_proj",
            "output": "transformer.h.{n}.attn.attention.out_proj",
        },
        holds=USUAL | PLAIN | WINDOW | {"learned positions", "LayerNorm", "MLP without a gate"},
        always=NORMS | {"output", "mlp_in", "mlp_out"},
        shares_heads=False,
        place=_gpt_neo_place,
    ),
    "granite": Target(
        config=lambda gpt, given: GraniteConfig(
            **_rms(gpt, given, attention_bias=_attention_bias(gpt), mlp_bias=_mlp_bias(gpt)),
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
    ),
}
"""The targets in order of preference, the plainest class first."""
