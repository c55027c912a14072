"""Bits per byte of language models on the same text, whatever their tokenizers.

    python benchmarks/bits_per_byte.py --text valid.txt --models runs/quickstart/base runs/stories15M

Each document between `<|endoftext|>` lines is scored by itself after a beginning-of-text token: −log2 of its
probability over its UTF-8 bytes. A document longer than the context is read in windows that overlap by half, so each
token but the first few sees at least half a context. A model is a folder that convert_checkpoint.py wrote.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

END = "<|endoftext|>"


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> tuple[float, float]:
    """Bits per byte and bytes per token over `documents`."""
    context, nats, tokens = model.config.max_position_embeddings, 0.0, 0
    for document in documents:
        encoded = tokenizer.encode(document, add_special_tokens=False)
        assert tokenizer.decode(encoded) == document, "the tokenizer does not give this text back"
        ids, scored = torch.tensor([tokenizer.bos_token_id, *encoded]), 1
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
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        bits, bytes_per_token = bits_per_byte(model, tokenizer, documents)
        print(f"| {folder.name} | {model.num_parameters():,} | {bits:.4f} | {bytes_per_token:.2f} |", flush=True)


if __name__ == "__main__":
    main()
