"""Summarises a conversion: the table of facts, what is still assumed, and the verdict."""

from pathlib import Path

from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.probe_text import Trial
from fledge.checkpoints.questions import is_usual
from fledge.checkpoints.race import Outcome
from fledge.errors import UserError

FLAGS = {"n_head", "activation", "attention_scale", "norm_eps"}
SHOWN_TRIALS = 20
RULES = {"head": "1/sqrt(width of a head)", "width": "1/sqrt(width)", "none": "1"}
RULES |= {f"head, {factor}": f"{factor}^2/sqrt(width of a head)" for factor in (1.15, 1.2)}


def facts_table(facts: list[Fact]) -> str:
    """A line per fact: its status, its value and its source."""
    lines = []
    for fact in facts:
        source = "stated by you" if fact.stated else fact.said_by
        detail = f" ({fact.detail})" if fact.detail else ""
        value = f"{fact.value:.6g}" if isinstance(fact.value, float) else str(fact.value)
        lines.append(f"  {fact.status:<8} {fact.name:<16} {value:<12} {source}{detail}")
    return "\n".join(lines)


def trials_table(trials: list[Trial]) -> str:
    """The losses of other values of one or two facts, the closest first."""
    trials = sorted(trials, key=lambda trial: trial.score)
    kept = [trial for trial in trials if len(trial.values) == 1 or trial.verdict is not Outcome.WORSE][:SHOWN_TRIALS]
    lines = [f"  Chosen: {trials[0].chosen:.4f} nats per token. Other readings:"]
    for trial in kept:
        values = " and ".join(f"{name} {_spelled(name, value)}" for name, value in trial.values.items())
        lines.append(f"    {trial.score:8.4f}  {trial.verdict:<22} {values}")
    return "\n".join(lines)


def verdict(facts: list[Fact]) -> str:
    """The last word on a conversion, which `conversion.json` and the model card repeat.

    Only the author's module proves one: code may compute what no tensor shows and nobody asked about.
    """
    if assumed := [str(fact) for fact in facts if fact.assumed]:
        return f"Converted; assumed, not proven: {', '.join(assumed)}."
    settled = [fact for fact in facts if fact.status is Status.SETTLED and fact.source is not Source.NO_EFFECT]
    by: dict[str, list[str]] = {}
    for fact in settled:
        if not fact.stated:
            by.setdefault(fact.said_by, []).append(fact.name)
    if stated := [str(fact) for fact in settled if fact.stated]:
        by["your word"] = stated
    start = "Converted; nothing that Fledge asks about is assumed, and no code was compared."
    if names := by.pop(Source.REFERENCE, None):
        start = f"Proven against the author's module, which settles {', '.join(names)}."
    elif names := by.pop(Source.PROBE_TEXT, None):
        start = f"Converted; settled by text, as the weights were most likely trained: {', '.join(names)}."
    rest = "; ".join(f"by {source}: {', '.join(names)}" for source, names in by.items())
    return start + (f" Settled {rest}." if rest else "")


def leave_to_code(facts: list[Fact], code: str) -> None:
    """Reverts facts that text and layouts settled, because code that may have trained the model was not run.

    Text shows how the weights were trained, which need not be what the code computes: authors change it afterwards.
    Names of tensors show which code base somebody began with, and not what they changed in it.
    """
    for fact in facts:
        if fact.source in (Source.AUTHORS, Source.PROBE_TEXT, Source.UNTOLD) and fact.status is Status.SETTLED:
            fact.status, fact.detail = Status.ASSUMED, "; ".join(filter(None, (fact.detail, f"{code} was not asked")))


def refuse_assumptions(
    facts: list[Fact], rivals: dict[str, list[object]], code: tuple[Path, str] | None = None, by_text: bool = False
) -> None:
    """Stops a conversion that rests on assumptions.

    Args:
        facts: all that it rests on.
        rivals: what else each could be.
        code: the folder and `FILE:CLASS` of code beside the checkpoint that has its tensors, and was not run.
        by_text: whether a text was read.

    Raises:
        UserError: which they are, what else each could be, and what settles them.
    """
    assumed = [fact for fact in facts if fact.assumed]
    if not assumed:
        return
    count = f"{len(assumed)} fact{'s' * (len(assumed) > 1)}"
    if code:
        folder, found = code
        otherwise = "takes what the text favours" if by_text else "converts as it is"
        raise UserError(
            f"{found} beside the checkpoint may be its code and was not run, and nothing else shows {count} that would "
            f"change the logits ({', '.join(map(str, assumed))}); --reference {folder} settles them by it, and "
            f"--accept_assumptions {otherwise}."
        )
    listed = [_listed(fact, rivals.get(fact.name, [])) for fact in assumed if not is_usual(fact)]
    if lacking := [str(fact) for fact in assumed if is_usual(fact)]:
        listed.append(f"and nothing that few authors have ({', '.join(lacking)}), stated by usual: true in a --mapping")
    text = "" if by_text else ", what settles most is --probe_text FILE with its training text"
    raise UserError(
        f"Nothing shows {count} that would change the logits, so that they are assumed: {'; '.join(listed)}. What "
        f"settles all of them is --reference FOLDER with the code that trained the model{text}; --accept_assumptions "
        "converts as it is."
    )


def _listed(fact: Fact, rivals: list[object]) -> str:
    """A fact, what it could be instead, and the flag or the line of a mapping that states it."""
    value = _spelled(fact.name, fact.value)
    how = f"--{fact.name} {value}" if fact.name in FLAGS else f"{fact.name}: {value} in a --mapping"
    others = ", ".join(_spelled(fact.name, rival) for rival in rivals)
    if fact.name == "activation" and {"gelu", "gelu_tanh"} <= {fact.value, *rivals}:
        how += ' (no text tells gelu and gelu_tanh apart: nn.GELU() is gelu, approximate="tanh" is gelu_tanh)'
    return f"{fact.name} {value}" + (f" (or {others})" if others else "") + f", stated by {how}"


def _spelled(name: str, value: object) -> str:
    if name == "attention_scale" and value in RULES:
        return RULES[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()
