"""Facts settled by the author's own module: the best evidence, because its logits decide every fact at once."""

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.descent import COLUMNS, Descent, author_error, is_log_probabilities
from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.proof import FLOAT64_TOLERANCE, ROTATION_TOLERANCE, Probes, probe_ids
from fledge.checkpoints.questions import OFFSETS, Questions, Values
from fledge.errors import UserError

LONG_WORK = 4e11
"""Parameters times positions that one text as long as the context may cost."""
LONGER = 100
"""How many times as far as in short texts rounding may lead in a long one."""
ALONE = "They differ where a token stands alone: look first at the activation, the norms, the embedding and the head."
TOGETHER = "Where a token stands alone they agree: look at the attention, its mask and the positions."
WINDOWS = frozenset({"window", "window_pattern"})
ATTENTION = WINDOWS | frozenset(
    {"attention_scale", "attention_cap", "causal", "alibi", "rope", "rope_theta"}
    | {"rope_direction", "rope_width", "rope_span", "qk_norm", "qk_norm_type", "qk_norm_after_rope", "qk_norm_eps"}
)
"""Facts that change nothing where a token sees itself alone: its share of one score is one, whatever the score is."""
BOTH = frozenset({"n_head", "qkv_by_head", "qkv_order", "qkv_in_out", "positions", "norm_unbiased", "norm_eps_outside"})
"""Facts that may change both what one token gives and what several do. The others are told by one token alone."""


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
    probes = _probes(questions, author, avoid)
    values, error = questions.now, author_error(questions.reading(questions.now), probes).max().item()
    if error > tolerance:
        # One token sees itself alone, so that most facts of attention can wait; what fits no token fits no text.
        alone = [_first_tokens(probes, author)]
        search, (first, *light) = _light(questions, [*alone, *probes])
        values = Descent(search, [first], questions.choices.keys() - ATTENTION, tolerance, tolerance).run(values)
        error = author_error(questions.reading(values), alone).max().item()
        if error > tolerance:
            raise UserError(" ".join(filter(None, (_no_reading(facts, error, ALONE), doubt))))
        # RoPE's table turns no token alone, so that its rounding is only now in the way.
        largest = max(expected.abs().max().item() for _, expected in probes)
        near = max(tolerance, ROTATION_TOLERANCE * largest) if gpt.rope else tolerance
        names = questions.choices.keys() & (ATTENTION | BOTH)
        values = Descent(search, light[1:], names, tolerance, near).run(values)
        # The short probes are shorter than most windows.
        values = Descent(search, light[:1], questions.choices.keys() & WINDOWS, tolerance, near).run(values)
        error = author_error(questions.reading(values), probes).max().item()
        if error > (near if questions.reading(values).rope else tolerance):
            raise UserError(" ".join(filter(None, (_no_reading(facts, error, TOGETHER), doubt))))
        tolerance = max(tolerance, error)
    unseen, values = _with_context(questions, values, author, probes, tolerance)
    gpt = questions.adopt(values, Source.REFERENCE)
    for fact in facts:
        # No logit shows the context length.
        if fact.status is not Status.SHOWN and not fact.stated and fact.name not in ("context_length", *unseen):
            fact.settle(Source.REFERENCE, f"logits within {error:.0e}")
        if fact.name == "embedding_scale" and (alike := _same_scales(gpt)):
            fact.detail = "; ".join(filter(None, (fact.detail, alike)))
    return gpt, error


def _same_scales(gpt: CanonicalGPT) -> str:
    """What computes the same as a model's scales of embeddings and residuals, where no table of positions is added.

    Norms take a common factor of the stream away, if their epsilon has its square.
    """
    scaled = gpt.residual_scale != 1 or gpt.embedding_scale != 1
    normed = gpt.norm_placement in ("pre", "both") and gpt.final_norm and not gpt.embedding_norm
    if not scaled or not normed or gpt.residual_scaled != "both" or "position_embedding.weight" in gpt.tensors:
        return ""
    embedding, eps = gpt.embedding_scale / gpt.residual_scale, gpt.norm_eps / gpt.residual_scale**2
    return f"for any s, {embedding:.6g} s, residual_scale s and norm_eps {eps:.6g} s² compute the same"


def _with_context(
    questions: Questions, values: Values, author: Callable[[Tensor], Tensor], probes: Probes, tolerance: float
) -> tuple[frozenset[str], Values]:
    """The values with a window that a text as long as the context shows, where the probes of a large model are shorter.

    Returns:
        The facts that such a text would show and that cost too much to ask, and the values.

    Raises:
        UserError: no window gives the author's logits.
    """
    gpt, (first, _) = questions.reading(values), probes[0]
    parameters = sum(tensor.numel() for tensor in gpt.tensors.values())
    if first.shape[1] >= gpt.context_length:
        return frozenset(), values
    if parameters * gpt.context_length > LONG_WORK:
        return WINDOWS, values
    ids = first.repeat(1, -(-gpt.context_length // first.shape[1]))[:, : gpt.context_length]
    text = [(ids, author(ids))]
    most = LONGER * tolerance
    values = Descent(questions, text, questions.choices.keys() & WINDOWS, most, most).run(values)
    if (error := author_error(questions.reading(values), text).max().item()) > most:
        raise UserError(
            f"Your own module computes what Fledge reads for {first.shape[1]} tokens, and something else for a text of "
            f"{gpt.context_length} (logits differ by {error:.1e}): what does it do to long texts?"
        )
    return frozenset(), values


def _no_reading(facts: list[Fact], closest: float, where: str) -> str:
    stated = ", ".join(f"{fact} ({fact.said_by})" for fact in facts if fact.stated)
    question = (
        f"Is what you stated right: {stated}?" if stated else f"No reading that Fledge knows does what it does. {where}"
    )
    return (
        "Your own module computes something else than these tensors mean to Fledge: logits differ by "
        f"{closest:.1e} under the closest reading. {question}"
    )


def _probes(questions: Questions, author: Callable[[Tensor], Tensor], avoid: Collection[int]) -> Probes:
    """Token ids with the author's logits; the longest are shorter than a table of positions that has unread rows."""
    gpt, refused = questions.gpt, None
    for unread in OFFSETS if "position_offset" in questions.choices else OFFSETS[:1]:
        try:
            shorter = replace(gpt, context_length=max(1, gpt.context_length - unread))
            return [(ids, author(ids)) for ids in probe_ids(shorter, avoid)]
        except UserError as error:
            refused = refused or error
    assert refused
    raise refused


def _light(questions: Questions, probes: Probes) -> tuple[Questions, Probes]:
    """The questions and probes with some of the vocabulary's logits and with weights in float64 already.

    A search passes hundreds of readings; of a large model, widening and the head take most of the time.
    """
    gpt, step = questions.gpt, max(1, questions.gpt.vocab_size // COLUMNS)
    if "ends_order" in questions.choices or any(is_log_probabilities(expected) for _, expected in probes):
        return questions, probes
    kept = ("token_embedding.weight", "head.weight", "head.bias")
    tensors = {name: x if name in kept else x.double() for name, x in gpt.tensors.items()}
    tensors |= {name: gpt.tensors[name][::step].double() for name in kept[1:] if name in tensors}
    light = Questions(replace(gpt, tensors=tensors), questions.facts)
    return light, [(ids, expected[..., ::step]) for ids, expected in probes]


def _first_tokens(probes: Probes, author: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Some tokens of the probes by themselves (N, 1), with the author's logits (N, 1, V)."""
    ids, _ = probes[1]
    alone = ids[:2].flatten()[:, None]
    try:
        return alone, author(alone)
    except UserError:  # it wants texts of one length
        return ids[:, :1], author(ids)[:, :1]
