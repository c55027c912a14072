"""Measures a model on held-out prompts: its loss on the references, and its own answers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.encoding import IGNORED
from fledge.evaluation.intervals import Ratio
from fledge.evaluation.prompts import Prompts
from fledge.evaluation.wording import distinct_2
from fledge.generation.answers import answer_each
from fledge.generation.onednn import by_onednn
from fledge.journal import Journal
from fledge.messages import Answer
from fledge.sampling import Sampling
from fledge.terminal import progress

TOKENS_AT_ONCE = 4096  # per forward: 0.8 GB of logits over 50,257 tokens
MEANING = {
    "completion_loss": "nats per token of the held-out answers, end-of-text included",
    "perplexity": "exp of the completion loss",
    "bits_per_byte": "bits for a held-out answer and its end, per byte of its text",
}


@dataclass(frozen=True)
class Answering:
    """How prompts are answered, by each model alike. `prompts` (P,) are token ids; each has `num_samples` answers."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    num_samples: int
    sampling: Sampling
    batch_size: int
    journal: Journal

    def answers(self, model: PreTrainedModel, who: str, progress: Callable[[int], None]) -> list[Answer]:
        """The answers (P * num_samples,) of a model, each in the journal as soon as it is made.

        An answer depends only on its prompt and its number, so an interrupted run ends with the same answers.
        """
        numbers = range(len(self.prompts) * self.num_samples)
        left = [number for number in numbers if (who, number) not in self.journal.done]
        asked = [self.prompts[number // self.num_samples] for number in left]
        made = answer_each(model, self.tokenizer, asked, self.sampling, self.batch_size, left)
        progress(len(numbers) - len(left))
        for done, (number, answer) in enumerate(made, len(numbers) - len(left) + 1):
            self.journal.add({(who, number): vars(answer)})
            progress(done)
        return [Answer(**self.journal.done[who, number]) for number in numbers]


@dataclass
class Answered:
    """The answers of one model, `num_samples` to each prompt in turn, and their scores.

    `ratios` first has the metrics of the losses and of all answers together; scoring adds `scores` and their metrics.
    """

    answers: list[Answer]
    loss_by_position: list[dict[str, float]]
    ratios: dict[str, Ratio]
    scores: list[dict[str, float]] = field(default_factory=list)


def loss_ratios(nats: list[Tensor], texts: list[str]) -> dict[str, Ratio]:
    """Completion loss, perplexity and bits per byte, from the loss of each row's supervised tokens and their text."""
    total = np.array([row.double().sum().item() for row in nats])
    tokens = np.array([float(len(row)) for row in nats])
    size = np.array([float(len(text.encode())) for text in texts])
    return {
        "completion_loss": Ratio(total, tokens, is_share=False),
        "perplexity": Ratio(total, tokens, perplexity, is_share=False),
        "bits_per_byte": Ratio(total / np.log(2), size, is_share=False),
    }


def perplexity(loss: np.ndarray) -> np.ndarray:
    """Of a loss beyond 100 nats that of 100: infinity is no number in JSON."""
    return np.exp(np.minimum(loss, 100.0))


def distinct_ratio(texts: list[str], num_samples: int) -> Ratio:
    """Distinct-2 over all texts, as a ratio of sums over prompts."""
    parts = np.array(distinct_2(texts), dtype=float)  # (texts, 2): different pairs, all pairs
    different, pairs = parts.reshape(-1, num_samples, 2).sum(axis=1).T
    return Ratio(different, pairs)


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    ids = [label for label in row["labels"] if label != IGNORED]
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def completion_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """For each row the negative log-likelihood of its supervised tokens, in nats and in their order (S,)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    nats: dict[int, Tensor] = {}
    with by_onednn(model):
        while len(nats) < len(rows):
            batch: list[int] = []
            for i in order[len(nats) :]:
                if batch and len(rows[i]["input_ids"]) * (len(batch) + 1) > TOKENS_AT_ONCE:
                    break
                batch.append(i)
            longest = len(rows[batch[-1]]["input_ids"])
            # Padding on the right needs no mask: causal attention never reads it, and its labels are ignored.
            ids, labels = (
                torch.tensor([rows[i][key] + [fill] * (longest - len(rows[i][key])) for i in batch]).to(model.device)
                for key, fill in (("input_ids", pad), ("labels", IGNORED))
            )
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            labels = labels[:, 1:]
            # Over (B · T, V): a log-softmax along the middle of (B, V, T) takes twice as long on a CPU.
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            for i, row_losses, row_labels in zip(batch, losses.view_as(labels), labels, strict=True):
                nats[i] = row_losses[row_labels != IGNORED].cpu()
            progress(len(nats))
    return [nats[i] for i in range(len(rows))]


def loss_by_position(rows: list[dict[str, list[int]]], nats: list[Tensor]) -> list[dict[str, float]]:
    """Mean loss of answer tokens by their position in the answer: 1, 2, 3-4, 5-8, …, each with its count `n`."""
    places = np.array([place for row in rows for place in _places(row["labels"][1:])])
    values = np.concatenate([row.double().numpy() for row in nats])
    bins = np.ceil(np.log2(places)).astype(int)
    return [
        {
            "first": 2 ** (exponent - 1) + 1 if exponent else 1,
            "last": 2**exponent,
            "nats": float(values[bins == exponent].mean()),
            "n": int((bins == exponent).sum()),
        }
        for exponent in np.unique(bins).tolist()
    ]


def _places(labels: list[int]) -> list[int]:
    """For each supervised label its position in its answer, from 1."""
    places, place = [], 0
    for label in labels:
        place = place + 1 if label != IGNORED else 0
        if place:
            places.append(place)
    return places


def measure(model: PreTrainedModel, who: str, prompts: Prompts, answering: Answering) -> Answered:
    """Computes the losses of a model on the held-out answers, and its own answers. Prints progress."""
    with progress(f"{who}: loss", len(prompts.rows)) as tell:
        nats = completion_nats(model, prompts.tokenizer, prompts.encoded, tell)
    with progress(f"{who}: answers", len(prompts.rows) * prompts.num_samples) as tell:
        answers = answering.answers(model, who, tell)
    ratios = loss_ratios(nats, [supervised_text(prompts.tokenizer, row) for row in prompts.encoded])
    ratios["distinct_2"] = distinct_ratio([answer.text for answer in answers], prompts.num_samples)
    return Answered(answers, loss_by_position(prompts.encoded, nats), ratios)


def fingerprint_of_prompts(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
