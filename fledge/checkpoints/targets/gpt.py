"""GPT-2 and the classes of its time, whose modules and config keys have names of their own."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPTNeoConfig, GPTNeoXConfig, MptConfig, OPTConfig, PreTrainedConfig

from fledge.checkpoints.canonical import CanonicalGPT, alibi_slopes
from fledge.checkpoints.targets.folds import rotary_factor
from fledge.checkpoints.targets.llama import common
from fledge.checkpoints.targets.target import (
    ACTIVATION_NAMES,
    ATTENTION,
    NORMS,
    PLAIN,
    QKV,
    USUAL,
    WINDOWS,
    Config,
    Names,
    Target,
    attention_bias,
    mlp_width,
)

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


GPT2 = Target(
    config=_gpt2,
    names=GPT2_NAMES,
    holds=USUAL | PLAIN | {"learned positions", "LayerNorm", "MLP without a gate"},
    always=ATTENTION | {"mlp_in", "mlp_out"} | NORMS,
    place=_in_out,
    shares_heads=False,
)


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


OPT = Target(
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
)


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


MPT = Target(
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
)


def _gpt_neox(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    keys = common(gpt, given)
    del keys["num_key_value_heads"]
    rope = {"rope_type": "default", "rope_theta": gpt.rope_theta, "partial_rotary_factor": rotary_factor(gpt)}
    return GPTNeoXConfig(
        **keys | {"rope_parameters": rope},
        layer_norm_eps=gpt.norm_eps,
        attention_bias=attention_bias(gpt),
        use_parallel_residual=gpt.parallel,
    )


def _by_head(gpt: CanonicalGPT, name: str, tensor: Tensor) -> Tensor:
    """GPT-NeoX stacks query, key and value head by head."""
    if "query_key_value" not in name:
        return tensor
    return tensor.unflatten(0, (3, gpt.n_head, -1)).transpose(0, 1).flatten(0, 2)


GPT_NEOX = Target(
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
)


def _gpt_neo(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return GPTNeoConfig(
        hidden_size=gpt.width,
        num_layers=gpt.n_layer,
        num_heads=gpt.n_head,
        intermediate_size=mlp_width(gpt),
        max_position_embeddings=gpt.context_length,
        window_size=gpt.window or gpt.context_length,
        attention_types=[[["local" if gpt.window_of(n) else "global" for n in range(gpt.n_layer)], 1]],
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


GPT_NEO = Target(
    config=_gpt_neo,
    names={role: name for role, name in GPT2_NAMES.items() if role != QKV}
    | {
        "query": "transformer.h.{n}.attn.attention.q_proj",
        "key": "transformer.h.{n}.attn.attention.k_proj",
        "value": "transformer.h.{n}.attn.attention.v_proj",
        "output": "transformer.h.{n}.attn.attention.out_proj",
    },
    holds=USUAL | PLAIN | WINDOWS | {"learned positions", "LayerNorm", "MLP without a gate"},
    always=NORMS | {"output", "mlp_in", "mlp_out"},
    shares_heads=False,
    place=_gpt_neo_place,
)
