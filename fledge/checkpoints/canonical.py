"""The canonical GPT: one form for every hand-written layout, and the forward pass that says what it means.

Every field of `CanonicalGPT` except `tensors` may be a fact of the same name; `dataclasses.replace` sets it. In short:

    heads       n_head n_kv_head attention_scale attention_cap window window_pattern causal
                qk_norm (None head width) qk_norm_type (layernorm rmsnorm) qk_norm_after_rope value_gate_factor
    norms       norm (layernorm rmsnorm) norm_eps norm_offset norm_placement (pre post sublayer both replace none)
                norm_unbiased norm_eps_outside final_norm_eps qk_norm_eps parallel final_norm embedding_norm
    positions   a table among the tensors; alibi
                rope (None interleaved half) rope_theta rope_direction rope_width rope_span (head width)
    MLP         activation (gelu gelu_tanh relu relu2 silu) experts_per_token renormalise_experts
    stream      residual_scale residual_scaled (both attention mlp stream) backout_layer
    ends        tied embedding_scale logit_scale logit_cap context_length position_offset

Parts that have tensors need no field: a gate (`mlp_gate`), a single matrix (no `mlp_out`), experts (`router`), one norm
that is used twice in a block (no `norm_2`), a table of positions, biases.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
NORMS = ("layernorm", "rmsnorm")
PLACEMENTS = ("pre", "post", "sublayer", "both", "replace", "none")
"""Where a block normalises around a part f: x + f(norm(x)) (GPT-2), norm(x + f(x)) (Vaswani et al. 2017),
x + norm(f(x)) (OLMo 2), x + norm'(f(norm(x))) (Gemma 2), y + f(y) where y is norm(x) (a slip of beginners), or nowhere.
"""
ROTATIONS = ("interleaved", "half")
"""The pairs of coordinates that RoPE rotates: neighbours (Su et al. 2021), or i and i + half a head (GPT-NeoX)."""
SPANS = ("head", "width")
"""What RoPE turns: each head by itself, or all queries and all keys before they are split into heads."""
SCALED = ("both", "attention", "mlp", "stream")
"""What `residual_scale` multiplies in every block: what attention and MLP add (MiniCPM), one of them, or the stream to
which they add (DeepNorm)."""
QK_NORMS = (None, "head", "width")
"""Over which coordinates queries and keys are normalised: not at all, each head's, or all heads' together."""

HEAD_ROWS = 8192


@dataclass
class CanonicalGPT:
    """A decoder that somebody wrote by hand.

    V vocabulary, T context, D width, F MLP width, E experts, w width of a head (usually D / n_head), Q = w · n_head,
    K = w · n_kv_head.

    `tensors`, every projection in (out, in) orientation, in the checkpoint's own precision:
        token_embedding.weight (V, D), position_embedding.weight (T, D) if positions have a table, head.weight (V, D),
        alibi.slopes (n_head,) if they are not the paper's, the norms embedding_norm and final_norm (D,),
        and for each block N, blocks.N. followed by
        query (Q, D), key, value (K, D), output (D, Q) (without it the heads go straight into the residual),
        mlp_in (F, D), mlp_out (D, F), mlp_gate (F, D) of a gated MLP; an MLP without mlp_out is activation(mlp_in(x));
        router (E, D), experts.0. to experts.E-1. and shared., each followed by the three of an MLP, shared_gate (1, D);
        the norms norm_1, norm_2, norm_1_after, norm_2_after (D,), query_norm and key_norm ((w,), or (Q,) and (K,)).
    How the residual stream is mixed, as nanochat of 2026 does; each may be absent, the value embeddings in some blocks:
        blocks.N.value_embedding (V, K), a row of which is added to the token's value; before that it is multiplied by
            value_gate_factor · sigmoid(value_gate(the first G of what attention reads)), one number for each key head,
            if there is a blocks.N.value_gate (n_kv_head, G); and value and row by blocks.N.value_lambdas (2,) if there;
        blocks.N.residual_lambdas (2,) r and s: the block reads r · x + s · (what the first block was given);
        smear_gate (1, G) and smear_lambda (1,): a token's embedding e becomes e + lambda · sigmoid(gate(its first G)) ·
            (the embedding of the token before it);
        backout_lambda (1,): times the stream after block `backout_layer` is taken off before the final norm.
    Any bias may be absent. A norm that is there without a weight has the weight one; a block without `norm_2` uses
    `norm_1` twice.

    Fields:
        residual_scale: s in x + s · f(x), or where the stream is scaled in s · x + f(x) (`residual_scaled`).
        logit_scale: multiplies logits, before they are capped.
        position_offset: the row of the table of positions that the first token reads: 2 in fairseq.
        attention_cap, logit_cap: c · tanh(x / c) of scores before the mask, and of logits; None for no cap.
        window: how many positions each position sees, including itself; None for all before it.
        window_pattern: a letter for each block, S where `window` holds and L where it does not; None for S everywhere.
        norm_unbiased: LayerNorm divides by the deviation with D − 1 in its denominator, as `x.std()` gives it.
        norm_eps_outside: the epsilon is added to the root, and not under it.
        final_norm_eps, qk_norm_eps: epsilons of those norms, where they are not `norm_eps`.
        norm_offset: added to every norm's weight: 1 in Gemma.
        parallel: x + attention(norm_1(x)) + mlp(norm_2(x)), instead of one after the other.
        rope_direction: 1, or -1 if the rotation goes the other way (nanochat).
        rope_width: how many of a head's first coordinates are rotated; None for all.
        rope_span: "width" if frequencies run over all heads together, from the first one's first coordinate.
        alibi: the score of a key at distance d is lowered by d times the head's slope (Press et al. 2021).
        experts_per_token: the tokens' share of the router's softmax goes to this many experts.
        renormalise_experts: whether the chosen experts' shares are made to sum to one (Mixtral).
        embedding_norm: normalises tokens and positions before the first block.
    """

    tensors: Mapping[str, Tensor]
    n_layer: int
    n_head: int
    n_kv_head: int
    context_length: int
    activation: str
    attention_scale: float
    norm_eps: float
    tied: bool
    norm: str = "layernorm"
    norm_offset: float = 0.0
    norm_unbiased: bool = False
    norm_eps_outside: bool = False
    final_norm_eps: float | None = None
    qk_norm_eps: float | None = None
    norm_placement: str = "pre"
    parallel: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    rope: str | None = None
    rope_theta: float = 10_000.0
    rope_direction: int = 1
    rope_width: int | None = None
    rope_span: str = "head"
    alibi: bool = False
    qk_norm: str | None = None
    qk_norm_type: str = "rmsnorm"
    qk_norm_after_rope: bool = False
    attention_cap: float | None = None
    window: int | None = None
    window_pattern: str | None = None
    causal: bool = True
    experts_per_token: int = 0
    renormalise_experts: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    residual_scaled: str = "both"
    position_offset: int = 0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    value_gate_factor: float = 1.0
    backout_layer: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.tensors["token_embedding.weight"].shape[0]

    @property
    def width(self) -> int:
        return self.tensors["token_embedding.weight"].shape[1]

    @property
    def head_width(self) -> int:
        return self.tensors["blocks.0.query.weight"].shape[0] // self.n_head

    @property
    def usual_scale(self) -> float:
        return self.head_width**-0.5

    @property
    def turned_width(self) -> int:
        return self.rope_width or self.head_width

    def window_of(self, layer: int) -> int | None:
        """How many positions each position sees in a block; None for all before it."""
        return None if self.window_pattern and self.window_pattern[layer] == "L" else self.window

    @property
    def gated(self) -> bool:
        return any(name.startswith("blocks.0.") and name.endswith("mlp_gate.weight") for name in self.tensors)

    @property
    def n_expert(self) -> int:
        return max((len(self.tensors[name]) for name in self.tensors if name.endswith(".router.weight")), default=0)


def canonical_logits(gpt: CanonicalGPT, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The model as its author meant it, in plain PyTorch: ids (B, T) → logits (B, T, V) in `dtype`.

    Written out from the definitions (Vaswani et al. 2017, eq. 1; Radford et al. 2019, section 2.3; RMSNorm: Zhang and
    Sennrich 2019, eq. 4; RoPE: Su et al. 2021, eq. 34; ALiBi: Press et al. 2021, section 3; gated MLP: Shazeer 2020,
    eq. 6; experts: Jiang et al. 2024, section 2.1) and sharing nothing with transformers, so that agreement with the
    converted model is evidence. Weights are converted to `dtype` one at a time.
    """
    return Forward(gpt, dtype).logits(ids)


def alibi_slopes(n_head: int) -> Tensor:
    """The paper's slopes (n_head,): 2^(-8i/n) for i = 1 … n; if n is no power of two, others are interpolated."""
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return torch.tensor([*slopes, *between[: n_head - n]])


class Forward:
    """The parts of the forward pass; x and h are (B, T, D), queries, keys and values (B, heads, T, w)."""

    def __init__(self, gpt: CanonicalGPT, dtype: torch.dtype):
        self.gpt, self.dtype = gpt, dtype
        self.rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        gpt = self.gpt
        x = gpt.tensors["token_embedding.weight"][ids].to(self.dtype) * gpt.embedding_scale
        if "position_embedding.weight" in gpt.tensors:
            x = x + self.tensor("position_embedding.weight")[gpt.position_offset :][: ids.shape[1]]
        if gpt.embedding_norm:
            x = self.norm("embedding_norm", x)
        if "smear_gate.weight" in gpt.tensors:
            x = self.smeared(x)
        first, backed_out = x, None
        for n in range(gpt.n_layer):
            mixing = self.get(f"blocks.{n}.residual_lambdas.weight")
            x = x if mixing is None else mixing[0] * x + mixing[1] * first
            x = self.block(n, x, ids)
            backed_out = x if n == gpt.backout_layer else backed_out
        if backed_out is not None:
            x = x - self.tensor("backout_lambda.weight") * backed_out
        if gpt.final_norm:
            x = self.norm("final_norm", x)
        # The widest matrix by far is widened in pieces.
        pieces = gpt.tensors["head.weight"].split(HEAD_ROWS)
        logits = torch.cat([F.linear(x, rows.to(self.dtype)) for rows in pieces], dim=-1)
        bias = self.get("head.bias")
        logits = logits if bias is None else logits + bias
        return _capped(logits * gpt.logit_scale, gpt.logit_cap)

    def smeared(self, x: Tensor) -> Tensor:
        gate = self.tensor("smear_gate.weight")
        share = self.tensor("smear_lambda.weight") * F.linear(x[:, 1:, : gate.shape[1]], gate).sigmoid()
        return torch.cat([x[:, :1], x[:, 1:] + share * x[:, :-1]], dim=1)

    def block(self, n: int, x: Tensor, ids: Tensor) -> Tensor:
        block = f"blocks.{n}"

        def attention(block: str, h: Tensor) -> Tensor:
            return self.attention(block, h, self.gpt.window_of(n), ids)

        norm_1, placement = f"{block}.norm_1", self.gpt.norm_placement
        norm_2 = f"{block}.norm_2" if f"{block}.norm_2.weight" in self.gpt.tensors else norm_1
        scales = {place: self.gpt.residual_scale if place in self.scaled() else 1.0 for place in SCALED[1:]}
        if self.gpt.parallel:
            mixed = scales["attention"] * attention(block, self.norm(norm_1, x))
            return scales["stream"] * x + mixed + scales["mlp"] * self.mlp(block, self.norm(norm_2, x))
        for number, part, name, place in ((1, attention, norm_1, "attention"), (2, self.mlp, norm_2, "mlp")):
            x = self.norm(name, x) if placement == "replace" else x
            h = part(block, self.norm(name, x) if placement in ("pre", "both") else x)
            if placement == "sublayer":
                h = self.norm(name, h)
            elif placement == "both":
                h = self.norm(f"{block}.norm_{number}_after", h)
            x = scales["stream"] * x + scales[place] * h
            x = self.norm(name, x) if placement == "post" else x
        return x

    def scaled(self) -> tuple[str, ...]:
        """What `residual_scale` multiplies: attention, mlp, stream."""
        return ("attention", "mlp") if self.gpt.residual_scaled == "both" else (self.gpt.residual_scaled,)

    def attention(self, block: str, h: Tensor, window: int | None, ids: Tensor) -> Tensor:
        gpt = self.gpt
        query, key, value = (self.linear(f"{block}.{part}", h) for part in ("query", "key", "value"))
        if f"{block}.value_embedding.weight" in gpt.tensors:
            value = self.with_value_embedding(block, h, value, ids)
        if gpt.qk_norm == "width":
            query, key = self.qk_norm(block, query, key)
        if gpt.rope and gpt.rope_span == "width":
            query, key = self.rotate(query, query.shape[-1]), self.rotate(key, key.shape[-1])
        query, key, value = (x.unflatten(-1, (-1, gpt.head_width)).transpose(1, 2) for x in (query, key, value))
        if gpt.qk_norm == "head" and not gpt.qk_norm_after_rope:
            query, key = self.qk_norm(block, query, key)
        if gpt.rope and gpt.rope_span == "head":
            query, key = self.rotate(query, gpt.turned_width), self.rotate(key, gpt.turned_width)
        if gpt.qk_norm == "head" and gpt.qk_norm_after_rope:
            query, key = self.qk_norm(block, query, key)
        key, value = (x.repeat_interleave(gpt.n_head // gpt.n_kv_head, dim=1) for x in (key, value))
        scores = _capped(query @ key.transpose(-1, -2) * gpt.attention_scale, gpt.attention_cap)
        mixed = (self.masked(scores, window).softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.linear(f"{block}.output", mixed) if f"{block}.output.weight" in gpt.tensors else mixed

    def qk_norm(self, block: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.gpt.qk_norm_type
        return self.norm(f"{block}.query_norm", query, kind), self.norm(f"{block}.key_norm", key, kind)

    def with_value_embedding(self, block: str, h: Tensor, value: Tensor, ids: Tensor) -> Tensor:
        added = self.gpt.tensors[f"{block}.value_embedding.weight"][ids].to(self.dtype)
        if (gate := self.get(f"{block}.value_gate.weight")) is not None:
            share = self.gpt.value_gate_factor * F.linear(h[..., : gate.shape[1]], gate).sigmoid()
            added = (added.unflatten(-1, (self.gpt.n_kv_head, -1)) * share[..., None]).flatten(-2)
        lambdas = self.get(f"{block}.value_lambdas.weight")
        return value + added if lambdas is None else lambdas[0] * value + lambdas[1] * added

    def masked(self, scores: Tensor, window: int | None) -> Tensor:
        positions = torch.arange(scores.shape[-1])
        distance = positions[:, None] - positions
        if self.gpt.alibi:
            slopes = self.gpt.tensors.get("alibi.slopes", alibi_slopes(self.gpt.n_head)).to(self.dtype)
            scores = scores - slopes[:, None, None] * distance.abs()
        hidden = distance < 0 if self.gpt.causal else torch.zeros_like(distance, dtype=torch.bool)
        if window:
            hidden = hidden | (distance.abs() >= window)
        return scores.masked_fill(hidden, -math.inf)

    def rotate(self, x: Tensor, width: int) -> Tensor:
        """x (…, T, w) with its first `width` coordinates rotated."""
        turned, kept = x[..., :width], x[..., width:]
        cos, sin = self.rotation(x.shape[-2], width)
        if self.gpt.rope == "interleaved":
            a, b = turned[..., 0::2], turned[..., 1::2]
            return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2), kept], dim=-1)
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, kept], dim=-1)

    def rotation(self, length: int, width: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines (T, w / 2) of `rotate`, the same in every block."""
        if (length, width) not in self.rotations:
            # Authors and transformers compute this table in float32, whatever the model's dtype.
            frequencies = 1 / self.gpt.rope_theta ** (torch.arange(0, width, 2).float() / width)
            angles = torch.outer(torch.arange(length).float(), frequencies)
            sin = angles.sin().to(self.dtype) * self.gpt.rope_direction
            self.rotations[length, width] = angles.cos().to(self.dtype), sin
        return self.rotations[length, width]

    def mlp(self, block: str, h: Tensor) -> Tensor:
        if f"{block}.router.weight" not in self.gpt.tensors:
            return self.one_mlp(block, h)
        shares, chosen = self.linear(f"{block}.router", h).softmax(-1).topk(self.gpt.experts_per_token, dim=-1)
        if self.gpt.renormalise_experts:
            shares = shares / shares.sum(-1, keepdim=True)
        mixed = torch.zeros_like(h)
        for expert in chosen.unique().tolist():
            share = (shares * (chosen == expert)).sum(-1, keepdim=True)
            mixed = mixed + share * self.one_mlp(f"{block}.experts.{expert}", h)
        if f"{block}.shared.mlp_in.weight" not in self.gpt.tensors:
            return mixed
        shared = self.one_mlp(f"{block}.shared", h)
        gated = f"{block}.shared_gate.weight" in self.gpt.tensors
        return mixed + (self.linear(f"{block}.shared_gate", h).sigmoid() * shared if gated else shared)

    def one_mlp(self, place: str, h: Tensor) -> Tensor:
        activation, opened = ACTIVATIONS[self.gpt.activation], self.linear(f"{place}.mlp_in", h)
        gated = f"{place}.mlp_gate.weight" in self.gpt.tensors
        h = activation(self.linear(f"{place}.mlp_gate", h)) * opened if gated else activation(opened)
        return self.linear(f"{place}.mlp_out", h) if f"{place}.mlp_out.weight" in self.gpt.tensors else h

    def norm(self, name: str, x: Tensor, kind: str | None = None) -> Tensor:
        gpt, of_queries = self.gpt, name.endswith(("query_norm", "key_norm"))
        own = gpt.final_norm_eps if name == "final_norm" else gpt.qk_norm_eps if of_queries else None
        eps = gpt.norm_eps if own is None else own
        is_layernorm = (kind or gpt.norm) == "layernorm"
        centred = x - x.mean(-1, keepdim=True) if is_layernorm else x
        variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - (is_layernorm and gpt.norm_unbiased))
        scaled = centred / (torch.sqrt(variance) + eps if gpt.norm_eps_outside else torch.sqrt(variance + eps))
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        scaled = scaled if weight is None else scaled * (weight + self.gpt.norm_offset)
        return scaled if bias is None else scaled + bias

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensor(f"{name}.weight"), self.get(f"{name}.bias"))

    def tensor(self, name: str) -> Tensor:
        return self.gpt.tensors[name].to(self.dtype)

    def get(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.gpt.tensors else None


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
