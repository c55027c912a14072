"""Small GPTs of the four known layouts, each written and run the way its author does, with random weights."""

import math

import torch
import torch.nn.functional as F
from conftest import load_scratch_gpt
from torch import Tensor, nn

VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, HEADS, LAYERS = 61, 20, 24, 3, 2
VARIANTS = ("scratch", "per_head", "book", "book_qkv_bias", "nanogpt", "nanogpt_no_bias")


class PerHeadAttention(nn.Module):
    def __init__(self, width, head_width, context_length):
        super().__init__()
        self.q = nn.Linear(width, head_width)
        self.k = nn.Linear(width, head_width)
        self.v = nn.Linear(width, head_width)
        self.scale = head_width**-0.5
        self.register_buffer("mask", torch.tril(torch.ones(context_length, context_length)))

    def forward(self, x):
        length = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(1, 2) * self.scale
        scores = scores.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        return torch.softmax(scores, dim=-1) @ self.v(x)


class PerHeadMultiHeadAttention(nn.Module):
    def __init__(self, width, heads, context_length):
        super().__init__()
        self.heads = nn.ModuleList([PerHeadAttention(width, width // heads, context_length) for _ in range(heads)])
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(torch.cat([head(x) for head in self.heads], dim=-1))


class PerHeadFeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.layers(x)


class PerHeadBlock(nn.Module):
    def __init__(self, width, heads, context_length):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.mha = PerHeadMultiHeadAttention(width, heads, context_length)
        self.layer_norm2 = nn.LayerNorm(width)
        self.feed_forward = PerHeadFeedForward(width)

    def forward(self, x):
        x = x + self.mha(self.layer_norm1(x))
        return x + self.feed_forward(self.layer_norm2(x))


class PerHeadEmbeddings(nn.Module):
    def __init__(self, vocab_size, context_length, width):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embedding = nn.Embedding(context_length, width)

    def forward(self, ids):
        return self.token_embedding(ids) + self.pos_embedding(torch.arange(ids.shape[1]))


class PerHeadGPT(nn.Module):
    """The topic-ending models: one module for each head, exact GELU, an untied head with a bias."""

    def __init__(self, vocab_size, context_length, embedding_dim, num_heads, num_layers):
        super().__init__()
        self.embeddings = PerHeadEmbeddings(vocab_size, context_length, embedding_dim)
        self.blocks = nn.ModuleList([PerHeadBlock(embedding_dim, num_heads, context_length) for _ in range(num_layers)])
        self.layer_norm = nn.LayerNorm(embedding_dim)
        self.output_layer = nn.Linear(embedding_dim, vocab_size)

    def forward(self, ids):
        x = self.embeddings(ids)
        for block in self.blocks:
            x = block(x)
        return self.output_layer(self.layer_norm(x))


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


class BookFeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), BookGELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.layers(x)


class BookAttention(nn.Module):
    def __init__(self, width, context_length, heads, qkv_bias):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.W_query = nn.Linear(width, width, bias=qkv_bias)
        self.W_key = nn.Linear(width, width, bias=qkv_bias)
        self.W_value = nn.Linear(width, width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x):
        batch, length, width = x.shape
        queries = self.W_query(x).view(batch, length, self.heads, self.head_width).transpose(1, 2)
        keys = self.W_key(x).view(batch, length, self.heads, self.head_width).transpose(1, 2)
        values = self.W_value(x).view(batch, length, self.heads, self.head_width).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:length, :length], -torch.inf)
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        return self.out_proj((weights @ values).transpose(1, 2).contiguous().view(batch, length, width))


class BookBlock(nn.Module):
    def __init__(self, width, context_length, heads, qkv_bias):
        super().__init__()
        self.att = BookAttention(width, context_length, heads, qkv_bias)
        self.ff = BookFeedForward(width)
        self.norm1 = BookLayerNorm(width)
        self.norm2 = BookLayerNorm(width)

    def forward(self, x):
        x = self.att(self.norm1(x)) + x
        return self.ff(self.norm2(x)) + x


class BookGPT(nn.Module):
    """The book's GPTModel: tanh GELU, an untied head without a bias, q/k/v biases only with `qkv_bias`."""

    def __init__(self, vocab_size, context_length, emb_dim, n_heads, n_layers, qkv_bias):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, emb_dim)
        self.pos_emb = nn.Embedding(context_length, emb_dim)
        self.trf_blocks = nn.Sequential(
            *[BookBlock(emb_dim, context_length, n_heads, qkv_bias) for _ in range(n_layers)]
        )
        self.final_norm = BookLayerNorm(emb_dim)
        self.out_head = nn.Linear(emb_dim, vocab_size, bias=False)

    def forward(self, ids):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


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
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for part in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class NanoMLP(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size, bias):
        super().__init__()
        self.ln_1 = NanoLayerNorm(n_embd, bias)
        self.attn = NanoAttention(n_embd, n_head, block_size, bias)
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


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices keep the scale of their input; gains lie around one and biases around zero, none of them exact."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.dim() == 2:
            parameter.mul_(parameter.shape[1] ** -0.5)
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
    """One of `VARIANTS` and its config in its author's words."""
    if variant == "scratch":
        names = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        author, rest = load_scratch_gpt().ScratchGPT, {}
    elif variant == "per_head":
        names = ("vocab_size", "context_length", "embedding_dim", "num_heads", "num_layers")
        author, rest = PerHeadGPT, {}
    elif variant.startswith("book"):
        names = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        author, rest = BookGPT, {"qkv_bias": variant == "book_qkv_bias"}
    else:
        names = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer")
        author, rest = NanoGPT, {"bias": variant == "nanogpt"}
    config = dict(zip(names, (vocab_size, context_length, width, heads, layers), strict=True)) | rest
    return randomise(author(**config)), config


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict as it is when the causal masks are not saved."""
    masks = dict(module.named_buffers())
    return {name: tensor for name, tensor in module.state_dict().items() if name not in masks}


@torch.no_grad()
def own_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """What the author's own forward computes, in float64."""
    return module.double()(ids)
