"""The proof that a converted model computes what its source computed."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fledge.checkpoints.canonical import CanonicalGPT, reference_logits
from fledge.cli import UserError

FLOAT64_TOLERANCE = 1e-9
"""Largest |Δ logit| with both sides in float64."""
FLOAT32_TOLERANCE = 1e-5
"""Largest |Δ logit| in float32, as a share of the largest |logit|. A wrong GELU is about 5e-4 off."""


def probe_ids(vocab_size: int, context_length: int) -> list[Tensor]:
    """Token ids (B, T) that touch every position and a spread of the vocabulary; the same on every run."""
    generator = torch.Generator().manual_seed(0)
    short = min(48, context_length)
    return [torch.randint(vocab_size, shape, generator=generator) for shape in ((1, context_length), (4, short))]


def reference(gpt: CanonicalGPT) -> list[tuple[Tensor, Tensor]]:
    """Probes with their reference logits in float64."""
    return [(ids, reference_logits(gpt, ids)) for ids in probe_ids(gpt.vocab_size, gpt.context_length)]


def prove_exact(probes: list[tuple[Tensor, Tensor]], model: PreTrainedModel) -> float:
    """Largest |Δ logit| of a float64 `model` against the reference.

    Raises:
        UserError: it is above `FLOAT64_TOLERANCE`.
    """
    worst, _ = _compare(probes, model)
    if not worst <= FLOAT64_TOLERANCE:
        raise UserError(
            f"The conversion is wrong: logits differ by {worst:.1e} in float64, {FLOAT64_TOLERANCE:g} allowed."
        )
    return worst


def prove_saved(probes: list[tuple[Tensor, Tensor]], model: PreTrainedModel) -> dict[str, float]:
    """The same for a reloaded float32 `model`, relative to the largest logit, with the share of equal arg max.

    Raises:
        UserError: the error is above `FLOAT32_TOLERANCE`.
    """
    worst, equal = _compare(probes, model)
    largest = max(logits.abs().max().item() for _, logits in probes)
    relative = worst / largest if largest else worst
    if not relative <= FLOAT32_TOLERANCE:
        raise UserError(
            f"The saved model differs by {relative:.1e} of its largest logit, {FLOAT32_TOLERANCE:g} allowed."
        )
    return {"max_relative_error": relative, "argmax_equal": equal}


@torch.no_grad()
def _compare(probes: list[tuple[Tensor, Tensor]], model: PreTrainedModel) -> tuple[float, float]:
    worst, equal, positions = 0.0, 0, 0
    for ids, expected in probes:
        logits = model.eval()(input_ids=ids).logits.double()
        error = (logits - expected).abs().max().item()
        worst = max(worst, error) if error == error else error  # a NaN stays a NaN
        equal += (logits.argmax(-1) == expected.argmax(-1)).sum().item()
        positions += ids.numel()
    return worst, equal / positions
