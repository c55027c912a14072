"""A GPT written by hand, the way a book or a course teaches it: plain PyTorch, no transformers.

It stands for the model that *you* bring to Fledge, and it trained the checkpoint beside it:

    python examples/scratch_gpt.py train --text stories.txt more.txt --out examples/scratch_gpt --minutes 60
    python examples/scratch_gpt.py sample --checkpoint examples/scratch_gpt --prompt "Once upon a time"

Text files hold documents with a line `<|endoftext|>` between them.
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

END = "<|endoftext|>"
CONFIG = {"vocab_size": 4096, "context_length": 512, "emb_dim": 192, "n_heads": 4, "n_layers": 6}


class LayerNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, eps=1e-5)


class CausalAttention(nn.Module):
    def __init__(self, emb_dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.to_query = nn.Linear(emb_dim, emb_dim, bias=False)
        self.to_key = nn.Linear(emb_dim, emb_dim, bias=False)
        self.to_value = nn.Linear(emb_dim, emb_dim, bias=False)
        self.to_out = nn.Linear(emb_dim, emb_dim)

    def forward(self, x):
        batch, length, emb_dim = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.n_heads, -1).transpose(1, 2)
            for layer in (self.to_query, self.to_key, self.to_value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.to_out(mixed.transpose(1, 2).reshape(batch, length, emb_dim))


class FeedForward(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.expand = nn.Linear(emb_dim, 4 * emb_dim)
        self.shrink = nn.Linear(4 * emb_dim, emb_dim)

    def forward(self, x):
        return self.shrink(F.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, emb_dim, n_heads):
        super().__init__()
        self.norm_before_attention = LayerNorm(emb_dim)
        self.attention = CausalAttention(emb_dim, n_heads)
        self.norm_before_feed_forward = LayerNorm(emb_dim)
        self.feed_forward = FeedForward(emb_dim)

    def forward(self, x):
        x = x + self.attention(self.norm_before_attention(x))
        return x + self.feed_forward(self.norm_before_feed_forward(x))


class ScratchGPT(nn.Module):
    """Token ids (batch, length) → logits (batch, length, vocab_size)."""

    def __init__(self, vocab_size, context_length, emb_dim, n_heads, n_layers):
        super().__init__()
        self.token_table = nn.Embedding(vocab_size, emb_dim)
        self.position_table = nn.Embedding(context_length, emb_dim)
        self.layers = nn.ModuleList([Block(emb_dim, n_heads) for _ in range(n_layers)])
        self.norm_at_end = LayerNorm(emb_dim)
        self.to_vocab = nn.Linear(emb_dim, vocab_size, bias=False)
        self.to_vocab.weight = self.token_table.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("to_out.weight", "shrink.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids):
        x = self.token_table(ids) + self.position_table.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.to_vocab(self.norm_at_end(x))


def read_documents(files):
    documents = []
    for file in map(Path, files):
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
        documents += [document.strip() for document in content.decode("utf-8").split(END) if document.strip()]
    return documents


def train_tokenizer(documents, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    )
    return tokenizer


def next_token_loss(model, batch):
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(args):
    """Optimise next-token cross-entropy for `--minutes` of wall time, with a warm-up and a decay to zero."""
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = "\n".join(read_documents(args.hold_out))
    documents = [document for document in read_documents(args.text) if document not in held_out]
    config = CONFIG | {key: getattr(args, key) for key in ("emb_dim", "n_heads", "n_layers")}
    if args.start_from:
        model, tokenizer, config = load(args.start_from)
        model.train()
    else:
        model, tokenizer = ScratchGPT(**config), train_tokenizer(documents, config["vocab_size"])
    tokenizer.save(str(args.out / "tokenizer.json"))
    stream = torch.tensor([i for doc in tokenizer.encode_batch(documents) for i in [0, *doc.ids]] + [0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, stream = model.to(device), stream.to(device)
    print(
        f"{len(documents):,} documents, {len(stream):,} tokens, {sum(p.numel() for p in model.parameters()):,} weights"
    )

    # Muon (Jordan et al. 2024) on the layers' matrices and AdamW on the rest learns more from so little text and time.
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and name.startswith("layers."))]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    context, offsets = args.length, torch.arange(args.length + 1, device=device)
    # A window begins where a document does, as every use of the model will; what follows fills it.
    starts = (stream[:-context] == 0).nonzero()
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    start, step, average = time.time(), 0, None
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        scale = min(1, (step + 1) / 100) * min(1, (1 - progress) / 0.6)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * scale
        loss = loss_of(model, stream[starts[torch.randint(len(starts), (args.batch_size,))] + offsets])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            speed = step * args.batch_size * context / (time.time() - start)
            print(f"{progress:5.1%}  step {step}  loss {average:.3f}  {speed:,.0f} tokens/s", flush=True)
    # Half precision halves the file; the same rounded weights are what every later stage starts from.
    weights = {name: tensor.half().cpu() for name, tensor in model.state_dict().items() if name != "to_vocab.weight"}
    weights["to_vocab.weight"] = weights["token_table.weight"]
    torch.save(
        {"model_state_dict": weights, "config": config, "step": step, "loss": average}, args.out / "checkpoint.pt"
    )
    print(f"saved {args.out / 'checkpoint.pt'}")


def load(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = ScratchGPT(**checkpoint["config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json")), checkpoint["config"]


@torch.no_grad()
def sample(args):
    torch.manual_seed(args.seed)
    model, tokenizer, _ = load(args.checkpoint)
    ids = [0, *tokenizer.encode(args.prompt).ids]
    for _ in range(300):
        logits = model(torch.tensor([ids[-model.position_table.num_embeddings :]]))[0, -1]
        ids.append(torch.multinomial(F.softmax(logits / 0.8, -1), 1).item())
        if ids[-1] == 0:
            break
    print(tokenizer.decode(ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(function=train)
    training.add_argument("--text", nargs="+", required=True)
    training.add_argument("--hold_out", nargs="*", default=[], help="files whose stories are left out")
    training.add_argument("--start_from", type=Path, help="a folder that `train` wrote: it goes on from there")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=60)
    training.add_argument("--batch_size", type=int, default=8)
    training.add_argument("--length", type=int, default=CONFIG["context_length"], help="tokens of a window")
    for key in ("emb_dim", "n_heads", "n_layers"):
        training.add_argument(f"--{key}", type=int, default=CONFIG[key])
    training.add_argument("--lr", type=float, default=5e-3)
    training.add_argument("--compile", action="store_true", help="faster on some CPUs, where there is a C++ compiler")
    sampling = commands.add_parser("sample")
    sampling.set_defaults(function=sample)
    sampling.add_argument("--checkpoint", type=Path, required=True)
    sampling.add_argument("--prompt", default="Once upon a time")
    for command in (training, sampling):
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
