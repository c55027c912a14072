"""Facts settled by the author's own module: the best evidence, because its logits decide every fact at once."""

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.proof import FLOAT64_TOLERANCE, Probes, probe_ids
from fledge.checkpoints.questions import Questions, Values
from fledge.errors import UserError

ROTATION_ROUNDING = 1e-6
"""What the rounding of RoPE's table changes, as a share of the largest logit: authors make it in float32, by cosines
and sines or as complex numbers, which differ in the last bit."""
NORMALISED = 1e-6
"""Logits are log-probabilities if the probabilities that they give sum to one within about this."""


def settle_by_reference(
    gpt: CanonicalGPT,
    facts: list[Fact],
    author: Callable[[Tensor], Tensor],
    avoid: Collection[int] = (),
    tolerance: float = FLOAT64_TOLERANCE,
    doubt: str = "",
) -> tuple[CanonicalGPT, float]:
    """Finds the facts under which the canonical GPT computes what the author's module does.

    Args:
        gpt: the checkpoint as it is read so far.
        facts: what that rests on; updated in place.
        author: the author's module, token ids (B, T) → logits (B, T or 1, V).
        avoid: ids that it treats apart, as padding.
        tolerance: the largest |Δ logit| that counts as equal.
        doubt: a sentence about what is odd in its forward, for the case that nothing agrees with it.

    Returns:
        The model and its largest |Δ logit|.

    Raises:
        UserError: no reading computes the same: the module has something that no reading has, or a stated fact is
            wrong.
    """
    questions = Questions(gpt, facts)
    probes = [(ids, author(ids)) for ids in probe_ids(gpt, avoid)]
    errors: dict[tuple, float] = {}

    def mean_error(values: Values) -> float:
        """The error that descends, over the short probes alone, which cost less. Many descents pass a reading."""
        reading = tuple(values.values())
        if reading not in errors:
            errors[reading] = author_error(questions.reading(values), probes[1:]).mean().item()
        return errors[reading]

    closest = math.inf
    largest = max(expected.abs().max().item() for _, expected in probes)
    for number, values in enumerate(_descents(questions, mean_error)):
        reading = questions.reading(values)
        error = author_error(reading, probes).max().item()
        closest = min(closest, error)
        # The first reading was not compared with others yet, and another epsilon may be as near as rounding.
        if error <= tolerance or (number and reading.rope and error <= ROTATION_ROUNDING * largest):
            break
    else:
        raise UserError(" ".join(filter(None, (_no_reading(facts, closest), doubt))))
    gpt = questions.adopt(values, Source.REFERENCE)
    for fact in facts:
        # No logit shows the context length.
        if fact.status is not Status.SHOWN and not fact.stated and fact.name != "context_length":
            fact.settle(Source.REFERENCE, f"logits within {error:.0e}")
    return gpt, error


def _no_reading(facts: list[Fact], closest: float) -> str:
    stated = ", ".join(f"{fact} ({fact.said_by})" for fact in facts if fact.stated)
    question = f"Is what you stated right: {stated}?" if stated else "No reading that Fledge knows does what it does."
    return (
        "Your own module computes something else than these tensors mean to Fledge: logits differ by "
        f"{closest:.1e} under the closest reading. {question}"
    )


def _descents(questions: Questions, error: Callable[[Values], float]) -> Iterator[Values]:
    """The readings to which steps that lower the error most lead.

    They start from the present reading, and then from each reading that is one change away. A step changes one fact,
    or two if no single change helps, because two wrong facts may hide each other.
    """
    yield questions.now
    starts = [questions.now, *(questions.now | changes for changes in questions.singles(questions.now))]
    for start in starts:
        values, now = start, error(start)
        while now > FLOAT64_TOLERANCE:
            lower = _step(questions, values, now, error)
            if lower is None:
                break
            values, now = lower
        yield values


def _step(
    questions: Questions, values: Values, now: float, error: Callable[[Values], float]
) -> tuple[Values, float] | None:
    """The best change of one fact, or else of two, if it lowers the error."""
    for moves in (questions.singles, questions.pairs):
        tried = [values | changes for changes in moves(values)]
        errors = [error(other) for other in tried]
        best = min(range(len(tried)), key=errors.__getitem__, default=None)
        if best is not None and errors[best] < now:
            return tried[best], errors[best]
    return None


def author_error(gpt: CanonicalGPT, probes: Probes) -> Tensor:
    """Largest |Δ logit| in float64 for each probe (N,) between the canonical GPT and the author's logits.

    Some authors' forward returns the last position alone; then that one is compared. Others return log-probabilities;
    then those are.
    """
    errors = []
    for ids, expected in probes:
        logits = canonical_logits(gpt, ids)[:, -expected.shape[1] :]
        if expected.logsumexp(-1).abs().max() < NORMALISED:
            logits = logits.log_softmax(-1)
        if logits.shape != expected.shape:
            raise UserError(f"--reference gives logits {tuple(expected.shape)} where {tuple(logits.shape)} are due.")
        errors.append((logits - expected).abs().max())
    return torch.stack(errors).nan_to_num(math.inf)
