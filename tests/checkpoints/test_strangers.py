"""Whole files of model code in styles of strangers, converted by --reference and held to what the code computes."""

import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from hand_written import randomise
from random_gpts import empty

from fledge.checkpoints.author.reference import load_reference
from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.custom import represent
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.facts import Fact, Source
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.proof import prove_exact
from fledge.checkpoints.recognition import recognise

pytestmark = pytest.mark.slow  # each test searches the readings of a module

META = """
from dataclasses import dataclass
import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class ModelArgs:
    dim: int = 16
    depth: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 23
    max_seq: int = 12

class RMS(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 3e-6)).type_as(x) * self.g

def rope(x, table):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[: x.shape[1], None, :]).flatten(3).type_as(x)

class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.head = a.dim // a.q_heads
        self.kv = a.kv_heads * self.head
        self.n1, self.n2 = RMS(a.dim), RMS(a.dim)
        self.kvq = nn.Linear(a.dim, a.dim + 2 * self.kv, bias=False)
        self.o = nn.Linear(a.dim, a.dim, bias=False)
        self.w12 = nn.Linear(a.dim, 88, bias=False)
        self.w3 = nn.Linear(44, a.dim, bias=False)

    def forward(self, x, table):
        B, T, C = x.shape
        parts = self.kvq(self.n1(x)).split([self.kv, self.kv, C], dim=-1)
        k, v, q = (part.view(B, T, -1, self.head) for part in parts)
        k, v, q = (part.transpose(1, 2) for part in (rope(k, table), v, rope(q, table)))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        up, gate = self.w12(self.n2(x)).chunk(2, -1)
        return x + self.w3(up * F.silu(gate))

class LM(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = nn.ModuleList([Block(args) for _ in range(args.depth)])
        self.out_norm = RMS(args.dim)
        self.unembed = nn.Linear(args.dim, args.vocab_size, bias=False)
        frequencies = 1.0 / 20000.0 ** (torch.arange(0, 4, 2).float() / 4)
        angles = torch.outer(torch.arange(args.max_seq).float(), frequencies)
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids, targets=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.table)
        return self.unembed(self.out_norm(x)), None

def made():
    return LM(ModelArgs())
"""

GEMMA = """
import math
import torch
from torch import nn
import torch.nn.functional as F

SEQ_LEN = 24

class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)

class Block(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.c, self.window = c, window
        self.pre_attn, self.post_attn, self.pre_ff, self.post_ff = (Norm(c.width) for _ in range(4))
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(c.width, 24, bias=False), nn.Linear(c.width, 24, bias=False)
        self.down_proj = nn.Linear(24, c.width, bias=False)

    def forward(self, x):
        h, T = self.pre_attn(x), x.shape[1]
        q, k, v = (w(h).unflatten(-1, (self.c.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        half = q.shape[-1] // 2
        angles = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(half).float() / half))
        cos, sin = angles.cos(), angles.sin()
        def turned(z):
            a, b = z.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        scores = turned(q) @ turned(k).transpose(2, 3) / math.sqrt(2 * half)
        scores = 20 * torch.tanh(scores / 20)
        i = torch.arange(T)
        hidden = (i > i[:, None]) | (i[:, None] - i >= (self.window or T))
        mixed = scores.masked_fill(hidden, -1e9).softmax(-1) @ v
        x = x + self.post_attn(self.wo(mixed.transpose(1, 2).flatten(2)))
        h = self.pre_ff(x)
        h = F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h)
        return x + self.post_ff(self.down_proj(h))

class Settings:
    vocab, width, heads, depth = 23, 16, 2, 4

class Gemmini(nn.Module):
    def __init__(self, c=Settings):
        super().__init__()
        self.te = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList([Block(c, 8 if i % 2 == 0 else None) for i in range(c.depth)])
        self.final = Norm(c.width)

    def forward(self, ids):
        x = self.te(ids) * self.te.weight.shape[1] ** 0.5
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.final(x), self.te.weight)
        return 30 * torch.tanh(logits / 30)

made = Gemmini
"""

LIGHTNING = """
import argparse
import torch
import torch.nn as nn
try:
    import lightning_that_is_missing as L
except ImportError:
    import another_that_is_missing as L

class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.sa = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.norm_a, self.norm_b = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.norm_a(x + self.sa(x, x, x, attn_mask=hidden, need_weights=False)[0])
        return self.norm_b(x + self.ff(x))

class Net(nn.Module):
    def __init__(self, c: argparse.Namespace):
        super().__init__()
        self.tok, self.pos = nn.Embedding(c.vocab_size, c.emb_dim), nn.Embedding(c.horizon, c.emb_dim)
        self.layers = nn.ModuleList(Layer(c.emb_dim, c.n_heads) for _ in range(c.n_layers))
        self.readout = nn.Linear(c.emb_dim, c.vocab_size)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)

class LitGPT(L.LightningModule):
    def __init__(self, vocab_size=23, emb_dim=16, n_layers=2, n_heads=4, horizon=12, lr=1e-3):
        super().__init__()
        self.save_hyperparameters(ignore="lr")
        self.net = Net(argparse.Namespace(**self.hparams))

    def forward(self, ids):
        return self.net(ids.to(self.device))
"""

CASES = {
    "META": (META, "LlamaForCausalLM", {"n_kv_head": 2, "rope": "interleaved", "rope_theta": 20000.0}),
    "GEMMA": (GEMMA, "Gemma2ForCausalLM", {"window": 8, "window_pattern": "SLSL", "norm_offset": 1.0, "logit_cap": 30}),
    "LIGHTNING": (LIGHTNING, "OPTForCausalLM", {"norm_placement": "post", "activation": "gelu_tanh"}),
}
IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def weights_of(code: str) -> dict[str, torch.Tensor]:
    """Random weights of the model that a file's `made` gives; Lightning's is its `net` under another class."""
    namespace: dict = {"__name__": "strangers"}
    if "LitGPT" in code:
        code = code[: code.index("class LitGPT")].replace("import lightning_that_is_missing as L", "L = None")
        code += "def made():\n    sizes = dict(vocab_size=23, emb_dim=16, n_layers=2, n_heads=4, horizon=12)\n"
        code += "    return nn.ModuleDict({'net': Net(argparse.Namespace(**sizes))})\n"
    exec(textwrap.dedent(code), namespace)
    return randomise(namespace["made"]()).state_dict()


@pytest.mark.parametrize("case", CASES)
def test_file_of_a_stranger_is_converted_to_what_it_computes(case, tmp_path: Path, monkeypatch):
    code, architecture, fields = CASES[case]
    monkeypatch.setitem(sys.modules, "strangers", types.ModuleType("strangers"))  # where dataclasses look
    weights = weights_of(code)
    (tmp_path / "model.py").write_text(code)
    checkpoint = Checkpoint(weights, {}, {}, source={})
    author = load_reference(str(tmp_path), None, checkpoint)
    length, _ = author.context_length or (0, "")
    gpt, facts = recognise(checkpoint, by_author=Fact.of("context_length", length, Source.REFERENCE))
    gpt, _ = settle_by_reference(gpt, facts, author, author.avoid, author.tolerance, author.doubt)
    assert {field: getattr(gpt, field) for field in fields} == fields
    config, written, folds = represent(gpt, IDS, "auto", allow_custom_code=False)
    ids = torch.randint(1, 23, (2, gpt.context_length), generator=torch.Generator().manual_seed(1))
    model = empty(config)
    assert type(model).__name__ == architecture
    expected, read = author(ids), canonical_logits(gpt, ids)
    assert (read - expected).abs().max() <= 1e-6 * expected.abs().max()  # authors round the table of rotations
    assert prove_exact([(ids, read)], model, written, folds) <= 1e-9
