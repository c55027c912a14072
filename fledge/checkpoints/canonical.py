"""The canonical GPT: one form for every hand-written layout, and the reference forward that says what it means."""

import math
from collections.abc import Callable
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


@dataclass
class CanonicalGPT:
    """A pre-norm decoder with learned positions. V vocabulary, T context, D width, F MLP width.

    `tensors`, every projection in (out, in) orientation and float64:
        token_embedding.weight (V, D), position_embedding.weight (T, D), final_norm.{weight,bias} (D,),
        head.weight (V, D), optional head.bias (V,), and for each block N, blocks.N. followed by
        norm_1, norm_2 (D,), query, key, value, output (D, D), mlp_in (F, D), mlp_out (D, F).
    Any bias may be absent, and so may `output` (the heads then go straight into the residual stream).
    """

    tensors: dict[str, Tensor]
    n_layer: int
    n_head: int
    activation: str
    attention_scale: float
    norm_eps: float
    tied: bool

    @property
    def vocab_size(self) -> int:
        return self.tensors["token_embedding.weight"].shape[0]

    @property
    def context_length(self) -> int:
        return self.tensors["position_embedding.weight"].shape[0]

    @property
    def width(self) -> int:
        return self.tensors["token_embedding.weight"].shape[1]


@torch.no_grad()
def reference_logits(gpt: CanonicalGPT, ids: Tensor) -> Tensor:
    """The model as its author meant it, in plain PyTorch and float64: ids (B, T) → logits (B, T, V).

    Written out from the definition (Vaswani et al. 2017, eq. 1; Radford et al. 2019, section 2.3) and sharing nothing
    with transformers, so that agreement with the converted model means something.
    """
    tensors = gpt.tensors
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = (
            centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + gpt.norm_eps) * tensors[f"{name}.weight"]
        )
        return scaled + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else scaled

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (gpt.n_head, -1)).transpose(1, 2)

    x = tensors["token_embedding.weight"][ids] + tensors["position_embedding.weight"][:length]
    for n in range(gpt.n_layer):
        block = f"blocks.{n}"
        h = norm(f"{block}.norm_1", x)
        query, key, value = (split_heads(linear(f"{block}.{part}", h)) for part in ("query", "key", "value"))
        scores = (query @ key.transpose(-1, -2) * gpt.attention_scale).masked_fill(~causal, -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + (linear(f"{block}.output", mixed) if f"{block}.output.weight" in tensors else mixed)
        h = ACTIVATIONS[gpt.activation](linear(f"{block}.mlp_in", norm(f"{block}.norm_2", x)))
        x = x + linear(f"{block}.mlp_out", h)
    return linear("head", norm("final_norm", x))
