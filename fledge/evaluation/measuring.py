"""Base against instruct on the same held-out prompts: losses, scores, and how sure one can be of them."""

import hashlib
import json
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.encoding import IGNORED, prompt_length
from fledge.evaluation.intervals import Ratio, interval, means
from fledge.evaluation.wording import Wording, distinct_2
from fledge.generation.answers import answer_each
from fledge.generation.journal import Journal
from fledge.generation.onednn import by_onednn
from fledge.generation.sampling import Sampling
from fledge.messages import Answer

OF_REFERENCE = ("answer_tokens", "repetition", "copied", "distinct_2", "distinct_answers")
TOKENS_AT_ONCE = 4096  # a forward's logits over 50,257 tokens are then 0.8 GB
MEANING = {
    "distinct_2": "different word pairs over all word pairs of all answers",
    "completion_loss": "nats per token of the held-out answers, end-of-text included",
    "perplexity": "exp of the completion loss",
    "bits_per_byte": "bits for a held-out answer and its end, per byte of its text",
}


def loss_ratios(nats: list[Tensor], texts: list[str]) -> dict[str, Ratio]:
    """Completion loss, perplexity and bits per byte from the nats of each row's supervised tokens and their text."""
    total = np.array([row.double().sum().item() for row in nats])
    tokens, size = (np.array([float(len(part)) for part in parts]) for parts in (nats, [t.encode() for t in texts]))
    return {
        "completion_loss": Ratio(total, tokens),
        "perplexity": Ratio(total, tokens, np.exp),
        "bits_per_byte": Ratio(total / np.log(2), size),
    }


def distinct_ratio(texts: list[str], num_samples: int) -> Ratio:
    """Distinct-2 over all texts, with each prompt's part in it."""
    return Ratio(*np.array(distinct_2(texts), dtype=float).reshape(-1, num_samples, 2).sum(1).T)


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED], skip_special_tokens=True)


@torch.no_grad()
def completion_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    progress: Callable[[int], None],
) -> list[Tensor]:
    """For each row the negative log-likelihood of its supervised tokens, in nats and in their order (S,)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    nats = {}
    while len(nats) < len(rows):
        batch = []
        for i in order[len(nats) :]:
            if batch and len(rows[i]["input_ids"]) * (len(batch) + 1) > TOKENS_AT_ONCE:
                break
            batch.append(i)
        longest = len(rows[batch[-1]]["input_ids"])
        # Padding on the right needs no mask: causal attention never looks there, and its labels are ignored.
        ids, labels = (
            torch.tensor([rows[i][key] + [fill] * (longest - len(rows[i][key])) for i in batch]).to(model.device)
            for key, fill in (("input_ids", pad), ("labels", IGNORED))
        )
        with by_onednn(model):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        labels = labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        for i, row_losses, row_labels in zip(batch, losses, labels, strict=True):
            nats[i] = row_losses[row_labels != IGNORED].cpu()
        progress(len(nats))
    return [nats[i] for i in range(len(rows))]


def loss_by_position(rows: list[dict[str, list[int]]], nats: list[Tensor]) -> list[dict[str, float]]:
    """Mean nats of answer tokens by their place in the answer: 1, 2, 3-4, 5-8, … each with its count `n`."""
    sums, counts = {}, {}
    for row, row_nats in zip(rows, nats, strict=True):
        place, places = 0, []
        for label in row["labels"][1:]:
            place = place + 1 if label != IGNORED else 0
            places += [place] * (place > 0)
        bins = np.ceil(np.log2(places)).astype(int)
        for exponent in np.unique(bins).tolist():
            sums[exponent] = sums.get(exponent, 0.0) + row_nats.numpy()[bins == exponent].sum(dtype=float)
            counts[exponent] = counts.get(exponent, 0) + int((bins == exponent).sum())
    return [
        {"first": 2 ** (e - 1) + 1 if e else 1, "last": 2**e, "nats": sums[e] / counts[e], "n": counts[e]}
        for e in sorted(sums)
    ]


def reference(wordings: Wording, texts: list[str], rows: list[dict[str, list[int]]]) -> dict[str, dict[str, float]]:
    """What the held-out answers themselves reach, for the metrics that do not compare with them."""
    lengths = [len(row["input_ids"]) - prompt_length(row["labels"]) for row in rows]
    written = [Answer(text, length, stopped=True) for text, length in zip(texts, lengths, strict=True)]
    metrics = means(wordings.score(written), 1) | {"distinct_2": distinct_ratio(texts, 1)}
    return {name: found for name, metric in metrics.items() if name in OF_REFERENCE and (found := interval(metric))}


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    num_samples: int,
    batch_size: int,
    journal: Journal,
    who: str,
    progress: Callable[[int], None],
) -> list[Answer]:
    """`num_samples` answers to each prompt in turn, each in the journal as soon as it is made.

    An answer depends on its prompt and its number alone, so what an interruption left to do comes out the same.
    """
    numbers = range(len(prompts) * num_samples)
    left = [number for number in numbers if (who, number) not in journal.done]
    asked = [prompts[number // num_samples] for number in left]
    progress(len(numbers) - len(left))
    for done, (number, answer) in enumerate(
        answer_each(model, tokenizer, asked, sampling, batch_size, left), len(numbers) - len(left) + 1
    ):
        journal.add({(who, number): vars(answer)})
        progress(done)
    return [Answer(**journal.done[who, number]) for number in numbers]


def fingerprint_of_prompts(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
