"""Forward and backward of TRL's loss against Fledge's, in turn, on the same batches.

    python benchmarks/train_loss.py

Rows are as long as TinyStories-Instruct's in GPT-2's BPE: a prompt of 54 tokens and a story of 223 on average. Prints
real (unpadded) tokens a second for both, their ratio round by round, and the share of this machine's own matrix rate.
"""

import statistics
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTTrainer

from fledge.encoding import IGNORED
from fledge.training import SmallModelConfig, score_supervised_only

SHAPES = {
    "quickstart, 3.6M": GPT2Config(
        vocab_size=4096, n_positions=512, n_embd=192, n_layer=6, n_head=4, activation_function="gelu_pytorch_tanh"
    ),
    "topic-ending, 49.5M": GPT2Config(
        n_positions=512, n_embd=384, n_layer=6, n_head=6, activation_function="gelu", tie_word_embeddings=False
    ),
}
BATCH_SIZE, ROUNDS = 8, 5


def rows(count: int, vocab_size: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        prompt, story = (max(8, int(m + s * torch.randn((), generator=generator))) for m, s in ((54, 15), (223, 60)))
        ids = torch.randint(vocab_size, (min(prompt + story, 512),), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def make_trainer(shape: GPT2Config, folder: str) -> SFTTrainer:
    torch.manual_seed(0)
    shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = 0.0
    model = GPT2LMHeadModel(shape)
    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, shape.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    config = SmallModelConfig(output_dir=folder, per_device_train_batch_size=BATCH_SIZE, eval_strategy="no")
    return SFTTrainer(
        model=model, args=config, train_dataset=rows(BATCH_SIZE * 4, shape.vocab_size), processing_class=tokenizer
    )


def seconds_a_step(trainer: SFTTrainer, batch: dict) -> float:
    start = time.perf_counter()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    trainer.model.zero_grad()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the limit for any of this."""
    a = torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def main():
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            trl, fledge = make_trainer(shape, f"{folder}/a"), make_trainer(shape, f"{folder}/b")
            if fledge.args.device.type in ("cpu", "mps"):
                score_supervised_only(fledge.model)
            batch = dict(next(iter(trl.get_train_dataloader())))
            tokens = int(batch["attention_mask"].sum())
            for trainer in (trl, fledge):
                trainer.model.train()
                seconds_a_step(trainer, batch)
            times = [(seconds_a_step(trl, batch), seconds_a_step(fledge, batch)) for _ in range(ROUNDS)]
            ratios = sorted(a / b for a, b in times)
            of_trl, of_fledge = (statistics.median(column) for column in zip(*times, strict=True))
            supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
            body = sum(p.numel() for p in fledge.model.transformer.h.parameters())
            operations = 6 * (body * tokens + shape.vocab_size * shape.n_embd * supervised)
            rate = matrix_rate(torch.bfloat16 if fledge.args.bf16 else torch.float32)
            print(f"{name}: TRL {tokens / of_trl:,.0f} tokens/s, Fledge {tokens / of_fledge:,.0f} tokens/s,", end=" ")
            print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f});", end=" ")
            print(f"{operations / of_fledge / rate:.0%} of the matrix rate of {rate / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
