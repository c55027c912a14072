"""The author's own module: the best evidence for what a checkpoint computes, because it decides every fact at once."""

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.proof import FLOAT64_TOLERANCE, probe_ids
from fledge.checkpoints.questions import Questions, Values
from fledge.cli import UserError


def settle_by_reference(
    gpt: CanonicalGPT,
    facts: list[Fact],
    own: Callable[[Tensor], Tensor],
    avoid: Collection[int] = (),
    tolerance: float = FLOAT64_TOLERANCE,
) -> tuple[CanonicalGPT, float]:
    """Finds the facts under which the canonical GPT computes what the author's module does.

    Args:
        gpt: the checkpoint as it is read so far.
        facts: what that rests on; updated in place.
        own: the author's module, token ids (B, T) → logits (B, T or 1, V).
        avoid: ids that it treats apart, as padding.
        tolerance: the largest |Δ logit| that counts as equal.

    Returns:
        The model and its largest |Δ logit|.

    Raises:
        UserError: there are none such; either the module computes something no reading has, or a stated fact is wrong.
    """
    questions = Questions(gpt, facts)
    probes = [(ids, own(ids)) for ids in probe_ids(gpt, avoid)]

    def largest(values: Values) -> float:
        return author_error(questions.reading(values), probes).max().item()

    def mean(values: Values) -> float:
        return author_error(questions.reading(values), probes[1:]).mean().item()

    reached = {}
    for values in _descents(questions, mean):
        reached[frozenset(values.items())] = error = largest(values)
        if error <= tolerance:
            break
    else:
        stated = ", ".join(f"{fact} ({fact.said_by})" for fact in facts if fact.stated)
        raise UserError(
            "Your own module computes something else than these tensors mean to Fledge: logits differ by "
            f"{min(reached.values()):.1e} under the closest reading."
            + (
                f" Is what you stated right: {stated}?"
                if stated
                else " No reading that Fledge knows does what it does."
            )
        )
    gpt = questions.adopt(values, Source.REFERENCE)
    for fact in facts:
        if fact.status is not Status.SHOWN and not fact.stated and fact.name != "context_length":  # no logit shows it
            fact.settle(Source.REFERENCE, f"logits within {error:.0e}")
    return gpt, error


def _descents(questions: Questions, error: Callable[[Values], float]) -> Iterator[Values]:
    """Where steps that lower the error most lead: from the present reading, then from each first step there is.

    A step changes one fact, or two where no single one helps: two wrong facts may hide each other.
    """
    yield questions.now
    starts = [questions.now, *({**questions.now, **changes} for changes in questions.singles(questions.now))]
    for start in starts:
        values, now = start, error(start)
        while now > FLOAT64_TOLERANCE:
            for moves in (questions.singles, questions.pairs):
                tried = [(error(other), other) for other in ({**values, **changes} for changes in moves(values))]
                best = min(tried, key=lambda item: item[0], default=(math.inf, values))
                if best[0] < now:
                    break
            else:
                break
            now, values = best
        yield values


def author_error(gpt: CanonicalGPT, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Largest |Δ logit| in float64 for each probe (N,) between the canonical GPT and the author's logits.

    Some authors' forward returns the last position alone; then that one is compared.
    """
    errors = []
    for ids, expected in own:
        logits = canonical_logits(gpt, ids)[:, -expected.shape[1] :]
        if logits.shape != expected.shape:
            raise UserError(f"--reference gives logits {tuple(expected.shape)} where {tuple(logits.shape)} are due.")
        errors.append((logits - expected).abs().max())
    return torch.stack(errors).nan_to_num(math.inf)
