"""Code of strangers that does something which few layouts do: found by their module, and held exactly."""

import pytest
import torch
import torch.nn.functional as F
from hand_written import randomise
from random_gpts import empty
from torch import nn

from fledge.checkpoints.custom import represent
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.proof import prove_exact
from fledge.checkpoints.recognition import recognise
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each test searches the readings of a module
VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 23, 12, 12, 3, 2
IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * head, bias=False)
        self.to_out = nn.Linear(HEADS * head, WIDTH)

    def forward(self, x):
        parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 30), nn.ReLU(), nn.Linear(30, WIDTH))

    def forward(self, x):
        return self.net(x)


class Residual(nn.Module):
    """x + scale · gain · part(norm(x)), or with `replace` y + part(y) where y is norm(x)."""

    def __init__(self, part, replace=False, gain=False, scale=1.0):
        super().__init__()
        self.norm, self.fn, self.replace, self.scale = nn.LayerNorm(WIDTH), part, replace, scale
        self.gamma = nn.Parameter(torch.ones(WIDTH)) if gain else 1.0

    def forward(self, x):
        y = self.norm(x)
        return (y if self.replace else x) + self.scale * self.gamma * self.fn(y)


class Layer(nn.Module):
    def __init__(self, head, replace, gain):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(head), nn.LayerNorm(WIDTH), MLP()
        self.gains = [1.0, 1.0]
        if gain:
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
            self.gains = [self.gamma_1, self.gamma_2]
        self.replace = replace

    def forward(self, x):
        for norm, part, gain in zip((self.norm1, self.norm2), (self.attn, self.mlp), self.gains, strict=True):
            y = norm(x)
            x = (y if self.replace else x) + gain * part(y)
        return x


class GPT(nn.Module):
    """Positions begin with row `first`; `apart` numbers attention and MLP as layers of their own."""

    def __init__(self, head=4, replace=False, gain=False, apart=False, first=0, scale=1.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT + first, WIDTH)
        if apart:
            parts = [part for _ in range(LAYERS) for part in (Attention(head), MLP())]
            self.trunk = nn.Sequential(*(Residual(part, replace, scale=scale) for part in parts))
        else:
            self.trunk = nn.Sequential(*(Layer(head, replace, gain) for _ in range(LAYERS)))
        self.norm, self.readout, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB), first

    def forward(self, ids):
        places = torch.arange(ids.shape[1]) + self.first
        return self.readout(self.norm(self.trunk(self.tokens(ids) + self.positions(places))))


ODD = {
    "heads of their own width": ({"head": 6}, {}),
    "a norm that replaces the stream": ({"replace": True}, {"norm_placement": "replace"}),
    "LayerScale": ({"gain": True}, {"norm_placement": "pre"}),
    "attention and MLP numbered apart": ({"apart": True}, {"n_layer": LAYERS}),
    "positions from the third row": ({"first": 2}, {"position_offset": 2, "context_length": CONTEXT}),
    "scaled residuals": ({"apart": True, "scale": 0.61}, {"residual_scale": 0.61}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_part_is_found_by_the_authors_module_and_held_exactly(name):
    options, fields = ODD[name]
    module = randomise(GPT(**options)).double().eval()

    @torch.no_grad()
    def logits(ids):
        try:
            return module(ids)
        except IndexError as error:
            raise UserError("a row that is not there") from error

    weights = {name: tensor.float() for name, tensor in module.state_dict().items()}
    module.load_state_dict(weights)
    gpt, facts = recognise(Checkpoint(weights, {}, {}, source={}))
    gpt, _ = settle_by_reference(gpt, facts, logits)
    assert not any(fact.assumed for fact in facts)
    assert {field: getattr(gpt, field) for field in fields} == fields
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config, written, folds = represent(gpt, ids, "auto", allow_custom_code=True)
    assert prove_exact([(IDS, logits(IDS))], empty(config), written, folds) <= 1e-9
