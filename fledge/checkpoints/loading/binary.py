"""The `.bin` files that llama2.c and llm.c read → tensors under the names of the PyTorch models that wrote them.

Both formats have a header of little-endian int32, followed by the numbers: each kind of tensor for all layers, then the
next kind. The numbers are memory-mapped, copy on write, and not copied here.
"""

import struct
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fledge.errors import UserError

LLAMA2_C = 0x616B3432
LLM_C = 20240326
LLM_C_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float32, 5: torch.bfloat16}

# A name and its shape; a name with {n} stands for that tensor of every layer.
Parts = list[tuple[str, tuple[int, ...]]]


def is_binary(file: Path) -> bool:
    """Whether `file` starts like a `.bin` of llama2.c or llm.c.

    llama2.c's first format has no magic number, so its header must make sense and give exactly the file's size.
    """
    header = _header(file)
    return header[:1] in ((LLAMA2_C,), (LLM_C,)) or _is_first_llama2_c(file, header)


def read_binary(file: Path) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str]]:
    """Reads the tensors, the config under the author's names, and what was left out and why.

    Sources: karpathy/llama2.c, export.py (`legacy_export`, `version1_export`) and model.py; karpathy/llm.c,
    train_gpt2.py (`write_model`) and dev/eval/export_hf.py.

    Raises:
        UserError: int8 weights, an unknown version, or a size that is not what the header asks for.
    """
    header = _header(file)
    if header[0] == LLM_C:
        return _read_llm_c(file, header)
    if header[0] == LLAMA2_C:
        return _read_llama2_c(file, header)
    return _take(file, 28, torch.float32, _first_llama2_c_parts(header), header[2]), _llama2_c_config(header), {}


def _header(file: Path) -> tuple[int, ...]:
    with file.open("rb") as opened:
        content = opened.read(40)
    return struct.unpack("<10i", content) if len(content) == 40 else ()


def _is_first_llama2_c(file: Path, header: tuple[int, ...]) -> bool:
    return _is_llama(header) and file.stat().st_size == 28 + 4 * _count(_first_llama2_c_parts(header), header[2])


def _is_llama(header: tuple[int, ...]) -> bool:
    if not header or min(header[:5]) < 1 or header[5] == 0 or header[6] < 1:
        return False
    dim, _, _, n_heads, n_kv_heads = header[:5]
    return dim % (2 * n_heads) == 0 and n_heads % n_kv_heads == 0


def _llama2_c_config(header: tuple[int, ...]) -> dict[str, object]:
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    return {**dict(zip(names, header[:7], strict=True)), "vocab_size": abs(header[5])}


def _llama2_c_parts(header: tuple[int, ...]) -> dict[str, Parts]:
    dim, hidden_dim, _, n_heads, n_kv_heads, vocab_size = header[:6]
    kv_dim = dim * n_kv_heads // n_heads
    return {
        "embedding": [("tok_embeddings.weight", (abs(vocab_size), dim))],
        "attention_norm": [("layers.{n}.attention_norm.weight", (dim,))],
        "attention": [
            ("layers.{n}.attention.wq.weight", (dim, dim)),
            ("layers.{n}.attention.wk.weight", (kv_dim, dim)),
            ("layers.{n}.attention.wv.weight", (kv_dim, dim)),
            ("layers.{n}.attention.wo.weight", (dim, dim)),
        ],
        "ffn_norm": [("layers.{n}.ffn_norm.weight", (dim,))],
        "feed_forward": [
            ("layers.{n}.feed_forward.w1.weight", (hidden_dim, dim)),
            ("layers.{n}.feed_forward.w2.weight", (dim, hidden_dim)),
            ("layers.{n}.feed_forward.w3.weight", (hidden_dim, dim)),
        ],
        "norm": [("norm.weight", (dim,))],
        "output": [("output.weight", (abs(vocab_size), dim))],
    }


def _first_llama2_c_parts(header: tuple[int, ...]) -> Parts:
    parts = _llama2_c_parts(header)
    dim, n_heads, vocab_size, max_seq_len = header[0], header[3], header[5], header[6]
    rotary = (max_seq_len, dim // n_heads // 2)
    return [
        *parts["embedding"],
        *parts["attention_norm"],
        *parts["attention"],
        *parts["ffn_norm"],
        *parts["feed_forward"],
        *parts["norm"],
        ("freqs_cos", rotary),
        ("freqs_sin", rotary),
        # A negative vocabulary size says that the head has weights of its own.
        *(parts["output"] if vocab_size < 0 else []),
    ]


def _read_llama2_c(file: Path, header: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str]]:
    version, header, tied = header[1], header[2:], header[9] & 0xFF
    if version == 2:
        raise UserError(
            f"{file} is llama2.c's export of version 2, whose weights are rounded to int8; convert the checkpoint that "
            "it was exported from, or export that with --version 1."
        )
    if version != 1 or not _is_llama(header) or header[5] < 0:
        raise UserError(
            f"{file} is a llama2.c export that makes no sense (version {version}, header {header[:7]}); "
            "export it again with --version 1."
        )
    parts = _llama2_c_parts(header)
    order = ["attention_norm", "ffn_norm", "norm", "embedding", "attention", "feed_forward"]
    ordered = [part for kind in [*order, *([] if tied else ["output"])] for part in parts[kind]]
    return _take(file, 256, torch.float32, ordered, header[2]), _llama2_c_config(header), {}


def _read_llm_c(file: Path, header: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str]]:
    version, block_size, vocab_size, n_layer, n_head, n_embd, padded = header[1:8]
    if version not in LLM_C_DTYPES:
        raise UserError(
            f"{file} is an llm.c checkpoint of version {version}; Fledge reads versions "
            f"{', '.join(map(str, LLM_C_DTYPES))}, so write it again with llm.c's train_gpt2."
        )
    padded = padded or vocab_size
    if min(block_size, vocab_size, n_layer, n_head, n_embd) < 1 or padded < vocab_size or n_embd % n_head:
        raise UserError(
            f"{file} is an llm.c checkpoint that makes no sense (version {version}, header {header[2:8]}); "
            "write it again."
        )
    block, width = "transformer.h.{n}", n_embd
    parts = [
        ("transformer.wte.weight", (padded, width)),
        ("transformer.wpe.weight", (block_size, width)),
        (f"{block}.ln_1.weight", (width,)),
        (f"{block}.ln_1.bias", (width,)),
        (f"{block}.attn.c_attn.weight", (3 * width, width)),
        (f"{block}.attn.c_attn.bias", (3 * width,)),
        (f"{block}.attn.c_proj.weight", (width, width)),
        (f"{block}.attn.c_proj.bias", (width,)),
        (f"{block}.ln_2.weight", (width,)),
        (f"{block}.ln_2.bias", (width,)),
        (f"{block}.mlp.c_fc.weight", (4 * width, width)),
        (f"{block}.mlp.c_fc.bias", (4 * width,)),
        (f"{block}.mlp.c_proj.weight", (width, 4 * width)),
        (f"{block}.mlp.c_proj.bias", (width,)),
        ("transformer.ln_f.weight", (width,)),
        ("transformer.ln_f.bias", (width,)),
    ]
    tensors = _take(file, 1024, LLM_C_DTYPES[version], parts, n_layer)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:vocab_size]
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    config = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "block_size": block_size,
        "vocab_size": vocab_size,
        # llm.c knows no other activation, and nanoGPT, whose names these are, uses the exact GELU.
        "activation": "gelu_tanh",
    }
    rows = padded - vocab_size
    return tensors, config, {f"transformer.wte.weight[{vocab_size}:]": f"{rows} rows of padding"} if rows else {}


def _count(parts: Parts, n_layers: int) -> int:
    return sum(prod(shape) * (n_layers if "{n}" in name else 1) for name, shape in parts)


def _take(file: Path, offset: int, dtype: torch.dtype, parts: Parts, n_layers: int) -> dict[str, Tensor]:
    size, expected = file.stat().st_size, offset + dtype.itemsize * _count(parts, n_layers)
    if size != expected:
        raise UserError(
            f"{file} has {size:,} bytes and its header asks for {expected:,}: it is cut off, damaged, or of a version "
            "that Fledge does not know; write it again."
        )
    numbers = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[offset:].view(dtype)
    tensors, at = {}, 0
    for name, shape in parts:
        for n in range(n_layers if "{n}" in name else 1):
            tensors[name.format(n=n)] = numbers[at : at + prod(shape)].view(shape)
            at += prod(shape)
    return tensors
