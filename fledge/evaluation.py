"""Base against instruct on the same held-out prompts: losses, scores, and how sure one can be of them."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.encoding import IGNORED

RESAMPLES = 2000
COMMON = {
    "eos_rate": "answers that the model ended itself",
    "completion_loss": "nats per token of the held-out answers",
    "perplexity": "exp of the completion loss",
}
SHARES = ("instruction_following", "ending_match", "topic_words", "eos_rate")


@torch.no_grad()
def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    batch_size: int,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """For each row: the negative log-likelihood of its supervised tokens in nats (N,), and their number (N,)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    nats, counts = torch.zeros(len(rows)), torch.zeros(len(rows))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        longest = len(rows[batch[-1]]["input_ids"])
        # Padding on the right needs no mask: causal attention never looks there, and its labels are ignored.
        ids, labels = (
            torch.tensor([rows[i][key] + [fill] * (longest - len(rows[i][key])) for i in batch]).to(model.device)
            for key, fill in (("input_ids", tokenizer.pad_token_id), ("labels", IGNORED))
        )
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        nats[batch] = losses.sum(1).cpu()
        counts[batch] = (labels[:, 1:] != IGNORED).sum(1).float().cpu()
        progress(begin + len(batch))
    return nats, counts


def interval(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Weighted mean of `values` (N,) with its 95% confidence interval by the percentile bootstrap over prompts."""
    weights = np.ones(len(values)) if weights is None else weights
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "value": float((values * weights).sum() / weights.sum()),
        "low": float(low),
        "high": float(high),
        "n": len(values),
    }


def summarise(scores: list[dict[str, float]], nats: Tensor, counts: Tensor) -> dict[str, dict[str, float]]:
    """Per-answer scores and per-row losses → every metric with its interval."""
    metrics = {name: interval(np.array([score[name] for score in scores])) for name in scores[0]}
    loss = interval((nats / counts).double().numpy(), counts.double().numpy())
    metrics["completion_loss"] = loss
    metrics["perplexity"] = {key: math.exp(loss[key]) for key in ("value", "low", "high")} | {"n": loss["n"]}
    return metrics


def paired_difference(base: list[dict[str, float]], model: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Model minus base on the same prompts, which is surer than the two intervals apart."""
    return {name: interval(np.array([m[name] - b[name] for b, m in zip(base, model, strict=True)])) for name in base[0]}


def table(metrics: dict) -> str:
    """Base beside instruct as a Markdown table that also reads well in a terminal."""
    rows = [("metric", "base", "instruct", "difference")]
    for name, of_model in metrics["model"].items():
        shown = (metrics["base"][name], of_model, metrics["difference"].get(name))
        rows.append((name.replace("_", " "), *(show(name, value) if value else "" for value in shown)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def report(metrics: dict, judged_by: str) -> str:
    """`report.md`: the table, who judged, and what each metric means."""
    meanings = "\n".join(f"- {name.replace('_', ' ')}: {meaning}" for name, meaning in metrics["meaning"].items())
    count = metrics["model"]["eos_rate"]["n"]
    heading = f"# Base against instruct\n\n{count} held-out prompts of the {metrics['split']} split; 95% intervals."
    return f"{heading}\n\n{table(metrics)}\n\n{judged_by}\n\n{meanings}\n"


def show(name: str, metric: dict[str, float]) -> str:
    """`87.3% (83.1 to 91.2)` for a share, three digits for anything else."""
    if name in SHARES:
        return f"{metric['value']:.1%} ({100 * metric['low']:.1f} to {100 * metric['high']:.1f})"
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"
