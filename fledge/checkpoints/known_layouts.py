"""The layouts of code bases that many use: how their tensors are named, and what is known of what they compute.

To add one, add a `Layout`: names that only it has, and its defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """What tells a layout, and what its author computes.

    `names` are parts of tensor names, `beside` entries of the file next to the weights, and `transposed` says that
    matrices are stored (in, out).

    `facts` are assumptions until every tensor's name matches `exact`: then those that every known author of the layout
    shares are settled. Those are all facts but `open`; and `open` ones too, if the config has the key `dated`.
    """

    names: tuple[str, ...]
    facts: Mapping[str, object]
    beside: tuple[str, ...] = ()
    transposed: bool = False
    exact: str | None = None
    open: tuple[str, ...] = ()
    dated: str | None = None


LLAMA = {"activation": "silu", "norm": "rmsnorm"}
NANO = r"(transformer\.)?(w[tp]e|h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))|ln_f|lm_head)\..*"
LAYOUTS = {
    "scratch": Layout(
        ("token_table", "feed_forward.expand"),
        {"activation": "gelu_tanh"},
        exact=r"(token_table|position_table|layers\.\d+\.(norm_before_\w+|attention\.to_\w+|feed_forward\.\w+)"
        r"|norm_at_end|to_vocab)\..*",
    ),
    "book": Layout(
        ("trf_blocks.0.att.",),
        {"activation": "gelu_tanh"},
        exact=r"(tok_emb|pos_emb|trf_blocks\.\d+\.(att\.(W_\w+|qkv|proj|out_proj)|ff\.layers\.[02]|norm[12])|final_norm"
        r"|out_head)\..*",
    ),
    "per_head": Layout(
        ("mha.heads.0.q.", "feed_forward.layers.0"),
        {"activation": "gelu"},
        exact=r"(embeddings\.\w+|blocks\.\d+\.(layer_norm[12]|mha\.heads\.\d+\.[qkv]|mha\.out_proj"
        r"|feed_forward\.layers\.[02])|layer_norm|output_layer)\..*",
        open=("attention_scale",),
    ),
    "gpt2": Layout(("wte.", "h.0.attn.c_attn"), {"activation": "gelu_tanh"}, transposed=True, exact=NANO),
    "build_nanogpt": Layout(
        ("wte.", "h.0.attn.c_attn"), {"activation": "gelu_tanh"}, beside=("step", "val_loss"), exact=NANO
    ),
    "nanogpt": Layout(
        ("transformer.wte.", "h.0.attn.c_attn", "lm_head"),
        {"activation": "gelu"},
        exact=NANO,
        open=("activation",),
        dated="bias",  # it came to nanoGPT's model_args with its exact GELU, in 2023
    ),
    "mingpt": Layout(
        ("tok_emb", "attn.key", "mlp.0", "ln_f"),
        {"activation": "gelu"},
        exact=r"pos_emb|(tok_emb|blocks\.\d+\.(ln[12]|attn\.(key|query|value|proj)|mlp\.[02])|ln_f|head)\..*",
    ),
    "lecture": Layout(("token_embedding_table", "position_embedding_table"), {"activation": "relu"}),
    "student": Layout(("tok_emb", "attn.qkv", "ffn.0"), {"activation": "gelu"}),
    "story_chat": Layout(
        ("attn.wq", "mlp.w1", "ln_1"),
        {"activation": "silu", "rope": "interleaved"},
        exact=r"(tok_emb|blocks\.\d+\.(ln_[12]|attn\.w[qkvo]|mlp\.w[123])|ln_f|head)\..*",
    ),
    "llama2.c": Layout(
        ("tok_embeddings", "attention.wq", "feed_forward.w1"),
        LLAMA | {"rope": "interleaved"},
        exact=r"(tok_embeddings|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|\w+_norm)|norm|output)\..*",
        open=("rope_theta", "norm_eps"),  # Meta's own models have these names and other numbers
        dated="max_seq_len",
    ),
    "minimind": Layout(  # and Qwen3's own names
        ("self_attn.q_norm", "input_layernorm", "post_attention_layernorm"),
        LLAMA | {"rope": "half", "rope_theta": 1e6, "qk_norm_type": "rmsnorm"},
        exact=r"(model\.)?(embed_tokens|layers\.\d+\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(experts\.\d+\.)?\w+_proj|mlp\.gate"
        r"|\w+_layernorm)|norm|lm_head)\.weight",
        # Others write models of their own under these names.
        open=(
            *("rope", "rope_theta", "rope_direction", "rope_width", "norm", "norm_eps", "norm_placement", "parallel"),
            *("qk_norm_type", "qk_norm_after_rope", "activation", "attention_scale", "embedding_scale", "logit_cap"),
            *("causal", "positions", "renormalise_experts"),
        ),
        dated="architectures",
    ),
    "llama": Layout(
        ("self_attn.q_proj", "mlp.gate_proj"),
        LLAMA | {"rope": "half"},
        exact=r"(embed_tokens|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj|\w+_layernorm)|norm|lm_head)\..*",
        open=("rope", "rope_theta", "norm_eps", "activation"),
        dated="architectures",
    ),
    "nanochat": Layout(  # of October 2025; later ones have lambdas and value embeddings
        ("transformer.wte.", "h.0.attn.c_q.", "mlp.c_fc"),
        {
            "activation": "relu2",
            "norm": "rmsnorm",
            "norm_eps": torch.finfo(torch.float32).eps,  # of F.rms_norm
            "rope": "half",
            "rope_direction": -1,
            "qk_norm": "head",
            "qk_norm_after_rope": True,
            "embedding_norm": True,
            "final_norm": True,
            "logit_cap": 15.0,
        },
        exact=r"(transformer\.)?(wte|h\.\d+\.(attn\.c_(q|k|v|proj)|mlp\.c_(fc|proj))|lm_head)\.weight",
        open=("norm_eps", "rope_theta", "logit_cap"),
        dated="sequence_len",
    ),
    "litgpt": Layout(
        ("transformer.wte.", "h.0.norm_1", "attn.proj"),
        {"activation": "silu", "rope": "half"},
        exact=r"(transformer\.)?(wte|h\.\d+\.(norm_[12]|attn\.(qkv|proj)|mlp\.(fc|fc_[12]|proj))|ln_f|lm_head)\..*",
        # Its config chooses these.
        open=(
            *("activation", "norm", "norm_eps", "parallel", "qk_norm"),
            *("rope_theta", "rope_width", "embedding_scale", "logit_cap"),
        ),
    ),
    "torch": Layout(("self_attn.in_proj_weight", "linear1"), {"activation": "relu", "norm_placement": "post"}),
}
"""In the order in which they are tried."""

# Entries of a config by which an author computes what his layout does not.
UNUSUAL = ("rope_scaling", "rope_adjustments", "sliding_window", "sliding_window_size", "window_pattern")
