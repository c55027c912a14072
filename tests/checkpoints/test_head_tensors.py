"""Attention whose parameters have three dimensions, as courses on interpretability write it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hand_written import stated

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.recognition import recognise

VOCAB, CONTEXT, WIDTH, HEADS, HEAD, LAYERS = 29, 7, 12, 3, 4, 2
INSIDE = {"W_Q": (HEADS, WIDTH, HEAD), "W_K": (HEADS, WIDTH, HEAD), "W_V": (HEADS, WIDTH, HEAD)}
INSIDE |= {"b_Q": (HEADS, HEAD), "b_K": (HEADS, HEAD), "b_V": (HEADS, HEAD), "W_O": (HEADS, HEAD, WIDTH)}
NONE = torch.zeros(HEADS, HEAD)


def by_head(biased: bool) -> dict[str, torch.Tensor]:
    """Every matrix stored (in, out), with a letter W or b before what it is."""
    shapes = {"embed.W_E": (VOCAB, WIDTH), "pos_embed.W_pos": (CONTEXT, WIDTH)}
    for n in range(LAYERS):
        block = {f"{norm}.{part}": (WIDTH,) for norm in ("ln1", "ln2") for part in "wb"}
        block |= {f"attn.{name}": shape for name, shape in INSIDE.items() if biased or name[0] == "W"}
        block |= {"attn.b_O": (WIDTH,)} if biased else {}
        block |= {"mlp.W_in": (WIDTH, 40), "mlp.b_in": (40,), "mlp.W_out": (40, WIDTH), "mlp.b_out": (WIDTH,)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_final.w": (WIDTH,), "ln_final.b": (WIDTH,), "unembed.W_U": (WIDTH, VOCAB), "unembed.b_U": (VOCAB,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def logits(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """From the definition, head by head."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["embed.W_E"][ids] + t["pos_embed.W_pos"][: ids.shape[1]]
    for n in range(LAYERS):
        block = {name.removeprefix(f"blocks.{n}."): tensor for name, tensor in t.items()}
        h = F.layer_norm(x, (WIDTH,), block["ln1.w"], block["ln1.b"])
        for i in range(HEADS):
            q, k, v = (h @ block[f"attn.W_{c}"][i] + block.get(f"attn.b_{c}", NONE)[i] for c in "QKV")
            scores = (q @ k.transpose(1, 2) / math.sqrt(HEAD)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
            x = x + scores.softmax(-1) @ v @ block["attn.W_O"][i]
        x = x + block.get("attn.b_O", 0)
        h = F.layer_norm(x, (WIDTH,), block["ln2.w"], block["ln2.b"])
        x = x + F.relu(h @ block["mlp.W_in"] + block["mlp.b_in"]) @ block["mlp.W_out"] + block["mlp.b_out"]
    x = F.layer_norm(x, (WIDTH,), t["ln_final.w"], t["ln_final.b"])
    return x @ t["unembed.W_U"] + t["unembed.b_U"]


def as_linear(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model with heads (heads, out, in) beside nn.Linear's matrices."""
    turned = {}
    for name, tensor in tensors.items():
        if name.split(".")[-1] in ("W_Q", "W_K", "W_V", "W_O"):
            turned[name] = tensor.transpose(1, 2).contiguous()
        elif "mlp." in name:
            kind = "weight" if "W_" in name else "bias"
            place = "up" if name.endswith("in") else "down"
            turned[f"{name.rpartition('.')[0]}.{place}.{kind}"] = (
                tensor.T if tensor.dim() == 2 else tensor
            ).contiguous()
        else:
            turned[name] = tensor
    return turned


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("author", [dict, as_linear])
def test_heads_of_a_parameter_with_three_dimensions_are_counted_and_read(author, biased):
    tensors = by_head(biased)
    gpt, facts = recognise(Checkpoint(author(tensors), {}, {}, {}), told=stated(activation="relu"))
    ids = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    assert next(fact for fact in facts if fact.name == "n_head").source == "tensors"
    assert (canonical_logits(gpt, ids) - logits(tensors, ids)).abs().max() <= 1e-9


@pytest.fixture
def squares(request):
    """Two layers of a course's GPT whose matrices are bare parameters for `x @ w`, named in `bare`, or nn.Linear's."""
    shapes = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (WIDTH, WIDTH)) | {"up": (WIDTH, 40), "down": (40, WIDTH)}
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"tokens.weight": some(VOCAB, WIDTH), "positions.weight": some(CONTEXT, WIDTH)}
    for n in range(LAYERS):
        for name, shape in shapes.items():
            path = f"blocks.{n}.{'mlp' if name in ('up', 'down') else 'attention'}.{name}"
            matrix = some(*shape)
            tensors |= {path: matrix} if name in request.param else {f"{path}.weight": matrix.T.contiguous()}
        for norm in ("norm1", "norm2"):
            tensors |= {f"blocks.{n}.{norm}.weight": 1 + some(WIDTH), f"blocks.{n}.{norm}.bias": some(WIDTH)}
    tensors |= {"norm.weight": 1 + some(WIDTH), "norm.bias": some(WIDTH), "head.weight": some(VOCAB, WIDTH)}
    return tensors


def square_logits(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def times(h, path):
        return h @ t[path] if path in t else F.linear(h, t[f"{path}.weight"])

    def norm(h, path):
        return F.layer_norm(h, (WIDTH,), t[f"{path}.weight"], t[f"{path}.bias"])

    x = t["tokens.weight"][ids] + t["positions.weight"][: ids.shape[1]]
    for n in range(LAYERS):
        h, block = norm(x, f"blocks.{n}.norm1"), f"blocks.{n}"
        q, k, v = (times(h, f"{block}.attention.w_{c}").unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for c in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + times(mixed, f"{block}.attention.w_o")
        x = x + times(F.gelu(times(norm(x, f"{block}.norm2"), f"{block}.mlp.up")), f"{block}.mlp.down")
    return F.linear(norm(x, "norm"), t["head.weight"])


MIXED = [("w_o",), ("w_q", "w_k", "w_v"), ("w_q", "w_k", "w_v", "w_o"), ("w_o", "up", "down"), ()]


@pytest.mark.parametrize("squares", MIXED, ids=" ".join, indirect=True)
def test_square_parameters_beside_linear_layers_are_a_question(squares):
    bare = {name.split(".")[3] for name in squares if name.count(".") == 3 and "norm" not in name}
    gpt, facts = recognise(Checkpoint(squares, {"n_head": HEADS}, {}, source={}))
    ids = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    expected = square_logits(squares, ids)
    assert (canonical_logits(gpt, ids) - expected).abs().max() <= 1e-9
    assumed = {fact.name for fact in facts if fact.assumed}
    assert ("output_in_out" in assumed, "qkv_in_out" in assumed) == ("w_o" in bare, "w_q" in bare)


@pytest.mark.parametrize("squares", MIXED, ids=" ".join, indirect=True)
def test_how_square_parameters_are_stored_is_settled_by_the_authors_module(squares):
    turned = {name: x.T.contiguous() if name.split(".")[-1][:2] == "w_" else x for name, x in squares.items()}

    def logits(ids):
        return square_logits(squares, ids)

    gpt, facts = recognise(Checkpoint(turned, {"n_head": HEADS}, {}, source={}))
    _, error = settle_by_reference(gpt, facts, logits)
    assert error <= 1e-9
    assert not any(fact.assumed for fact in facts)
