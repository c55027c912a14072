"""A small model of the shape that nanochat has published since March 2026, written from its description.

RMSNorm without weights everywhere, also of embeddings, queries and keys; ReLU²; RoPE by −θ; logits capped at 15. Each
token's embedding is mixed with the one before it; blocks read a share of the first stream; every second block, the last
among them, adds a gated embedding of the token to its values; the stream at the middle is taken off at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, CONTEXT, WIDTH, HEADS, KEY_HEADS, LAYERS, GATE, SMEAR = 64, 160, 48, 4, 2, 4, 12, 24
HEAD = WIDTH // HEADS
CONFIG = {
    **{"sequence_len": CONTEXT, "vocab_size": VOCAB, "n_layer": LAYERS, "n_head": HEADS, "n_kv_head": KEY_HEADS},
    **{"n_embd": WIDTH, "window_pattern": "SSSL"},
}


def plain(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)


def turned_back(x: Tensor) -> Tensor:
    """RoPE by −θ with a base of 100,000: x (B, H, T, w)."""
    frequencies = 1 / 100_000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)
    angles = torch.outer(torch.arange(x.shape[2]).float(), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, has_values: bool):
        super().__init__()
        self.c_q, self.c_proj = plain(WIDTH, WIDTH), plain(WIDTH, WIDTH)
        self.c_k, self.c_v = plain(WIDTH, KEY_HEADS * HEAD), plain(WIDTH, KEY_HEADS * HEAD)
        self.ve_gate = plain(GATE, KEY_HEADS) if has_values else None

    def forward(self, h: Tensor, values: Tensor | None, window: int) -> Tensor:
        query, key, value = (
            part(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.c_q, self.c_k, self.c_v)
        )
        if values is not None:
            share = 3 * self.ve_gate(h[..., :GATE]).sigmoid()
            value = value + share.transpose(1, 2)[..., None] * values.unflatten(-1, (-1, HEAD)).transpose(1, 2)
        query, key = 1.2 * normed(turned_back(query)), 1.2 * normed(turned_back(key))
        place = torch.arange(h.shape[1])
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance <= window)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = plain(WIDTH, 4 * WIDTH), plain(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(h)) ** 2)


class Block(nn.Module):
    def __init__(self, has_values: bool):
        super().__init__()
        self.attn, self.mlp = Attention(has_values), MLP()

    def forward(self, x: Tensor, values: Tensor | None, window: int) -> Tensor:
        x = x + self.attn(normed(x), values, window)
        return x + self.mlp(normed(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        valued = [n % 2 == (LAYERS - 1) % 2 for n in range(LAYERS)]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, WIDTH), "h": nn.ModuleList(map(Block, valued))})
        self.lm_head = plain(WIDTH, VOCAB)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(LAYERS)), nn.Parameter(torch.zeros(LAYERS))
        self.smear_gate, self.smear_lambda = plain(SMEAR, 1), nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict(
            {str(n): nn.Embedding(VOCAB, KEY_HEADS * HEAD) for n in range(LAYERS) if valued[n]}
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = normed(self.transformer["wte"](ids))
        share = self.smear_lambda * self.smear_gate(x[:, 1:, :SMEAR]).sigmoid()
        x = first = torch.cat([x[:, :1], x[:, 1:] + share * x[:, :-1]], dim=1)
        for n, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[n] * x + self.x0_lambdas[n] * first
            values = self.value_embeds[str(n)](ids) if str(n) in self.value_embeds else None
            x = block(x, values, CONTEXT if n == LAYERS - 1 else 128)
            if n == LAYERS // 2:
                middle = x
        return 15 * torch.tanh(self.lm_head(normed(x - self.backout_lambda * middle)) / 15)


def random_gpt() -> GPT:
    torch.manual_seed(4)
    model = GPT()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
        model.lm_head.weight.mul_(5)
    return model.eval()
