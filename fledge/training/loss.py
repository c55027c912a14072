"""The loss of a causal model on supervised positions only, where TRL's fast head does not run (a CPU, Apple's GPU).

On these devices TRL projects every position of a batch onto the vocabulary, prompt and padding included, in float32,
and does it again in the backward pass. Here each supervised position is projected once, and softmax and its gradient
run over a few rows at a time, which stay in a core's cache. This is as fast as a compiled kernel without compiling.
"""

import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from fledge.encoding import IGNORED
from fledge.models import head_of
from fledge.training.trainable import without_adapter

# Entries of the logits in float32 at a time: 1.6 MB for a vocabulary of 50,257, which a core's level-2 cache holds.
CACHED = 1 << 19
# Rows, and columns, of the logits in one matrix product, so that its operands stay in the level-3 cache.
ROWS, COLUMNS = 256, 8192
# Entries of the logits in memory at a time: 256 MB of bfloat16. Beyond that the backward pass projects again.
KEPT = 1 << 27
SCORES = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")  # in the order of their rows
# Where shapes are to be few, rows come in multiples of this up to `ROWS`, and then of `ROWS`.
PADDED = 32


def slices(count: int, size: int) -> list[slice]:
    """`range(count)` cut into slices of `size`; one empty slice if `count` is 0."""
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def score_logits(logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, with_gradient: bool) -> None:
    """Scores `logits` (N, V) against `targets` (N,), in the order of `SCORES`.

    The scores fill the rows of `scores` (5, N); if it has fewer rows, only the first ones are computed. With
    `with_gradient` the logits are overwritten by the gradient of the negative log-probability, softmax − onehot.
    """
    for rows in slices(len(targets), max(1, CACHED // logits.size(1))):
        log_probs, target = F.log_softmax(logits[rows], -1, dtype=torch.float32), targets[rows, None]
        chosen = log_probs.gather(1, target)
        scores[0, rows] = chosen[:, 0]
        if len(scores) == 1 and not with_gradient:
            continue
        probs = log_probs.exp()
        if len(scores) >= 2:
            scores[1, rows] = -torch.linalg.vecdot(probs, log_probs)
        if len(scores) >= 3:
            scores[2, rows] = chosen[:, 0] >= log_probs.amax(-1)
        if len(scores) >= 4:
            scores[3, rows] = logits[rows].float().mean(-1)
        if len(scores) == 5:
            scores[4, rows] = (2 * log_probs).logsumexp(-1)
        if with_gradient:
            logits[rows] = probs.scatter_add_(1, target, probs.new_full(target.shape, -1))


def project_and_score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scores: torch.Tensor,
    with_gradient: bool,
) -> torch.Tensor | None:
    """Projects `hidden` (N, D) onto the vocabulary and scores it; returns the logits' gradient (N, V), or `None`."""
    kept = hidden.new_empty(len(targets) if with_gradient else min(ROWS, len(targets)), len(weight))
    for rows in slices(len(targets), ROWS):
        logits = kept[rows] if with_gradient else kept[: rows.stop - rows.start]
        if bias is None:
            torch.mm(hidden[rows], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.T, out=logits)
        score_logits(logits, targets[rows], scores[:, rows], with_gradient)
    return kept if with_gradient else None


@dataclass
class TokenScores(ModelOutput):
    """What TRL reads from a forward with `fused_lm_head=True`: scores (B, T − 1), 0 where labels are ignored."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None  # of the label
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None  # whether no token is likelier than the label
    mean_logits: torch.Tensor | None = None  # over the vocabulary
    log_sum_sq_probs: torch.Tensor | None = None  # the logarithm of the sum of squared probabilities
    label_mask: torch.Tensor | None = None


class ScoreTokens(torch.autograd.Function):
    """Scores (`rows`, N) of `hidden` (N, D) under a head of `weight` (V, D) and `bias` (V,), differentiable in row 0.

    `rows` is from 1, for the log-probabilities alone, to 5.

    Under autocast the products run in its dtype, as in any linear layer; softmax always runs in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.types = hidden.dtype, weight.dtype, weight.dtype
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        scores = torch.empty(rows, len(targets), device=hidden.device)
        ctx.slices = slices(len(targets), max(1, KEPT // len(weight)))
        with_gradient = any(ctx.needs_input_grad)
        grad_logits = None
        for chunk in ctx.slices:
            grad_logits = project_and_score(
                hidden[chunk], weight, bias, targets[chunk], scores[:, chunk], with_gradient
            )
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.kept = grad_logits if len(ctx.slices) == 1 else None
        return scores

    @staticmethod
    def backward(ctx: Any, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        # The products use token weights relative to the largest, so equal weights are exactly 1. Rounding a weight such
        # as 1/1783 to bfloat16 would scale all gradients by the same error.
        token_weights = -grad_scores[0]
        largest = max(token_weights.abs().max().item(), torch.finfo(torch.float32).tiny) if len(targets) else 1.0
        relative = (token_weights / largest).to(hidden.dtype)[:, None]
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(x.shape, dtype=dtype, device=x.device) if needed else None
            for x, dtype, needed in zip((hidden, weight, bias), ctx.types, ctx.needs_input_grad[:3], strict=True)
        )
        for number, chunk in enumerate(ctx.slices):
            grad_logits = ctx.kept
            if grad_logits is None:
                scores = torch.empty(1, len(targets[chunk]), device=hidden.device)
                grad_logits = project_and_score(hidden[chunk], weight, bias, targets[chunk], scores, True)
            weighted = hidden[chunk] * relative[chunk]
            if grad_hidden is not None:
                for rows in slices(len(grad_logits), ROWS):
                    grad_hidden[chunk][rows] = (grad_logits[rows] @ weight * relative[chunk][rows]).float() * largest
            for total, factor in ((grad_weight, weighted), (grad_bias, relative[chunk, 0])):
                if total is None:
                    continue
                for columns in slices(len(weight), COLUMNS):
                    part = (grad_logits[:, columns].T @ factor).float()
                    if number == 0:
                        torch.mul(part, largest, out=total[columns])
                    else:
                        total[columns].add_(part, alpha=largest)
        ctx.kept = None
        return grad_hidden, grad_weight, grad_bias, None, None


def has_plain_logits(config: PretrainedConfig) -> bool:
    """Whether a model's logits are its head's output, neither scaled nor capped, and its loss their cross-entropy."""
    said = config.get_text_config().to_dict()
    scales = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    is_scaled = any(said.get(scale) not in (None, 1) for scale in scales)
    return not (is_scaled or said.get("final_logit_softcapping") or said.get("output_router_logits"))


def has_fused_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `SFTTrainer` has put into `model` the forward that `score_supervised_only` replaces."""
    forward = without_adapter(model).forward
    return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters


def score_supervised_only(
    model: PreTrainedModel, temperature: float = 1.0, rows: int = 3, few_shapes: bool = False
) -> None:
    """Replaces TRL's fused head in `model`, after `add_fused_lm_head` (SFTTrainer calls it) has added it.

    `model(input_ids=…, labels=…, fused_lm_head=True, num_items_in_batch=None)` then returns `TokenScores`: per-token
    scores of shape (B, T − 1), zero where the label is ignored, and `loss`, the negative sum of the log-probabilities
    over `num_items_in_batch` (by default the number of supervised tokens here). Any `Trainer` can call it, also through
    `DistributedDataParallel`. `temperature` divides the logits. The first `rows` of the five scores are computed; the
    others are `None`. Without `fused_lm_head` the forward is the model's own.

    oneDNN makes a kernel for each shape of a product, in a millisecond, and keeps it, in half a megabyte. `few_shapes`
    pads the supervised positions, so that their numbers are few; it changes the rounding.

    Batches must be padded on the right, as TRL's are: causal attention never reads padding on the right, so no mask is
    passed and attention takes its causal path.
    """
    own_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        if not fused_lm_head:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return own_forward(*args, labels=labels, attention_mask=attention_mask, **kwargs)
        assert labels is not None
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        mask, head = labels[:, 1:] != IGNORED, head_of(self)
        # hidden / t · weightᵀ + bias / t are the logits divided by t.
        bias = None if head.bias is None else head.bias / temperature
        read, targets = hidden[mask] / temperature, labels[:, 1:][mask]
        spare = -len(targets) % (ROWS if len(targets) > ROWS else PADDED) if few_shapes else 0
        read, targets = F.pad(read, (0, 0, 0, spare)), F.pad(targets, (0, spare))
        scores = ScoreTokens.apply(read, head.weight, bias, targets, rows)[:, : len(targets) - spare]
        found = {
            name: row.new_zeros(mask.shape).masked_scatter(mask, row) for name, row in zip(SCORES, scores, strict=False)
        }
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].bool()
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return TokenScores(loss=-found["log_probs"].sum() / count, label_mask=mask, **found)

    model.forward = types.MethodType(forward, model)
