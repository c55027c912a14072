"""Bits per byte of language models on the same text, whatever their tokenizers.

    python benchmarks/bits_per_byte.py --text valid.txt --models runs/quickstart/base stories15M/

Each document between `<|endoftext|>` lines is scored by itself after a beginning-of-text token: −log2 of its
probability over its UTF-8 bytes. A document longer than the context is read in windows that overlap by half, so each
token but the first few sees at least half a context. A model is a Hugging Face folder, or one with llama2.c's
`stories15M.bin` and `tokenizer.bin`.
"""

import argparse
import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"


def read_llama2c(folder: Path) -> tuple[LlamaForCausalLM, int, Tokenizer]:
    """llama2.c's formats (karpathy/llama2.c, export.py version 0 and tokenizer.py): model, context, tokenizer."""
    content = next(folder.glob("stories*.bin")).read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", content[:28])
    floats, at = np.frombuffer(content, np.float32, offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        piece, at = floats[at : at + math.prod(shape)], at + math.prod(shape)
        return torch.from_numpy(piece.copy()).view(*shape)

    def half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
        # llama2.c rotates neighbouring pairs, transformers the two halves of a head.
        return weight.view(n_heads, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    kv_dim, head = dim * kv_heads // heads, dim // heads
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    kinds = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    for kind, shape in kinds:
        for n, weight in enumerate(take(layers, *shape)):
            turned = kind.endswith(("q_proj", "k_proj"))
            tensors[f"model.layers.{n}.{kind}.weight"] = half_split(weight, shape[0] // head) if turned else weight
    tensors["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval(), 1, read_llama2c_tokenizer(folder / "tokenizer.bin", vocab)


def read_llama2c_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    content, at, pieces = file.read_bytes(), 4, []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("fi", content, at)
        pieces.append((content[at + 8 : at + 8 + length].decode("utf-8"), score))
        at += 8 + length
    vocab = {piece.replace(" ", "▁"): i for i, (piece, _) in enumerate(pieces)}
    for i in range(3, 259):  # llama2.c shows control characters as themselves; SentencePiece calls the bytes <0xNN>
        vocab = {piece: j for piece, j in vocab.items() if j != i} | {f"<0x{i - 3:02X}>": i}
    ranked = sorted((i for i in range(259, vocab_size)), key=lambda i: -pieces[i][1])
    merges = []
    for i in ranked:
        piece = pieces[i][0].replace(" ", "▁")
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(
            (s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]])
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def load(folder: Path):
    if (folder / "tokenizer.bin").exists():
        return read_llama2c(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer.bos_token_id, tokenizer.backend_tokenizer


@torch.no_grad()
def bits_per_byte(model, begin: int, tokenizer: Tokenizer, documents: list[str]) -> tuple[float, float]:
    """Bits per byte and bytes per token over `documents`."""
    context, nats, tokens = model.config.max_position_embeddings, 0.0, 0
    for document in documents:
        encoded = tokenizer.encode(document, add_special_tokens=False).ids
        assert tokenizer.decode(encoded) == document, "the tokenizer does not give this text back"
        ids, scored = torch.tensor([begin, *encoded]), 1
        tokens += len(encoded)
        while scored < len(ids):
            start = 0 if scored == 1 else scored - context // 2
            window = ids[start : start + context + 1]
            logits = model(input_ids=window[None, :-1]).logits[0]
            nats += F.cross_entropy(logits[scored - start - 1 :], window[scored - start :], reduction="sum").item()
            scored = start + len(window)
    size = sum(len(document.encode()) for document in documents)
    return nats / size / math.log(2), size / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    documents = [part.strip() for part in args.text.read_text(encoding="utf-8").split(END) if part.strip()]
    print(f"{args.text.name}: {len(documents)} documents, {sum(len(d.encode()) for d in documents):,} bytes")
    print("| model | parameters | bits per byte | bytes per token |\n|---|---:|---:|---:|")
    for folder in args.models:
        model, begin, tokenizer = load(folder)
        bits, bytes_per_token = bits_per_byte(model, begin, tokenizer, documents)
        print(f"| {folder.name} | {model.num_parameters():,} | {bits:.4f} | {bytes_per_token:.2f} |", flush=True)


if __name__ == "__main__":
    main()
