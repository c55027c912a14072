"""Small models of well-known code bases, with random weights: their names for tensors, and their arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB, CONTEXT, WIDTH, HEADS, KEY_HEADS, LAYERS, HIDDEN, EXPERTS = 61, 24, 32, 4, 2, 2, 40, 4
HEAD = WIDTH // HEADS


@dataclass(frozen=True)
class Family:
    """`names` are those of the parts, {n} the layer and {e} the expert. `config` is what lies beside the weights."""

    layout: str
    target: str
    names: Mapping[str, str]
    config: Mapping[str, object]
    eps: float = 1e-5
    theta: float = 1e4
    rope: str = "half"
    tied: bool = True
    capped: bool = False
    chosen: int = 0
    asked: Mapping[str, object] = field(default_factory=dict)
    """What the family's users choose in their configs, and is asked for."""

    def weights(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        rows = {"query": WIDTH, "output": WIDTH, "key": KEY_HEADS * HEAD, "value": KEY_HEADS * HEAD}
        rows |= {"qkv": (HEADS + 2 * KEY_HEADS) * HEAD, "gate": HIDDEN, "in": HIDDEN, "out": WIDTH, "router": EXPERTS}
        found = {}
        for part, name in self.names.items():
            for place in dict.fromkeys(
                name.format(n=n, e=e) for n in range(LAYERS) for e in range(EXPERTS if "{e}" in name else 1)
            ):
                if "norm" in part:
                    width = HEAD if part in ("query_norm", "key_norm") else WIDTH
                    found[place] = 1 + 0.3 * torch.randn(width, generator=generator)
                else:
                    inputs = HIDDEN if part == "out" else WIDTH
                    found[place] = torch.randn(rows.get(part, VOCAB), inputs, generator=generator) * inputs**-0.5
        if self.tied and "head" in self.names:
            found[self.names["head"]] = found[self.names["tokens"]]
        return found

    def logits(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """What the family's code computes, (B, T, V) in float64."""

        def get(part: str, **place: int) -> Tensor | None:
            return weights[self.names[part].format(**place)].double() if part in self.names else None

        def norm(part: str, x: Tensor, **place: int) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], get(part, **place), self.eps)

        x = get("tokens")[ids]
        x = norm("", x) if self.capped else x  # nanochat alone does both
        for n in range(LAYERS):
            h = norm("norm_1", x, n=n)
            if "qkv" in self.names:
                q, k, v = (h @ get("qkv", n=n).T).split([WIDTH, KEY_HEADS * HEAD, KEY_HEADS * HEAD], dim=-1)
            else:
                q, k, v = (h @ get(part, n=n).T for part in ("query", "key", "value"))
            q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in (q, k, v))
            if "query_norm" in self.names:
                q, k = norm("query_norm", q, n=n), norm("key_norm", k, n=n)
            q, k = self.turned(q), self.turned(k)
            if self.capped:
                q, k = norm("", q), norm("", k)
            k, v = (part.repeat_interleave(HEADS // KEY_HEADS, dim=2) for part in (k, v))
            mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2) @ get("output", n=n).T
            x = x + self.mlp(get, norm("norm_2", x, n=n), n)
        logits = norm("final_norm", x) @ get("head" if "head" in self.names else "tokens").T
        return 15 * torch.tanh(logits / 15) if self.capped else logits

    def turned(self, x: Tensor) -> Tensor:
        """x (B, T, heads, head width) as complex numbers, turned by their positions."""
        angles = torch.outer(torch.arange(x.shape[1]), 1 / self.theta ** (torch.arange(0, HEAD, 2).float() / HEAD))
        turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
        turn = turn.conj() if self.capped else turn
        pairs = x.unflatten(-1, (-1, 2)) if self.rope == "interleaved" else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return (pairs if self.rope == "interleaved" else pairs.transpose(-1, -2)).flatten(-2)

    def mlp(self, get, h: Tensor, n: int) -> Tensor:
        def one(e: int = 0) -> Tensor:
            if "gate" not in self.names:
                return F.relu(h @ get("in", n=n).T).square() @ get("out", n=n).T
            return (F.silu(h @ get("gate", n=n, e=e).T) * (h @ get("in", n=n, e=e).T)) @ get("out", n=n, e=e).T

        if not self.chosen:
            return one()
        shares, chosen = (h @ get("router", n=n).T).softmax(-1).topk(self.chosen, dim=-1)
        every = torch.zeros(*h.shape[:-1], EXPERTS, dtype=h.dtype).scatter(-1, chosen, shares)
        every = every / every.sum(-1, keepdim=True)
        return sum(every[..., e, None] * one(e) for e in range(EXPERTS))


NANOCHAT = {
    "tokens": "transformer.wte.weight",
    "query": "transformer.h.{n}.attn.c_q.weight",
    "key": "transformer.h.{n}.attn.c_k.weight",
    "value": "transformer.h.{n}.attn.c_v.weight",
    "output": "transformer.h.{n}.attn.c_proj.weight",
    "in": "transformer.h.{n}.mlp.c_fc.weight",
    "out": "transformer.h.{n}.mlp.c_proj.weight",
    "head": "lm_head.weight",
}
MINIMIND = {
    "tokens": "model.embed_tokens.weight",
    "query": "model.layers.{n}.self_attn.q_proj.weight",
    "key": "model.layers.{n}.self_attn.k_proj.weight",
    "value": "model.layers.{n}.self_attn.v_proj.weight",
    "output": "model.layers.{n}.self_attn.o_proj.weight",
    "query_norm": "model.layers.{n}.self_attn.q_norm.weight",
    "key_norm": "model.layers.{n}.self_attn.k_norm.weight",
    "norm_1": "model.layers.{n}.input_layernorm.weight",
    "norm_2": "model.layers.{n}.post_attention_layernorm.weight",
    "gate": "model.layers.{n}.mlp.gate_proj.weight",
    "out": "model.layers.{n}.mlp.down_proj.weight",
    "in": "model.layers.{n}.mlp.up_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
EXPERT = {"router": "model.layers.{n}.mlp.gate.weight"}
EXPERT |= {
    part: f"model.layers.{{n}}.mlp.experts.{{e}}.{MINIMIND[part].rpartition('mlp.')[2]}"
    for part in ("gate", "out", "in")
}
LINGUA = {
    "tokens": "tok_embeddings.weight",
    "query": "layers.{n}.attention.wq.weight",
    "key": "layers.{n}.attention.wk.weight",
    "value": "layers.{n}.attention.wv.weight",
    "output": "layers.{n}.attention.wo.weight",
    "gate": "layers.{n}.feed_forward.w1.weight",
    "in": "layers.{n}.feed_forward.w3.weight",
    "out": "layers.{n}.feed_forward.w2.weight",
    "norm_1": "layers.{n}.attention_norm.weight",
    "norm_2": "layers.{n}.ffn_norm.weight",
    "final_norm": "norm.weight",
    "head": "output.weight",
}
LITGPT = {
    "head": "lm_head.weight",
    "tokens": "transformer.wte.weight",
    "norm_1": "transformer.h.{n}.norm_1.weight",
    "qkv": "transformer.h.{n}.attn.qkv.weight",
    "output": "transformer.h.{n}.attn.proj.weight",
    "norm_2": "transformer.h.{n}.norm_2.weight",
    "gate": "transformer.h.{n}.mlp.fc_1.weight",
    "in": "transformer.h.{n}.mlp.fc_2.weight",
    "out": "transformer.h.{n}.mlp.proj.weight",
    "final_norm": "transformer.ln_f.weight",
}
HF = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "hidden_act": "silu"}
HF |= {
    "architectures": ["MiniMindForCausalLM"],
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
FAMILIES = {
    "nanochat": Family(
        "nanochat",
        "nanochat",
        NANOCHAT,
        {"sequence_len": CONTEXT, "vocab_size": VOCAB, "n_layer": LAYERS, "n_head": HEADS, "n_kv_head": KEY_HEADS},
        eps=torch.finfo(torch.float32).eps,
        tied=False,
        capped=True,
    ),
    "minimind": Family("minimind", "qwen3", MINIMIND, HF, eps=1e-6, theta=1e6),
    "minimind of experts": Family(
        "minimind",
        "qwen3_moe",
        MINIMIND | EXPERT,
        HF | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True},
        eps=1e-6,
        theta=1e6,
        chosen=2,
    ),
    "lingua": Family(
        "llama2.c",
        "llama",
        LINGUA,
        {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "norm_eps": 1e-5}
        | {"rope_theta": 1e4, "max_seqlen": CONTEXT},
        rope="interleaved",
        tied=False,
    ),
    "litgpt": Family(
        "litgpt",
        "llama",
        LITGPT,
        {"n_embd": WIDTH, "n_head": HEADS, "n_query_groups": KEY_HEADS, "block_size": CONTEXT, "norm_eps": 1e-5}
        | {"rope_base": 10000, "rotary_percentage": 1.0, "parallel_residual": False, "norm_class_name": "RMSNorm"},
        tied=False,
        asked={"activation": "silu", "norm": "rmsnorm", "parallel": False, "qk_norm": None, "rope_width": None}
        | {"embedding_scale": 1.0, "logit_cap": None, "attention_cap": None, "window": None}
        | {"attention_scale": HEAD**-0.5},
    ),
}
