"""Small hand-written GPTs of every known layout, with random weights.

Each has its author's names and arithmetic; authors whose classes differ in names alone share one that takes the names.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from conftest import load_scratch_gpt
from torch import Tensor, nn

from fledge.checkpoints.facts import Fact, Source
from fledge.checkpoints.loading import Checkpoint

VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, HEADS, LAYERS = 61, 20, 24, 3, 2
WAYS_TO_SAVE = ("bare", "model_state_dict", "model", "state_dict", "compiled", "ddp", "ddp_compiled")


class Parts(nn.Module):
    """What an author gives his module, under his names and registered in his order; `order` is how the parts run."""

    def __init__(self, order: str, **parts):
        super().__init__()
        self.order = order.split()
        for name, part in parts.items():
            setattr(self, name, part)

    def in_order(self) -> list:
        return [getattr(self, name) for name in self.order]


class GPT(Parts):
    """Tokens, positions (unless they are rotated in), blocks, a final norm, a head."""

    def forward(self, ids):
        tokens, *tables, blocks, norm, head = self.in_order()
        x = tokens(ids)
        for table in tables:
            x = x + (table if isinstance(table, nn.Parameter) else table.weight)[..., : ids.shape[1], :]
        for block in blocks:
            x = block(x)
        return head(norm(x))


def gpt(names, vocab_size, context_length, width, blocks, norm=nn.LayerNorm, tied=False, head_bias=False):
    """A GPT whose author registers its parts as they run; without positions, `names` has one name less."""
    tokens, *positions, layers, final_norm, head = names.split()
    parts = {tokens: nn.Embedding(vocab_size, width)}
    parts |= {name: nn.Embedding(context_length, width) for name in positions}
    parts |= {layers: nn.ModuleList(blocks), final_norm: norm(width)}
    parts[head] = nn.Linear(width, vocab_size, bias=head_bias)
    if tied:
        parts[head].weight = parts[tokens].weight
    return GPT(names, **parts)


class Block(Parts):
    """Pre-norm: x + attention(norm(x)), then the same around the MLP."""

    def forward(self, x):
        norm_1, attention, norm_2, feed_forward = self.in_order()
        x = x + attention(norm_1(x))
        return x + feed_forward(norm_2(x))


class FeedForward(Parts):
    def forward(self, x):
        (layers,) = self.in_order()
        return layers(x)


class SwiGLU(Parts):
    def forward(self, x):
        gate, up, down = self.in_order()
        return down(F.silu(gate(x)) * up(x))


def mlp(width, hidden, activation):
    return nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))


def linears(names, inputs, outputs, bias=True):
    return {name: nn.Linear(inputs, outputs, bias=bias) for name in names.split()}


def norms(names, width, kind=nn.LayerNorm):
    return {name: kind(width) for name in names.split()}


def lower_triangle(*shape):
    return torch.tril(torch.ones(*shape))


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query, key, value, mask, scale=None):
    """(B, heads, T, head width) each → (B, T, D). Masks mark what is seen or what is hidden: a position sees itself."""
    length = query.shape[2]
    seen = mask[..., :length, :length] == mask[..., :1, :1]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


class SeparateAttention(Parts):
    def forward(self, x):
        *projections, output, mask = self.in_order()
        return output(attend(*(split_heads(layer(x), self.heads) for layer in projections), mask))


class FusedAttention(Parts):
    def forward(self, x):
        qkv, output, *masks = self.in_order()
        mask = masks[0] if masks else lower_triangle(x.shape[1], x.shape[1])
        return output(attend(*(split_heads(part, self.heads) for part in qkv(x).chunk(3, dim=-1)), mask))


class Head(Parts):
    """One head with projections and a mask of its own."""

    def forward(self, x):
        *projections, mask = self.in_order()
        return attend(*(layer(x).unsqueeze(1) for layer in projections), mask, self.scale)


class Heads(Parts):
    """Heads side by side, and an output projection unless the author has none."""

    def forward(self, x):
        heads, *output = self.in_order()
        mixed = torch.cat([head(x) for head in heads], dim=-1)
        return output[0](mixed) if output else mixed


class PerHeadEmbeddings(nn.Module):
    def __init__(self, vocab_size, context_length, width):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embedding = nn.Embedding(context_length, width)

    def forward(self, ids):
        return self.token_embedding(ids) + self.pos_embedding(torch.arange(ids.shape[1]))


def per_head(vocab_size, context_length, embedding_dim, num_heads, num_layers):
    """The topic-ending models: biases everywhere, the untied head's too; exact GELU."""
    width, head_width = embedding_dim, embedding_dim // num_heads

    def head():
        mask = nn.Buffer(lower_triangle(context_length, context_length))
        return Head("q k v mask", scale=head_width**-0.5, mask=mask, **linears("q k v", width, head_width))

    def block():
        heads = nn.ModuleList([head() for _ in range(num_heads)])
        return Block(
            "layer_norm1 mha layer_norm2 feed_forward",
            layer_norm1=nn.LayerNorm(width),
            mha=Heads("heads out_proj", heads=heads, **linears("out_proj", width, width)),
            layer_norm2=nn.LayerNorm(width),
            feed_forward=FeedForward("layers", layers=mlp(width, 4 * width, nn.GELU())),
        )

    blocks = [block() for _ in range(num_layers)]
    model = gpt("embeddings blocks layer_norm output_layer", vocab_size, None, width, blocks, head_bias=True)
    model.embeddings = PerHeadEmbeddings(vocab_size, context_length, width)
    return model


class BookLayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + self.eps) + self.shift


class BookGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def book(vocab_size, context_length, emb_dim, n_heads, n_layers, qkv_bias):
    """The book's GPTModel: tanh GELU, an untied head without a bias, q/k/v biases only with `qkv_bias`."""

    def block():
        attention = SeparateAttention(
            "W_query W_key W_value out_proj mask",
            heads=n_heads,
            **linears("W_query W_key W_value", emb_dim, emb_dim, qkv_bias),
            **linears("out_proj", emb_dim, emb_dim),
            mask=nn.Buffer(torch.triu(torch.ones(context_length, context_length), diagonal=1)),
        )
        ff = FeedForward("layers", layers=mlp(emb_dim, 4 * emb_dim, BookGELU()))
        return Block("norm1 att norm2 ff", att=attention, ff=ff, **norms("norm1 norm2", emb_dim, BookLayerNorm))

    names, blocks = "tok_emb pos_emb trf_blocks final_norm out_head", [block() for _ in range(n_layers)]
    return gpt(names, vocab_size, context_length, emb_dim, blocks, norm=BookLayerNorm)


def book_fast(vocab_size, context_length, emb_dim, n_heads, n_layers, qkv_bias):
    """The book's faster training script: PyTorch's own LayerNorm and GELU, q/k/v in one projection, no mask saved."""

    def block():
        qkv = linears("qkv", emb_dim, 3 * emb_dim, qkv_bias)
        attention = FusedAttention("qkv proj", heads=n_heads, **qkv, **linears("proj", emb_dim, emb_dim))
        ff = FeedForward("layers", layers=mlp(emb_dim, 4 * emb_dim, nn.GELU(approximate="tanh")))
        return Block("norm1 att norm2 ff", att=attention, ff=ff, **norms("norm1 norm2", emb_dim))

    names, blocks = "tok_emb pos_emb trf_blocks final_norm out_head", [block() for _ in range(n_layers)]
    return gpt(names, vocab_size, context_length, emb_dim, blocks)


class NanoLayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__()
        self.n_head, self.n_embd = n_head, n_embd
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.register_buffer("bias", lower_triangle(1, 1, block_size, block_size))

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for part in (q, k, v))
        return self.c_proj(self.mix(q, k, v).transpose(1, 2).contiguous().view(batch, length, width))

    def mix(self, q, k, v):
        length = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


class NanoMLP(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size, bias, attention=NanoAttention):
        super().__init__()
        self.ln_1 = NanoLayerNorm(n_embd, bias)
        self.attn = attention(n_embd, n_head, block_size, bias)
        self.ln_2 = NanoLayerNorm(n_embd, bias)
        self.mlp = NanoMLP(n_embd, bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT: a fused c_attn, exact GELU, a tied head, and no bias anywhere with `bias=False`."""

    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer, bias):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList([NanoBlock(n_embd, n_head, block_size, bias) for _ in range(n_layer)]),
                "ln_f": NanoLayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def build_nanogpt(**config):
    """The lecture that rebuilds GPT-2: nanoGPT with biases and the tanh GELU."""
    model = NanoGPT(**config, bias=True)
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    return model


class Conv1D(nn.Module):
    """transformers' projection: the weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def hf_gpt2_like(vocab_size, n_positions, n_embd, n_head, n_layer):
    """transformers' GPT-2 rewritten by hand: Conv1D in the blocks, tanh GELU, a tied head."""
    blocks = nn.ModuleList([NanoBlock(n_embd, n_head, n_positions, bias=True) for _ in range(n_layer)])
    for block in blocks:
        block.attn.c_attn, block.attn.c_proj = Conv1D(n_embd, 3 * n_embd), Conv1D(n_embd, n_embd)
        block.mlp.c_fc, block.mlp.c_proj = Conv1D(n_embd, 4 * n_embd), Conv1D(4 * n_embd, n_embd)
        block.mlp.gelu = nn.GELU(approximate="tanh")
    return gpt("wte wpe h ln_f lm_head", vocab_size, n_positions, n_embd, blocks, tied=True)


def mingpt(vocab_size, block_size, n_embd, n_head, n_layer):
    """minGPT of 2020: positions as a parameter, key before query, exact GELU, an untied head without a bias."""

    def block():
        attention = SeparateAttention(
            "query key value proj mask",
            heads=n_head,
            **linears("key query value proj", n_embd, n_embd),
            mask=nn.Buffer(lower_triangle(1, 1, block_size, block_size)),
        )
        feed_forward = mlp(n_embd, 4 * n_embd, nn.GELU())
        return Block("ln1 attn ln2 mlp", **norms("ln1 ln2", n_embd), attn=attention, mlp=feed_forward)

    blocks = [block() for _ in range(n_layer)]
    model = gpt("tok_emb pos_emb blocks ln_f head", vocab_size, block_size, n_embd, blocks)
    model.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
    return model


def lecture(vocab_size, block_size, n_embd, n_head, n_layer, scale_by_width=False, output_projection=True):
    """The lecture's gpt.py: heads one by one without biases, ReLU, an untied head with a bias.

    Its first version divided the scores by the root of n_embd (`scale_by_width`) where the last one takes the head's.
    """
    head_width = n_embd // n_head
    scale = (n_embd if scale_by_width else head_width) ** -0.5

    def head():
        tril = nn.Buffer(lower_triangle(block_size, block_size))
        projections = linears("key query value", n_embd, head_width, False)
        return Head("query key value tril", scale=scale, tril=tril, **projections)

    def block():
        output = linears("proj", n_embd, n_embd) if output_projection else {}
        sa = Heads(" ".join(["heads", *output]), heads=nn.ModuleList([head() for _ in range(n_head)]), **output)
        ffwd = FeedForward("net", net=mlp(n_embd, 4 * n_embd, nn.ReLU()))
        return Block("ln1 sa ln2 ffwd", sa=sa, ffwd=ffwd, **norms("ln1 ln2", n_embd))

    names = "token_embedding_table position_embedding_table blocks ln_f lm_head"
    blocks = [block() for _ in range(n_layer)]
    return gpt(names, vocab_size, block_size, n_embd, blocks, head_bias=True)


def student(vocab_size, ctx, d_model, n_heads, n_layers):
    """A student's model: attention fused and without biases, an MLP of twice the width, exact GELU, a tied head."""

    def block():
        attention = FusedAttention(
            "qkv proj mask",
            heads=n_heads,
            mask=nn.Buffer(lower_triangle(ctx, ctx)),
            **linears("qkv", d_model, 3 * d_model, False),
            **linears("proj", d_model, d_model, False),
        )
        ffn = mlp(d_model, 2 * d_model, nn.GELU())
        return Block("ln1 attn ln2 ffn", **norms("ln1", d_model), attn=attention, **norms("ln2", d_model), ffn=ffn)

    blocks = [block() for _ in range(n_layers)]
    return gpt("tok_emb pos_emb blocks ln_f head", vocab_size, ctx, d_model, blocks, tied=True)


def rotation(length, head_width):
    """RoPE's (T, head width / 2) cosines and sines, θ = 10000; in float32, as every author's table is."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_width, 2).float() / head_width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate_interleaved(x):
    """Each pair (2i, 2i + 1) as a complex number."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(*rotation(x.shape[-2], x.shape[-1]))).flatten(-2)


def rotate_half_split(x):
    """Each pair (i, i + head width / 2)."""
    cosines, sines = (torch.cat([table, table], dim=-1) for table in rotation(x.shape[-2], x.shape[-1]))
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class RotaryAttention(Parts):
    """Rotated queries and keys, no biases; several query heads may share one of `kv_heads`."""

    def __init__(self, order, width, heads, kv_heads, rotate):
        query, key, value, output = order.split()
        kv = linears(f"{key} {value}", width, width // heads * kv_heads, False)
        super().__init__(order, **linears(query, width, width, False), **kv, **linears(output, width, width, False))
        self.heads, self.kv_heads, self.rotate = heads, kv_heads, rotate

    def forward(self, x):
        wq, wk, wv, wo = self.in_order()
        query = self.rotate(split_heads(wq(x), self.heads))
        key, value = self.rotate(split_heads(wk(x), self.kv_heads)), split_heads(wv(x), self.kv_heads)
        return wo(attend(query, key, value, lower_triangle(x.shape[1], x.shape[1])))


def story_chat(vocab_size, max_seq_len, dim, n_heads, n_layers):
    """StableLM-like: interleaved RoPE, SwiGLU four times as wide, LayerNorm with a bias, a tied head.

    The table of rotations and the mask are saved beside the weights; attention computes the same numbers itself.
    """

    def block():
        attention = RotaryAttention("wq wk wv wo", dim, n_heads, n_heads, rotate_interleaved)
        ln_1, ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        return Block("ln_1 attn ln_2 mlp", ln_1=ln_1, attn=attention, ln_2=ln_2, mlp=llama_mlp(dim, 4 * dim))

    blocks = [block() for _ in range(n_layers)]
    model = gpt("tok_emb blocks ln_f head", vocab_size, None, dim, blocks, tied=True)
    model.freqs_cis = nn.Buffer(torch.complex(*rotation(max_seq_len, dim // n_heads)))
    model.mask = nn.Buffer(lower_triangle(max_seq_len, max_seq_len))
    return model


def llama_mlp(dim, hidden):
    w1, w2, w3 = (nn.Linear(*sizes, bias=False) for sizes in ((dim, hidden), (hidden, dim), (dim, hidden)))
    return SwiGLU("w1 w3 w2", w1=w1, w2=w2, w3=w3)


RMSNorm = partial(nn.RMSNorm, eps=1e-5)


def llama2c(vocab_size, max_seq_len, dim, n_heads, n_layers, n_kv_heads, multiple_of):
    """llama2.c's model.py: RMSNorm, interleaved RoPE, fewer key and value heads if wished, a tied head, no bias."""
    hidden = multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of)

    def block():
        return Block(
            "attention_norm attention ffn_norm feed_forward",
            attention=RotaryAttention("wq wk wv wo", dim, n_heads, n_kv_heads, rotate_interleaved),
            feed_forward=llama_mlp(dim, hidden),
            **norms("attention_norm ffn_norm", dim, RMSNorm),
        )

    names, blocks = "tok_embeddings layers norm output", [block() for _ in range(n_layers)]
    return gpt(names, vocab_size, None, dim, blocks, norm=RMSNorm, tied=True)


def llama_half(vocab_size, max_position_embeddings, hidden_size, num_attention_heads, num_hidden_layers, rms_norm_eps):
    """transformers' Llama rewritten by hand: half-split RoPE, RMSNorm, SwiGLU, an untied head, no bias."""
    width, heads, norm = hidden_size, num_attention_heads, partial(nn.RMSNorm, eps=rms_norm_eps)

    def block():
        gate_and_up = linears("gate_proj up_proj", width, 3 * width, False)
        down = linears("down_proj", 3 * width, width, False)
        return Block(
            "input_layernorm self_attn post_attention_layernorm mlp",
            self_attn=RotaryAttention("q_proj k_proj v_proj o_proj", width, heads, heads, rotate_half_split),
            mlp=SwiGLU("gate_proj up_proj down_proj", **gate_and_up, **down),
            **norms("input_layernorm post_attention_layernorm", width, norm),
        )

    blocks = [block() for _ in range(num_hidden_layers)]
    return gpt("embed_tokens layers norm lm_head", vocab_size, None, width, blocks, norm=norm)


def hide_the_future(length):
    return torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)


class CausalEncoderLayer(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x, src_mask=hide_the_future(x.shape[1]), is_causal=True)


def torch_layers(vocab_size, max_len, d_model, nhead, num_layers):
    """PyTorch's own encoder layers, pre-norm and masked: biases everywhere but on the untied head, exact GELU."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    blocks = [CausalEncoderLayer(d_model, nhead, 4 * d_model, **options) for _ in range(num_layers)]
    return gpt("token_embedding position_embedding layers ln_f head", vocab_size, max_len, d_model, blocks)


class CausalMultiheadAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, attn_mask=hide_the_future(x.shape[1]), need_weights=False)[0]


def mha(vocab_size, block_size, n_embd, n_head, n_layer):
    """PyTorch's own attention in a pre-norm block: exact GELU, an untied head without a bias."""

    def block():
        attention = CausalMultiheadAttention(n_embd, n_head, batch_first=True)
        ln_1, ln_2, feed_forward = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd), mlp(n_embd, 4 * n_embd, nn.GELU())
        return Block("ln_1 attn ln_2 mlp", ln_1=ln_1, attn=attention, ln_2=ln_2, mlp=feed_forward)

    blocks = [block() for _ in range(n_layer)]
    return gpt("token_emb pos_emb blocks ln_f head", vocab_size, block_size, n_embd, blocks)


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)
        frequencies = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * frequencies)
        pe[0, :, 1::2] = torch.cos(position * frequencies)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[:, : x.shape[1]]


class SinusoidalGPT(nn.Module):
    """PyTorch's language-model tutorial made pre-norm: a fixed table, ReLU, an untied head with a bias.

    The tutorial multiplies the embeddings by the root of d_model (`scaled`).
    """

    def __init__(self, vocab_size, max_len, d_model, nhead, num_layers, scaled=False):
        super().__init__()
        self.scale = math.sqrt(d_model) if scaled else 1.0
        self.pos_encoder = PositionalEncoding(d_model, max_len)
        layer = nn.TransformerEncoderLayer(d_model, nhead, 4 * d_model, 0.0, batch_first=True, norm_first=True)
        self.transformer_encoder = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.linear = nn.Linear(d_model, vocab_size)

    def forward(self, ids):
        x = self.pos_encoder(self.embedding(ids) * self.scale)
        return self.linear(self.transformer_encoder(x, mask=hide_the_future(ids.shape[1]), is_causal=True))


def scratch(**config):
    return load_scratch_gpt().ScratchGPT(**config)


BOOK_CONFIG = "vocab_size context_length emb_dim n_heads n_layers"
NANO_CONFIG = "vocab_size block_size n_embd n_head n_layer"
TORCH_CONFIG = "vocab_size max_len d_model nhead num_layers"
LLAMA_CONFIG = "vocab_size max_seq_len dim n_heads n_layers"
HF_LLAMA_CONFIG = "vocab_size max_position_embeddings hidden_size num_attention_heads num_hidden_layers"
# Variant: its author's model, his words for the five sizes, and what else his config says.
AUTHORS = {
    "scratch": (scratch, BOOK_CONFIG, {}),
    "per_head": (per_head, "vocab_size context_length embedding_dim num_heads num_layers", {}),
    "book": (book, BOOK_CONFIG, {"qkv_bias": False}),
    "book_qkv_bias": (book, BOOK_CONFIG, {"qkv_bias": True}),
    "book_fast": (book_fast, BOOK_CONFIG, {"qkv_bias": False}),
    "nanogpt": (NanoGPT, NANO_CONFIG, {"bias": True}),
    "nanogpt_no_bias": (NanoGPT, NANO_CONFIG, {"bias": False}),
    "build_nanogpt": (build_nanogpt, NANO_CONFIG, {}),
    "hf_gpt2_like": (hf_gpt2_like, "vocab_size n_positions n_embd n_head n_layer", {}),
    "mingpt": (mingpt, NANO_CONFIG, {}),
    "lecture": (lecture, NANO_CONFIG, {}),
    "lecture_old_scale": (partial(lecture, scale_by_width=True), NANO_CONFIG, {}),
    "no_output_projection": (partial(lecture, output_projection=False), NANO_CONFIG, {}),
    "student": (student, "vocab_size ctx d_model n_heads n_layers", {}),
    "torch_layers": (torch_layers, TORCH_CONFIG, {}),
    "mha": (mha, NANO_CONFIG, {}),
    "sinusoidal": (SinusoidalGPT, TORCH_CONFIG, {}),
    "sinusoidal_scaled": (partial(SinusoidalGPT, scaled=True), TORCH_CONFIG, {}),
    "story_chat": (story_chat, LLAMA_CONFIG, {}),
    "llama2c": (llama2c, LLAMA_CONFIG, {"multiple_of": 32}),
    "llama2c_gqa": (llama2c, LLAMA_CONFIG, {"multiple_of": 32}),
    "llama_half": (llama_half, HF_LLAMA_CONFIG, {"rms_norm_eps": 1e-5}),
}
VARIANTS = tuple(AUTHORS)
# What an author computes that neither his tensors nor what is known of his layout say.
HIDDEN = {
    "build_nanogpt": {"activation": "gelu_tanh"},
    "lecture_old_scale": {"attention_scale": WIDTH**-0.5},
    "torch_layers": {"activation": "gelu", "norm_placement": "pre"},
    "sinusoidal": {"norm_placement": "pre"},
    "sinusoidal_scaled": {"norm_placement": "pre", "embedding_scale": WIDTH**0.5},
}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices keep the scale of their input; gains lie around one and biases around zero, none of them exact."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.dim() >= 2:
            parameter.mul_(parameter.shape[-1] ** -0.5)
        else:
            parameter.mul_(0.3).add_(0 if name.endswith(("bias", "shift")) else 1)
    return module.eval()


def build(
    variant: str,
    vocab_size: int = VOCAB_SIZE,
    context_length: int = CONTEXT_LENGTH,
    width: int = WIDTH,
    heads: int = HEADS,
    layers: int = LAYERS,
) -> tuple[nn.Module, dict]:
    """One of `VARIANTS` and its config in its author's words. `llama2c_gqa` has half as many key and value heads."""
    author, names, rest = AUTHORS[variant]
    config = dict(zip(names.split(), (vocab_size, context_length, width, heads, layers), strict=True)) | rest
    if author is llama2c:
        config["n_kv_heads"] = heads // 2 if variant == "llama2c_gqa" else heads
    return randomise(author(**config)), config


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict as it is when the causal masks are not saved; a fixed table of positions is a weight."""
    left_out = {name for name, _ in module.named_buffers() if name != "pos_encoder.pe"}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}


def saved(module: nn.Module, config: dict, how: str) -> dict:
    """What its author gives to `torch.save` in one of the `WAYS_TO_SAVE`; the module stays as it is."""
    state, run = module.state_dict(), {"dataset": "stories", "learning_rate": 1e-3, "compile": True}
    if how == "bare":
        return state
    if how == "model_state_dict":
        return {"epoch": 3, how: state, "optimizer_state_dict": optimizer_state(module), "config": config}
    if how == "model":
        progress = {"model_args": config, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": run | config}
        return {how: state, "optimizer": optimizer_state(module)} | progress
    if how == "state_dict":
        return {
            "epoch": 3,
            "global_step": 700,
            "pytorch-lightning_version": "2.5.0",
            how: {f"model.{name}": tensor for name, tensor in state.items()},
            "optimizer_states": [optimizer_state(module)],
            "lr_schedulers": [],
            "hyper_parameters": config,
        }
    prefix = {"compiled": "_orig_mod.", "ddp": "module.", "ddp_compiled": "module._orig_mod."}[how]
    return {"model_state_dict": {prefix + name: tensor for name, tensor in state.items()}, "config": config}


def optimizer_state(module: nn.Module) -> dict:
    """AdamW's after one step, made on a copy. Its tokens differ: equal ones leave rotated queries no gradient."""
    trained = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.arange(4)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@torch.no_grad()
def own_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """What the author's own forward computes, in float64."""
    return module.double()(ids)


def checkpoint_of(module: nn.Module, config: dict) -> Checkpoint:
    """What is loaded of a module whose author saved `config` beside it."""
    weights = weights_of(module)
    left_out = {name: "a buffer" for name in module.state_dict() if name not in weights}
    return Checkpoint(weights, config, left_out, source={})


def stated(**facts: object) -> dict[str, Fact]:
    """Facts as flags state them."""
    return {name: Fact.of(name, value, Source.FLAG) for name, value in facts.items()}
