"""The canonical GPT: one form for every hand-written layout, and the reference forward that says what it means."""

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
    "silu": F.silu,
}
NORMS = ("layernorm", "rmsnorm")
ROTATIONS = ("interleaved", "half")
"""Which coordinates of a head RoPE turns together: neighbours (Su et al. 2021), or i and i + half a head (GPT-NeoX)."""

HEAD_ROWS = 8192


@dataclass
class CanonicalGPT:
    """A decoder that somebody wrote by hand. V vocabulary, T context, D width, F MLP width, K = D · n_kv_head / n_head.

    `tensors`, every projection in (out, in) orientation, in the checkpoint's own precision:
        token_embedding.weight (V, D), position_embedding.weight (T, D) unless `rope` is set, final_norm.{weight,bias}
        (D,), head.weight (V, D), optional head.bias (V,), and for each block N, blocks.N. followed by
        norm_1, norm_2 (D,), query, output (D, D), key, value (K, D), mlp_in (F, D), mlp_out (D, F), and for a gated
        MLP mlp_gate (F, D). Any bias may be absent, and so may `output` (the heads then go straight into the residual).

    The last two fields are what no target holds: the reference runs such models only to say why they are refused.
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
    rope: str | None = None
    rope_theta: float = 10_000.0
    embedding_scale: float = 1.0
    post_norm: bool = False
    causal: bool = True

    @property
    def vocab_size(self) -> int:
        return self.tensors["token_embedding.weight"].shape[0]

    @property
    def width(self) -> int:
        return self.tensors["token_embedding.weight"].shape[1]

    @property
    def head_width(self) -> int:
        return self.width // self.n_head

    @property
    def usual_scale(self) -> float:
        return self.head_width**-0.5

    @property
    def gated(self) -> bool:
        return "blocks.0.mlp_gate.weight" in self.tensors


@torch.no_grad()
def reference_logits(gpt: CanonicalGPT, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The model as its author meant it, in plain PyTorch: ids (B, T) → logits (B, T, V) in `dtype`.

    Written out from the definitions (Vaswani et al. 2017, eq. 1; Radford et al. 2019, section 2.3; RMSNorm: Zhang and
    Sennrich 2019, eq. 4; RoPE: Su et al. 2021, eq. 34; gated MLP: Shazeer 2020, eq. 6) and sharing nothing with
    transformers, so that agreement with the converted model means something. Weights are widened one at a time.
    """
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def get(name: str) -> Tensor | None:
        return gpt.tensors[name].to(dtype) if name in gpt.tensors else None

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if gpt.norm == "layernorm" else x
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + gpt.norm_eps) * get(f"{name}.weight")
        bias = get(f"{name}.bias")
        return scaled if bias is None else scaled + bias

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, gpt.head_width)).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        # Authors and transformers alike make this table in float32, whatever the model runs in.
        frequencies = 1 / gpt.rope_theta ** (torch.arange(0, gpt.head_width, 2).float() / gpt.head_width)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if gpt.rope == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def attention(block: str, h: Tensor) -> Tensor:
        query, key, value = (split_heads(linear(f"{block}.{part}", h)) for part in ("query", "key", "value"))
        if gpt.rope:
            query, key = rotate(query), rotate(key)
        key, value = (x.repeat_interleave(gpt.n_head // gpt.n_kv_head, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * gpt.attention_scale
        if gpt.causal:
            scores = scores.masked_fill(~causal, -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return linear(f"{block}.output", mixed) if f"{block}.output.weight" in gpt.tensors else mixed

    def mlp(block: str, h: Tensor) -> Tensor:
        activation, opened = ACTIVATIONS[gpt.activation], linear(f"{block}.mlp_in", h)
        h = activation(linear(f"{block}.mlp_gate", h)) * opened if gpt.gated else activation(opened)
        return linear(f"{block}.mlp_out", h)

    x = gpt.tensors["token_embedding.weight"][ids].to(dtype) * gpt.embedding_scale
    if gpt.rope is None:
        x = x + get("position_embedding.weight")[:length]
    for n in range(gpt.n_layer):
        for part, name in ((attention, "norm_1"), (mlp, "norm_2")):
            block, norm_name = f"blocks.{n}", f"blocks.{n}.{name}"
            x = norm(norm_name, x + part(block, x)) if gpt.post_norm else x + part(block, norm(norm_name, x))
    x, head, bias = norm("final_norm", x), gpt.tensors["head.weight"], get("head.bias")
    # The widest matrix by far is widened in pieces.
    logits = torch.cat([F.linear(x, rows.to(dtype)) for rows in head.split(HEAD_ROWS)], dim=-1)
    return logits if bias is None else logits + bias
