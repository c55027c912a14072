"""Parts that few authors have and no tensor shows: the author's module recovers each, and code of its own holds it."""

import pytest
import torch
from accelerate import init_empty_weights
from hand_written import checkpoint_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fledge.checkpoints.custom import represent
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.proof import probes_of, prove_exact
from fledge.checkpoints.recognition import recognise

pytestmark = pytest.mark.slow  # each part is searched for

VOCAB, CONTEXT, WIDTH, HEADS, KEYS = 29, 20, 16, 4, 2
HEAD = WIDTH // HEADS
TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


class ByHand(nn.Module):
    """LayerNorm as tutorials write it out; `kind` says how it divides."""

    def __init__(self, kind: str, eps: float):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.kind, self.eps = kind, eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unbiased = self.kind.startswith("unbiased")
        if self.kind.endswith("outside"):
            return self.gamma * centred / (x.std(-1, keepdim=True, unbiased=unbiased) + self.eps) + self.beta
        return self.gamma * centred / (x.var(-1, keepdim=True, unbiased=unbiased) + self.eps).sqrt() + self.beta


def turned(x: Tensor) -> Tensor:
    """RoPE of all of x (B, T, w) at once, halves turned together."""
    width = x.shape[-1]
    frequencies = 1 / 10_000.0 ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    def __init__(self, parts: dict):
        super().__init__()
        self.parts, eps = parts, parts.get("eps", 1e-5)
        norm = parts.get("norm")
        self.norm1, self.norm2 = (ByHand(norm, eps) if norm else nn.LayerNorm(WIDTH, eps=eps) for _ in range(2))
        self.query, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, KEYS * HEAD), nn.Linear(WIDTH, KEYS * HEAD)
        self.up, self.down = nn.Linear(WIDTH, parts["hidden"]), nn.Linear(parts["hidden"], WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        query, key, value = self.query(h), self.key(h), self.value(h)
        if self.parts.get("rope"):
            query, key = turned(query), turned(key)
        query, key, value = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (query, key, value))
        key, value = (part.repeat_interleave(HEADS // KEYS, dim=1) for part in (key, value))
        scores = query @ key.transpose(-1, -2) * HEAD**-0.5
        if cap := self.parts.get("cap"):
            scores = cap * torch.tanh(scores / cap)
        place = torch.arange(x.shape[1])
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= self.parts.get("window", CONTEXT))
        x = x + self.proj((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, parts: dict):
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB, WIDTH)
        self.pos_emb = None if parts.get("rope") else nn.Embedding(CONTEXT, WIDTH)
        hidden = parts.get("hidden", (24, 24))
        self.blocks = nn.ModuleList(Block({**parts, "hidden": width}) for width in hidden)
        norm, eps = parts.get("norm"), parts.get("final_eps", parts.get("eps", 1e-5))
        self.norm_f = ByHand(norm, eps) if norm else nn.LayerNorm(WIDTH, eps=eps)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids)
        x = x if self.pos_emb is None else x + self.pos_emb(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm_f(x))


CASES = {
    "LayerNorm by std, epsilon beside it": (
        {"norm": "unbiased outside", "eps": 1e-2},
        {"norm_unbiased": True, "norm_eps_outside": True, "norm_eps": 1e-2},
    ),
    "LayerNorm by var": ({"norm": "unbiased"}, {"norm_unbiased": True, "norm_eps_outside": False}),
    "LayerNorm by std of D": ({"norm": "outside", "eps": 1e-2}, {"norm_unbiased": False, "norm_eps_outside": True}),
    "two epsilons": ({"eps": 1e-2, "final_eps": 1e-5}, {"norm_eps": 1e-2, "final_norm_eps": 1e-5}),
    "RoPE over the whole width": ({"rope": True}, {"rope_span": "width", "rope": "half"}),
    "soft cap of scores": ({"cap": 30.0}, {"attention_cap": 30.0}),
    "window": ({"window": 5}, {"window": 5}),
    "MLPs of two widths": ({"hidden": (24, 40)}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_authors_module_recovers_it_and_code_of_its_own_holds_it(name):
    parts, expected = CASES[name]
    torch.manual_seed(0)
    module = GPT(parts)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 2 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    config = {"block_size": CONTEXT, "n_head": HEADS}
    config |= {"norm_eps": parts["eps"]} if "eps" in parts else {}
    checkpoint = checkpoint_of(module, config)
    wide = module.double().eval()
    gpt, facts = recognise(checkpoint)
    with torch.no_grad():
        gpt, error = settle_by_reference(gpt, facts, wide)
    assert error <= 1e-9
    assert {field: getattr(gpt, field) for field in expected} == expected
    assert not [str(fact) for fact in facts if fact.assumed]
    config, weights, folds = represent(gpt, TOKEN_IDS, "auto", True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prove_exact(probes_of(gpt), model, weights, folds)


def test_names_of_a_norm_by_hand_ask_how_it_divides():
    facts = {fact.name: fact for fact in recognise(checkpoint_of(GPT({"norm": "unbiased"}), {"n_head": HEADS}))[1]}
    assert facts["norm_unbiased"].assumed
    assert facts["norm_eps_outside"].assumed
    facts = {fact.name: fact for fact in recognise(checkpoint_of(GPT({}), {"n_head": HEADS}))[1]}
    assert facts["norm_unbiased"].source == "names of nn.LayerNorm"
