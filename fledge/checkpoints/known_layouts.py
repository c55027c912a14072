"""The layouts of widely used code bases: the names of their modules, and what their authors are known to compute.

To add one, add a `Layout` to `LAYOUTS`: its table of names, the parts of names that only it has, and its facts.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.modules import split_ending

# Tables: module of the source → module of the canonical GPT. {n} is a layer, {h} a head, {e} an expert.
SCRATCH = {
    "token_table": "token_embedding",
    "position_table": "position_embedding",
    "layers.{n}.norm_before_attention": "blocks.{n}.norm_1",
    "layers.{n}.attention.to_query": "blocks.{n}.query",
    "layers.{n}.attention.to_key": "blocks.{n}.key",
    "layers.{n}.attention.to_value": "blocks.{n}.value",
    "layers.{n}.attention.to_out": "blocks.{n}.output",
    "layers.{n}.norm_before_feed_forward": "blocks.{n}.norm_2",
    "layers.{n}.feed_forward.expand": "blocks.{n}.mlp_in",
    "layers.{n}.feed_forward.shrink": "blocks.{n}.mlp_out",
    "norm_at_end": "final_norm",
    "to_vocab": "head",
}
BOOK = {
    "tok_emb": "token_embedding",
    "pos_emb": "position_embedding",
    "trf_blocks.{n}.norm1": "blocks.{n}.norm_1",
    "trf_blocks.{n}.att.W_query": "blocks.{n}.query",
    "trf_blocks.{n}.att.W_key": "blocks.{n}.key",
    "trf_blocks.{n}.att.W_value": "blocks.{n}.value",
    "trf_blocks.{n}.att.out_proj": "blocks.{n}.output",
    "trf_blocks.{n}.att.qkv": "blocks.{n}.qkv",  # the book's faster script
    "trf_blocks.{n}.att.proj": "blocks.{n}.output",
    "trf_blocks.{n}.norm2": "blocks.{n}.norm_2",
    "trf_blocks.{n}.ff.layers.0": "blocks.{n}.mlp_in",
    "trf_blocks.{n}.ff.layers.2": "blocks.{n}.mlp_out",
    "final_norm": "final_norm",
    "out_head": "head",
}
PER_HEAD = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.pos_embedding": "position_embedding",
    "blocks.{n}.layer_norm1": "blocks.{n}.norm_1",
    "blocks.{n}.mha.heads.{h}.q": "blocks.{n}.query.{h}",
    "blocks.{n}.mha.heads.{h}.k": "blocks.{n}.key.{h}",
    "blocks.{n}.mha.heads.{h}.v": "blocks.{n}.value.{h}",
    "blocks.{n}.mha.out_proj": "blocks.{n}.output",
    "blocks.{n}.layer_norm2": "blocks.{n}.norm_2",
    "blocks.{n}.feed_forward.layers.0": "blocks.{n}.mlp_in",
    "blocks.{n}.feed_forward.layers.2": "blocks.{n}.mlp_out",
    "layer_norm": "final_norm",
    "output_layer": "head",
}
GPT2 = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "h.{n}.ln_1": "blocks.{n}.norm_1",
    "h.{n}.attn.c_attn": "blocks.{n}.qkv",
    "h.{n}.attn.c_proj": "blocks.{n}.output",
    "h.{n}.ln_2": "blocks.{n}.norm_2",
    "h.{n}.mlp.c_fc": "blocks.{n}.mlp_in",
    "h.{n}.mlp.c_proj": "blocks.{n}.mlp_out",
    "ln_f": "final_norm",
    "lm_head": "head",
}
MINGPT = {
    "tok_emb": "token_embedding",
    "pos_emb": "position_embedding",
    "blocks.{n}.ln1": "blocks.{n}.norm_1",
    "blocks.{n}.attn.query": "blocks.{n}.query",
    "blocks.{n}.attn.key": "blocks.{n}.key",
    "blocks.{n}.attn.value": "blocks.{n}.value",
    "blocks.{n}.attn.proj": "blocks.{n}.output",
    "blocks.{n}.ln2": "blocks.{n}.norm_2",
    "blocks.{n}.mlp.0": "blocks.{n}.mlp_in",
    "blocks.{n}.mlp.2": "blocks.{n}.mlp_out",
    "ln_f": "final_norm",
    "head": "head",
}
LECTURE = {
    "token_embedding_table": "token_embedding",
    "position_embedding_table": "position_embedding",
    "blocks.{n}.ln1": "blocks.{n}.norm_1",
    "blocks.{n}.sa.heads.{h}.query": "blocks.{n}.query.{h}",
    "blocks.{n}.sa.heads.{h}.key": "blocks.{n}.key.{h}",
    "blocks.{n}.sa.heads.{h}.value": "blocks.{n}.value.{h}",
    "blocks.{n}.sa.proj": "blocks.{n}.output",
    "blocks.{n}.ln2": "blocks.{n}.norm_2",
    "blocks.{n}.ffwd.net.0": "blocks.{n}.mlp_in",
    "blocks.{n}.ffwd.net.2": "blocks.{n}.mlp_out",
    "ln_f": "final_norm",
    "lm_head": "head",
}
STUDENT = {
    "tok_emb": "token_embedding",
    "pos_emb": "position_embedding",
    "blocks.{n}.ln1": "blocks.{n}.norm_1",
    "blocks.{n}.attn.qkv": "blocks.{n}.qkv",
    "blocks.{n}.attn.proj": "blocks.{n}.output",
    "blocks.{n}.ln2": "blocks.{n}.norm_2",
    "blocks.{n}.ffn.0": "blocks.{n}.mlp_in",
    "blocks.{n}.ffn.2": "blocks.{n}.mlp_out",
    "ln_f": "final_norm",
    "head": "head",
}
STORY_CHAT = {
    "tok_emb": "token_embedding",
    "blocks.{n}.ln_1": "blocks.{n}.norm_1",
    "blocks.{n}.attn.wq": "blocks.{n}.query",
    "blocks.{n}.attn.wk": "blocks.{n}.key",
    "blocks.{n}.attn.wv": "blocks.{n}.value",
    "blocks.{n}.attn.wo": "blocks.{n}.output",
    "blocks.{n}.ln_2": "blocks.{n}.norm_2",
    "blocks.{n}.mlp.w1": "blocks.{n}.mlp_gate",
    "blocks.{n}.mlp.w2": "blocks.{n}.mlp_out",
    "blocks.{n}.mlp.w3": "blocks.{n}.mlp_in",
    "ln_f": "final_norm",
    "head": "head",
}
LLAMA2_C = {
    "tok_embeddings": "token_embedding",
    "layers.{n}.attention_norm": "blocks.{n}.norm_1",
    "layers.{n}.attention.wq": "blocks.{n}.query",
    "layers.{n}.attention.wk": "blocks.{n}.key",
    "layers.{n}.attention.wv": "blocks.{n}.value",
    "layers.{n}.attention.wo": "blocks.{n}.output",
    "layers.{n}.ffn_norm": "blocks.{n}.norm_2",
    "layers.{n}.feed_forward.w1": "blocks.{n}.mlp_gate",
    "layers.{n}.feed_forward.w2": "blocks.{n}.mlp_out",
    "layers.{n}.feed_forward.w3": "blocks.{n}.mlp_in",
    "norm": "final_norm",
    "output": "head",
}
LLAMA = {
    "embed_tokens": "token_embedding",
    "layers.{n}.input_layernorm": "blocks.{n}.norm_1",
    "layers.{n}.self_attn.q_proj": "blocks.{n}.query",
    "layers.{n}.self_attn.k_proj": "blocks.{n}.key",
    "layers.{n}.self_attn.v_proj": "blocks.{n}.value",
    "layers.{n}.self_attn.o_proj": "blocks.{n}.output",
    "layers.{n}.post_attention_layernorm": "blocks.{n}.norm_2",
    "layers.{n}.mlp.gate_proj": "blocks.{n}.mlp_gate",
    "layers.{n}.mlp.up_proj": "blocks.{n}.mlp_in",
    "layers.{n}.mlp.down_proj": "blocks.{n}.mlp_out",
    "norm": "final_norm",
    "lm_head": "head",
}
MINIMIND = LLAMA | {
    "layers.{n}.self_attn.q_norm": "blocks.{n}.query_norm",
    "layers.{n}.self_attn.k_norm": "blocks.{n}.key_norm",
    "layers.{n}.mlp.gate": "blocks.{n}.router",
    "layers.{n}.mlp.experts.{e}.gate_proj": "blocks.{n}.experts.{e}.mlp_gate",
    "layers.{n}.mlp.experts.{e}.up_proj": "blocks.{n}.experts.{e}.mlp_in",
    "layers.{n}.mlp.experts.{e}.down_proj": "blocks.{n}.experts.{e}.mlp_out",
}
NANOCHAT = {
    "wte": "token_embedding",
    "h.{n}.attn.c_q": "blocks.{n}.query",
    "h.{n}.attn.c_k": "blocks.{n}.key",
    "h.{n}.attn.c_v": "blocks.{n}.value",
    "h.{n}.attn.c_proj": "blocks.{n}.output",
    "h.{n}.mlp.c_fc": "blocks.{n}.mlp_in",
    "h.{n}.mlp.c_proj": "blocks.{n}.mlp_out",
    "lm_head": "head",
}
LITGPT = {
    "wte": "token_embedding",
    "h.{n}.norm_1": "blocks.{n}.norm_1",
    "h.{n}.attn.qkv": "blocks.{n}.qkv",
    "h.{n}.attn.proj": "blocks.{n}.output",
    "h.{n}.norm_2": "blocks.{n}.norm_2",
    "h.{n}.mlp.fc": "blocks.{n}.mlp_in",
    "h.{n}.mlp.fc_1": "blocks.{n}.mlp_gate",
    "h.{n}.mlp.fc_2": "blocks.{n}.mlp_in",
    "h.{n}.mlp.proj": "blocks.{n}.mlp_out",
    "ln_f": "final_norm",
    "lm_head": "head",
}
NANOCHAT_FACTS = {
    "activation": "relu2",
    "norm": "rmsnorm",
    "norm_eps": torch.finfo(torch.float32).eps,  # the default of F.rms_norm
    "rope": "half",
    "rope_direction": -1,
    "qk_norm": "head",
    "qk_norm_after_rope": True,
    "embedding_norm": True,
    "final_norm": True,
    "logit_cap": 15.0,
}
LITGPT_CHOOSES: tuple[str, ...] = ("activation", "norm", "norm_eps", "parallel", "qk_norm", "rope_theta", "rope_width")
LITGPT_CHOOSES += ("embedding_scale", "attention_scale", "attention_cap", "logit_cap", "window")
"""What a config of litgpt says."""
LLAMA_FACTS = {"activation": "silu", "norm": "rmsnorm"}


@dataclass(frozen=True)
class Layout:
    """A layout: the names of a code base's modules, and the facts that its authors compute with.

    A checkpoint has the layout if each of the `marks` is a part of one of its names, each of `beside` is an entry of
    the file next to the weights, and its matrices are stored (in, out) exactly if `transposed` says so.

    Its names are exact if every one of them is in the table `names`, after a `prefix` or without it; biases are exact
    only if the layout is `biased`. Exact names settle the `facts`, because all known authors share them. Not settled
    are those in `open`, and no fact at all where authors of different code chose the same names (`shared`), unless the
    config has the key `dated`. A config that names other `architectures` than these is another author's.

    `computed` gives facts that depend on the model's sizes and its config.

    `by_order` lists the facts about which tensor is which that the names do not tell (`fledge.checkpoints.structure`).
    """

    names: Mapping[str, str]
    marks: tuple[str, ...]
    facts: Mapping[str, object]
    prefix: str = ""
    biased: bool = True
    beside: tuple[str, ...] = ()
    transposed: bool = False
    by_order: frozenset[str] = frozenset()
    shared: bool = False
    open: tuple[str, ...] = ()
    dated: str | None = None
    architectures: tuple[str, ...] = ()
    computed: Callable[[CanonicalGPT, Mapping], dict[str, object]] | None = None
    patterns: dict[re.Pattern, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", {pattern_of(source): role for source, role in self.names.items()})

    def role(self, name: str) -> str | None:
        """The canonical name of a tensor, or None if the table does not have it."""
        path, kind = split_ending(name)
        if kind == "bias" and not self.biased:
            return None
        path = path.removeprefix(self.prefix)
        for pattern, role in self.patterns.items():
            if found := pattern.fullmatch(path):
                return f"{role.format(**found.groupdict())}.{kind}"
        return None

    def roles(self, names: Iterable[str]) -> dict[str, str] | None:
        """The canonical name of each tensor, or None if one is not in the table, or two have one place in it."""
        found = {}
        for name in names:
            if (role := self.role(name)) is None:
                return None
            found[name] = role
        return found if len({*found.values()}) == len(found) else None

    def fits(self, names: Iterable[str], beside: Iterable[str], transposed: bool) -> bool:
        """Whether a checkpoint with these names, entries beside the weights, and orientation has this layout."""
        marked = all(any(mark in name for name in names) for mark in self.marks)
        return marked and {*self.beside} <= {*beside} and self.transposed == transposed


def nanochat_of_2026(gpt: CanonicalGPT, config: Mapping[str, object]) -> dict[str, object]:
    """Since March 2026: queries and keys, normalised, are multiplied by 1.2, and most blocks see a part of the context.

    It is a quarter, rounded up to 128, and each token sees so many before it. The last block sees all.
    """
    quarter = -(-gpt.context_length // 4 // 128) * 128
    pattern = (str(config.get("window_pattern") or "L").upper() * gpt.n_layer)[: gpt.n_layer - 1] + "L"
    windowed = "S" in pattern and quarter + 1 < gpt.context_length
    return {
        "attention_scale": 1.2**2 * gpt.usual_scale,
        "window": quarter + 1 if windowed else None,
        "window_pattern": pattern if windowed else None,
        "backout_layer": gpt.n_layer // 2,
    }


def pattern_of(source: str) -> re.Pattern:
    """A pattern for the modules that `layers.{n}.attn.heads.{h}` stands for, with a group for each letter."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(source)))


LAYOUTS = {
    "scratch": Layout(SCRATCH, ("token_table", "feed_forward.expand"), {"activation": "gelu_tanh"}),
    "book": Layout(BOOK, ("trf_blocks.0.att.",), {"activation": "gelu_tanh"}),
    "per_head": Layout(
        PER_HEAD, ("mha.heads.0.q.", "feed_forward.layers.0"), {"activation": "gelu"}, open=("attention_scale",)
    ),
    "gpt2": Layout(
        GPT2, ("wte.", "h.0.attn.c_attn"), {"activation": "gelu_tanh"}, prefix="transformer.", transposed=True
    ),
    "build_nanogpt": Layout(
        GPT2,
        ("wte.", "h.0.attn.c_attn"),
        {"activation": "gelu_tanh"},
        prefix="transformer.",
        beside=("step", "val_loss"),
    ),
    "nanogpt": Layout(
        GPT2,
        ("transformer.wte.", "h.0.attn.c_attn", "lm_head"),
        {"activation": "gelu"},
        prefix="transformer.",
        open=("activation",),
        dated="bias",  # this key came to nanoGPT's model_args with its exact GELU, in 2023
    ),
    "mingpt": Layout(MINGPT, ("tok_emb", "attn.key", "mlp.0", "ln_f"), {"activation": "gelu"}),
    "lecture": Layout(
        LECTURE, ("token_embedding_table", "position_embedding_table"), {"activation": "relu"}, shared=True
    ),
    "student": Layout(STUDENT, ("tok_emb", "attn.qkv", "ffn.0"), {"activation": "gelu"}, shared=True),
    "story_chat": Layout(
        STORY_CHAT,
        ("attn.wq", "mlp.w1", "ln_1"),
        {"activation": "silu", "rope": "interleaved"},
        by_order=frozenset({"gate_order"}),
    ),
    "llama2.c": Layout(
        LLAMA2_C,
        ("tok_embeddings", "attention.wq", "feed_forward.w1"),
        LLAMA_FACTS | {"rope": "interleaved"},
        by_order=frozenset({"gate_order"}),
        open=("rope_theta", "norm_eps"),  # Meta's own models have these names and other numbers
        dated="max_seq_len",
    ),
    "minimind": Layout(  # Qwen3 has these names too
        MINIMIND,
        ("self_attn.q_norm", "input_layernorm", "post_attention_layernorm"),
        LLAMA_FACTS | {"rope": "half", "rope_theta": 1e6, "qk_norm_type": "rmsnorm"},
        prefix="model.",
        biased=False,
        architectures=("MiniMindForCausalLM", "MiniMindLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        # Others write models of their own under these names.
        open=(
            *("rope", "rope_theta", "rope_direction", "rope_width", "norm", "norm_eps", "norm_placement", "parallel"),
            *("qk_norm_type", "qk_norm_after_rope", "activation", "attention_scale", "embedding_scale", "logit_cap"),
            *("causal", "positions", "renormalise_experts"),
        ),
        dated="architectures",
    ),
    "llama": Layout(  # Gemma, Granite and MiniCPM have these names too, and scale embeddings, residuals or logits
        LLAMA,
        ("self_attn.q_proj", "mlp.gate_proj"),
        LLAMA_FACTS | {"rope": "half"},
        prefix="model.",
        shared=True,
        dated="architectures",
        architectures=("LlamaForCausalLM",),
    ),
    "nanochat_2026": Layout(
        NANOCHAT,
        ("transformer.wte.", "h.0.attn.c_q.", "smear_gate", "backout_lambda", "value_embeds"),
        NANOCHAT_FACTS | {"rope_theta": 100_000.0, "value_gate_factor": 3.0},
        prefix="transformer.",
        biased=False,
        open=(*NANOCHAT_FACTS, "attention_scale", "rope_theta", "window", "window_pattern", "value_gate_factor"),
        dated="window_pattern",
        computed=nanochat_of_2026,
    ),
    "nanochat": Layout(  # of October 2025 to January 2026; modded-nanogpt of 2024 has these names too
        NANOCHAT,
        ("transformer.wte.", "h.0.attn.c_q.", "mlp.c_fc"),
        NANOCHAT_FACTS,
        prefix="transformer.",
        biased=False,
        shared=True,
        dated="sequence_len",
    ),
    "litgpt_until_2025": Layout(
        LITGPT | {"h.{n}.attn.attn": "blocks.{n}.qkv"},
        ("transformer.wte.", "h.0.norm_1", "h.0.attn.attn."),
        {"activation": "silu", "rope": "half", "qkv_by_head": True},
        prefix="transformer.",
        by_order=frozenset({"gate_order"}),
        open=LITGPT_CHOOSES,
    ),
    "litgpt": Layout(
        LITGPT,
        ("transformer.wte.", "h.0.norm_1", "attn.proj"),
        {"activation": "silu", "rope": "half"},
        prefix="transformer.",
        by_order=frozenset({"gate_order"}),
        open=LITGPT_CHOOSES,
    ),
    # The layers of PyTorch; its users name the ends of the model, so that there is no table.
    "torch": Layout(
        {}, ("self_attn.in_proj_weight", "linear1"), {"activation": "relu", "norm_placement": "post"}, shared=True
    ),
}
"""In the order in which they are tried."""

UNUSUAL = re.compile(
    r"rope_(scaling|adjustments)|sliding_window(_size)?|window_pattern|(embedding|residual|attention)_multiplier|"
    r"logits?_scal(e|ing)|(attn|final)_logit_softcapping|scale_(emb|depth)|dim_model_base|query_pre_attn_scalar|"
    r"no_rope_layers|partial_rotary_factor|use_(rope|rotary|alibi|rmsnorm|swiglu|qk_norm)|mup_.*"
)
"""Keys of a config that show that an author computes something else than the layout."""
