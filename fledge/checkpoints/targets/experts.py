"""Mixtures of experts, which otherwise are as LLaMA's classes."""

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.targets.llama import LLAMA_NAMES, QK_NORM_NAMES, rms, windowed
from fledge.checkpoints.targets.needs import biased
from fledge.checkpoints.targets.target import (
    ATTENTION,
    MLP,
    OWN_HEADS,
    PLAIN,
    QK_RMS,
    QKV,
    ROPE_RMS,
    USUAL,
    WINDOW,
    Config,
    Names,
    Target,
    attention_bias,
)

EXPERT_NAMES: Names = {role: name for role, name in LLAMA_NAMES.items() if role not in MLP} | {
    "router": "model.layers.{n}.mlp.gate",
    ("experts.mlp_gate", "experts.mlp_in"): "model.layers.{n}.mlp.experts.gate_up_proj",
    "experts.mlp_out": "model.layers.{n}.mlp.experts.down_proj",
}


def _expert_limits(gpt: CanonicalGPT) -> list[str]:
    """transformers multiplies by all experts at once, in blocks of 16 bytes."""
    widths = {gpt.width, _expert_width(gpt)}
    return [f"experts of a width that is no multiple of 8 ({min(widths)})"] if any(w % 8 for w in widths) else []


def _experts(gpt: CanonicalGPT) -> Config:
    return {"num_experts_per_tok": gpt.experts_per_token}


def _expert_width(gpt: CanonicalGPT) -> int:
    return len(gpt.tensors["blocks.0.experts.0.mlp_in.weight"])


MIXTRAL = Target(
    config=lambda gpt, given: MixtralConfig(
        **rms(gpt, given, **_experts(gpt), num_local_experts=gpt.n_expert, intermediate_size=_expert_width(gpt)),
        head_dim=gpt.head_width,
        sliding_window=gpt.window,
    ),
    names=EXPERT_NAMES,
    holds=USUAL | PLAIN | ROPE_RMS | OWN_HEADS | WINDOW | {"experts"},
    limits=lambda gpt: (
        _expert_limits(gpt) + ([] if gpt.renormalise_experts else ["experts whose shares do not sum to one"])
    ),
)


QWEN3_MOE = Target(
    config=lambda gpt, given: Qwen3MoeConfig(
        **rms(gpt, given, **_experts(gpt), num_experts=gpt.n_expert, moe_intermediate_size=_expert_width(gpt)),
        norm_topk_prob=gpt.renormalise_experts,
        attention_bias=attention_bias(gpt),
        **windowed(gpt),
    ),
    names=EXPERT_NAMES | QK_NORM_NAMES,
    holds=USUAL | ROPE_RMS | QK_RMS | WINDOW | {"experts"},
    grouped=(ATTENTION,),
    limits=_expert_limits,
)


def _qwen2_moe(gpt: CanonicalGPT, given: Config) -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **rms(gpt, given, **_experts(gpt), num_experts=gpt.n_expert, moe_intermediate_size=_expert_width(gpt)),
        shared_expert_intermediate_size=len(gpt.tensors["blocks.0.shared.mlp_in.weight"]),
        norm_topk_prob=gpt.renormalise_experts,
        qkv_bias=bool(biased(gpt) & {*QKV}),
    )


QWEN2_MOE = Target(
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
)
