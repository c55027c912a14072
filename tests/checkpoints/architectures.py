"""GPTs beyond the known layouts: `Spec` spans those that convert, `REFUSED` holds those that must not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hand_written import (
    NanoAttention,
    NanoBlock,
    NanoLayerNorm,
    build,
    randomise,
)
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}


class Naming(NamedTuple):
    """An author's words. `{}` is the layer; one head's query is `attention.heads.0.query`, fused it is `attention.qkv`.

    `positions` is the whole name: an embedding's weight (T, D), or a parameter of its own, (1, T, D).
    """

    tokens: str
    positions: str
    final_norm: str
    head: str
    block: str
    norm_1: str
    norm_2: str
    gain: str
    shift: str
    attention: str
    heads: str
    query: str
    key: str
    value: str
    qkv: str
    output: str
    up: str
    down: str


def naming(ends: str, block: str, attention: str, mlp: str) -> Naming:
    return Naming(*f"{ends} {block} {attention} {mlp}".split())


NAMINGS = (
    naming(
        "word_embeddings position_embeddings.weight encoder.final_norm unembed",
        "encoder.layers.{} attention_norm feed_forward_norm weight bias",
        "attention heads query_projection key_projection value_projection qkv_projection output_projection",
        "feed_forward.fc1 feed_forward.fc2",
    ),
    naming(
        "token_embed pos_embed.weight norm lm_head",
        "transformer_blocks.{} norm1 norm2 gamma beta",
        "self_attention heads W_q W_k W_v W_qkv W_o",
        "ffn.w_1 ffn.w_2",
    ),
    naming(
        "wte wpe.weight ln_f lm_head",
        "h.{} ln_1 ln_2 g b",
        "attn heads q k v c_attn c_proj",
        "mlp.c_fc mlp.c_proj",
    ),
    naming(
        "embed.tok embed.pos decoder.norm_out vocab_projection",
        "decoder.block.{} mixer_norm mlp_norm scale offset",
        "mixer heads to_q to_k to_v to_qkv to_out",
        "mlp.expand mlp.contract",
    ),
    naming(
        "tgt_embed.lut position_table.weight decoder.norm generator.proj",
        "decoder.layers.{} sublayer.0.norm sublayer.1.norm a_2 b_2",
        "self_attn heads query key value qkv out",
        "feed_forward.w_1 feed_forward.w_2",
    ),
    naming(
        "embedding.word_embeddings embedding.position_embeddings.weight final_layernorm output_layer",
        "layers.{} input_layernorm post_attention_layernorm weight bias",
        "self_attention heads query key value qkv dense",
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
    naming(
        "embeddings.word_embeddings embeddings.position_embeddings.weight final_layer_norm vocab_projector",
        "transformer.layer.{} sa_layer_norm ffn_layer_norm weight bias",
        "attention heads q_lin k_lin v_lin qkv_lin out_lin",
        "ffn.lin1 ffn.lin2",
    ),
    naming(
        "token_emb pos_emb norm_f unembedding",
        "stack.{} pre_attn_norm pre_ffn_norm gamma beta",
        "attn heads Wq Wk Wv Wqkv Wo",
        "ffn.up ffn.down",
    ),
    naming(
        "tokenEmbedding positionEmbedding.weight finalLayerNorm languageModelHead",
        "blocks.{} layerNorm1 layerNorm2 weight bias",
        "multiHeadAttention attentionHeads queryLayer keyLayer valueLayer qkvLayer outputLayer",
        "feedForward.linear1 feedForward.linear2",
    ),
    naming(
        "token_emb pos_emb.emb.weight norm to_logits",
        "attn_layers.layers.{} attn.norm ff.norm g b",
        "attn head_list to_q to_k to_v to_qkv to_out",
        "ff.proj_in ff.proj_out",
    ),
    naming(
        "decoder.embed_tokens decoder.embed_positions.weight decoder.layer_norm decoder.output_projection",
        "decoder.layers.{} self_attn_layer_norm final_layer_norm weight bias",
        "self_attn heads q_proj k_proj v_proj qkv_proj out_proj",
        "fc1 fc2",
    ),
    naming(
        "encoder pos_encoder.weight norm decoder",
        "transformer_layers.{} norm_a norm_b weight bias",
        "attention heads query key value query_key_value projection",
        "linear1 linear2",
    ),
    naming(
        "gpt.embedding.tokens gpt.embedding.positions.weight gpt.norm gpt.readout",
        "gpt.layers.{} norm_attn norm_mlp alpha beta",
        "attn heads Q K V QKV O",
        "mlp.fc_in mlp.fc_out",
    ),
)


@dataclass(frozen=True)
class Spec:
    """A pre-norm GPT with LayerNorm and a table of positions, and how its author named it.

    `qkv` is one of separate, per_head, fused, and fused_conv1d, where every projection in a block is (in, out);
    `head` one of tied, untied, biased; `attention_scale` one of usual (head_width^-0.5), by_width (width^-0.5), one.
    A sinusoidal table is saved as `.pe`, (1, T, D).
    """

    vocab_size: int
    context_length: int
    heads: int
    head_width: int
    layers: int
    mlp_width: int
    naming: Naming
    qkv: str = "separate"
    qkv_bias: bool = True
    output_projection: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    head: str = "untied"
    activation: str = "gelu"
    attention_scale: str = "usual"
    positions: str = "learned"

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def score_scale(self) -> float:
        return {"usual": self.head_width**-0.5, "by_width": self.width**-0.5, "one": 1.0}[self.attention_scale]


def tensors_of(spec: Spec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(role, author's name, shape) of every tensor, in the order of the blocks."""
    words, width = spec.naming, spec.width

    def norm(role, name):
        yield f"{role}.gain", f"{name}.{words.gain}", (width,)
        if spec.norm_bias:
            yield f"{role}.shift", f"{name}.{words.shift}", (width,)

    def linear(role, name, outputs, inputs, bias):
        turned = spec.qkv == "fused_conv1d" and role != "head"
        yield f"{role}.weight", f"{name}.weight", (inputs, outputs) if turned else (outputs, inputs)
        if bias:
            yield f"{role}.bias", f"{name}.bias", (outputs,)

    yield "tokens", f"{words.tokens}.weight", (spec.vocab_size, width)
    table = (spec.context_length, width)
    if spec.positions == "sinusoidal":
        yield "positions", f"{words.positions.removesuffix('.weight')}.pe", (1, *table)
    else:
        yield "positions", words.positions, table if words.positions.endswith(".weight") else (1, *table)
    for n in range(spec.layers):
        role, block = f"blocks.{n}", words.block.format(n)
        attention = f"{block}.{words.attention}"
        parts = {"query": words.query, "key": words.key, "value": words.value}
        yield from norm(f"{role}.norm_1", f"{block}.{words.norm_1}")
        if spec.qkv.startswith("fused"):
            yield from linear(f"{role}.qkv", f"{attention}.{words.qkv}", 3 * width, width, spec.qkv_bias)
        elif spec.qkv == "separate":
            for part, name in parts.items():
                yield from linear(f"{role}.{part}", f"{attention}.{name}", width, width, spec.qkv_bias)
        else:
            for h in range(spec.heads):
                for part, name in parts.items():
                    one = f"{attention}.{words.heads}.{h}.{name}"
                    yield from linear(f"{role}.{part}.{h}", one, spec.head_width, width, spec.qkv_bias)
        if spec.output_projection:
            yield from linear(f"{role}.output", f"{attention}.{words.output}", width, width, spec.output_bias)
        yield from norm(f"{role}.norm_2", f"{block}.{words.norm_2}")
        yield from linear(f"{role}.up", f"{block}.{words.up}", spec.mlp_width, width, spec.mlp_bias)
        yield from linear(f"{role}.down", f"{block}.{words.down}", width, spec.mlp_width, spec.mlp_bias)
    yield from norm("final_norm", words.final_norm)
    yield from linear("head", words.head, spec.vocab_size, width, spec.head == "biased")


@dataclass
class FlatGPT:
    """A GPT that is a dict of tensors by role, computed from the definition with nothing but products and sums."""

    spec: Spec
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self.tensors[role] for role, name, _ in tensors_of(self.spec)}

    def double(self) -> "FlatGPT":
        return FlatGPT(self.spec, {role: tensor.double() for role, tensor in self.tensors.items()})

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, V), in the precision of the tensors."""
        spec, length = self.spec, ids.shape[1]
        x = self.tensors["tokens"][ids] + self.tensors["positions"].view(-1, spec.width)[:length]
        for n in range(spec.layers):
            x = x + self.attention(f"blocks.{n}", self.norm(f"blocks.{n}.norm_1", x))
            hidden = self.linear(f"blocks.{n}.up", self.norm(f"blocks.{n}.norm_2", x))
            x = x + self.linear(f"blocks.{n}.down", ACTIVATIONS[spec.activation](hidden))
        return self.linear("head", self.norm("final_norm", x))

    def attention(self, block: str, x: Tensor) -> Tensor:
        spec, length = self.spec, x.shape[1]
        if spec.qkv.startswith("fused"):
            query, key, value = self.linear(f"{block}.qkv", x).split(spec.width, dim=-1)
        else:
            query, key, value = (self.projection(f"{block}.{part}", x) for part in ("query", "key", "value"))
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = []
        for h in range(spec.heads):
            own = slice(h * spec.head_width, (h + 1) * spec.head_width)
            scores = torch.einsum("bqd,bkd->bqk", query[..., own], key[..., own]) * spec.score_scale
            scores = scores.masked_fill(future, -math.inf)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            mixed.append(weights / weights.sum(-1, keepdim=True) @ value[..., own])
        joined = torch.cat(mixed, dim=-1)
        return self.linear(f"{block}.output", joined) if spec.output_projection else joined

    def projection(self, role: str, x: Tensor) -> Tensor:
        if self.spec.qkv == "separate":
            return self.linear(role, x)
        return torch.cat([self.linear(f"{role}.{h}", x) for h in range(self.spec.heads)], dim=-1)

    def linear(self, role: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{role}.weight"]
        product = x @ (weight if self.spec.qkv == "fused_conv1d" and role != "head" else weight.T)
        return product + self.tensors[f"{role}.bias"] if f"{role}.bias" in self.tensors else product

    def norm(self, role: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.tensors[f"{role}.gain"]
        return scaled + self.tensors[f"{role}.shift"] if self.spec.norm_bias else scaled


def gpt_of(spec: Spec) -> FlatGPT:
    """Random float32 weights, the same for the same spec; gains lie around one and biases around zero."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for role, _, shape in tensors_of(spec):
        noise = torch.randn(shape, generator=generator)
        tensors[role] = noise * shape[-1] ** -0.5 if len(shape) > 1 else 0.3 * noise + role.endswith("gain")
    if spec.positions == "sinusoidal":
        tensors["positions"] = sinusoids(spec.context_length, spec.width).view(1, -1, spec.width)
    if spec.head == "tied":
        tensors["head.weight"] = tensors["tokens"]
    return FlatGPT(spec, tensors)


def sinusoids(context_length: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5; number by number, so that an odd width has its last sine."""
    angle = [[t / 10000 ** (i // 2 * 2 / width) for i in range(width)] for t in range(context_length)]
    return torch.tensor([[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angle])


@st.composite
def specs(draw) -> Spec:
    """Small ones, with the sizes that make two tensors look alike drawn as often as the others."""
    heads, head_width = draw(st.integers(1, 4)), draw(st.integers(4, 8))
    width, context_length = heads * head_width, draw(st.integers(2, 16))
    return Spec(
        vocab_size=draw(st.one_of(st.integers(2, 64), st.sampled_from([width, context_length]))),
        context_length=context_length,
        heads=heads,
        head_width=head_width,
        layers=draw(st.integers(1, 3)),
        mlp_width=draw(st.one_of(st.sampled_from([4, 3, 2, 1]).map(lambda times: times * width), st.integers(4, 64))),
        naming=draw(st.sampled_from(NAMINGS)),
        qkv=draw(st.sampled_from(["separate", "fused", "per_head", "fused_conv1d"])),
        qkv_bias=draw(st.booleans()),
        output_projection=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        head=draw(st.sampled_from(["tied", "untied", "biased"])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        attention_scale=draw(st.sampled_from(["usual", "by_width", "one"])),
        positions=draw(st.sampled_from(["learned", "sinusoidal"])),
    )


class PostNormBlock(NanoBlock):
    def forward(self, x):
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class ParallelBlock(NanoBlock):
    """GPT-J's: attention and MLP read the same norm."""

    def __init__(self, *sizes, bias):
        super().__init__(*sizes, bias)
        del self.ln_2

    def forward(self, x):
        h = self.ln_1(x)
        return x + self.attn(h) + self.mlp(h)


class SandwichBlock(NanoBlock):
    """Gemma 2's: a norm before each half and one behind it."""

    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__(n_embd, n_head, block_size, bias)
        self.ln_3, self.ln_4 = NanoLayerNorm(n_embd, bias), NanoLayerNorm(n_embd, bias)

    def forward(self, x):
        x = x + self.ln_2(self.attn(self.ln_1(x)))
        return x + self.ln_4(self.mlp(self.ln_3(x)))


class PositionsInBlock(NanoBlock):
    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__(n_embd, n_head, block_size, bias)
        self.pos_emb = nn.Embedding(block_size, n_embd)

    def forward(self, x):
        return super().forward(x + self.pos_emb(torch.arange(x.shape[1])))


class NonCausalAttention(NanoAttention):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.bias

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class QKNormAttention(NanoAttention):
    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__(n_embd, n_head, block_size, bias)
        self.q_norm, self.k_norm = nn.LayerNorm(n_embd // n_head), nn.LayerNorm(n_embd // n_head)

    def mix(self, q, k, v):
        return super().mix(self.q_norm(q), self.k_norm(k), v)


class AlibiAttention(NanoAttention):
    """Press et al. 2021: a head's slope times the distance is taken off its scores."""

    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__(n_embd, n_head, block_size, bias)
        self.register_buffer("slopes", 2.0 ** (-8 / n_head * torch.arange(1, n_head + 1)).view(n_head, 1, 1))

    def mix(self, q, k, v):
        length = q.size(2)
        distance = torch.arange(length).view(-1, 1) - torch.arange(length)
        scores = (-self.slopes * distance).to(q.dtype).masked_fill(distance < 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=scores)


class NoPositions(nn.Module):
    def forward(self, positions):
        return 0.0


def deviating(block: Callable[..., nn.Module], replaced: dict[str, nn.Module], **sizes: int) -> tuple[nn.Module, dict]:
    """nanoGPT in the `sizes` of `build`, with another kind of block or parts of its `transformer` replaced."""
    module, config = build("nanogpt", **sizes)
    shape = (config["n_embd"], config["n_head"], config["block_size"])
    blocks = nn.ModuleList([block(*shape, bias=True) for _ in range(config["n_layer"])])
    module.transformer.update({"h": blocks} | replaced)
    return randomise(module), config


# Variant: a builder that takes the sizes of `build` by their names.
REFUSED: dict[str, Callable[..., tuple[nn.Module, dict]]] = {
    "post_norm": partial(deviating, PostNormBlock, {}),
    "no_final_norm": partial(deviating, NanoBlock, {"ln_f": nn.Identity()}),
    "non_causal": partial(deviating, partial(NanoBlock, attention=NonCausalAttention), {}),
    "parallel": partial(deviating, ParallelBlock, {}),
    "alibi": partial(deviating, partial(NanoBlock, attention=AlibiAttention), {"wpe": NoPositions()}),
    "extra_layer_embedding": partial(deviating, PositionsInBlock, {}),
    "qk_norm": partial(deviating, partial(NanoBlock, attention=QKNormAttention), {}),
    "four_norms": partial(deviating, SandwichBlock, {}),
}
