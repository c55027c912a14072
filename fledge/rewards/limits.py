"""The limits of a run with rewards on qualities that are not rewarded, and the best model within them."""

import math
from dataclasses import dataclass, field

from fledge.tasks import FOLLOWING

SURE = 2.0  # standard errors by which a mean over few answers must differ to count
Look = dict[str, float]  # `step`, and each figure of what was seen then


@dataclass
class WatchArguments:
    watch_prompts: int = field(
        default=64, metadata={"help": "validation prompts answered at each look, every eval_steps; 0: no looks"}
    )
    watch_patience: int = field(
        default=2, metadata={"help": "stop after this many looks in a row outside the limits; 0: never"}
    )
    max_distinct_2_drop: float = field(
        default=0.10, metadata={"help": "limit: distinct-2 may fall by this share of what it was at the start"}
    )
    max_loss_rise: float = field(
        default=0.15, metadata={"help": "limit: the loss on the references may rise by this share of the start's"}
    )
    max_coherence_drop: float = field(
        default=0.0, metadata={"help": "limit: coherence may fall by so much, and by what chance explains"}
    )
    max_same_ending_rise: float = field(
        default=0.15, metadata={"help": "limit: the share of answers that end alike may rise by so much"}
    )
    min_eos_rate: float = field(
        default=0.98, metadata={"help": "limit: the share of answers that stop, unless it was lower at the start"}
    )


def outside(look: Look, start: Look, limits: WatchArguments) -> list[str]:
    """The limits that a look exceeds, each in words."""
    variety = (1 - limits.max_distinct_2_drop) * start["distinct_2"]
    loss = (1 + limits.max_loss_rise) * start["completion_loss"]
    stopping = min(limits.min_eos_rate, start["eos_rate"])
    alike = start["same_ending"] + limits.max_same_ending_rise
    said = []
    if look["distinct_2"] < variety:
        said.append(f"distinct-2 is {look['distinct_2']:.1%}, and its limit {variety:.1%}")
    if not look["completion_loss"] <= loss:  # true for NaN as well
        said.append(f"the completion loss is {look['completion_loss']:.3f}, and its limit {loss:.3f}")
    if look["same_ending"] > alike:
        said.append(f"{look['same_ending']:.1%} of the answers end alike, and the limit is {alike:.1%}")
    if look["eos_rate"] < stopping:
        said.append(f"{look['eos_rate']:.1%} of the answers stop, and the limit is {stopping:.1%}")
    if "coherence" in start:
        noise = SURE * math.hypot(look["coherence_error"], start["coherence_error"])
        coherence = start["coherence"] - limits.max_coherence_drop - noise
        if look["coherence"] < coherence:
            said.append(f"coherence is {look['coherence']:.1%}, and its limit {coherence:.1%}")
    return said


def best_of(looks: list[Look], start: Look, limits: WatchArguments) -> Look | None:
    """The look with the highest instruction following within the limits; the earlier one if equal."""
    within = [look for look in looks if not outside(look, start, limits)]
    return max(within, key=lambda look: look[FOLLOWING], default=None)


def broken(looks: list[Look], limits: WatchArguments) -> list[str]:
    """The limits that the last look exceeds, if `watch_patience` looks in a row exceeded some; else an empty list."""
    if not limits.watch_patience or len(looks) <= limits.watch_patience:  # the first look is the start
        return []
    found = [outside(look, looks[0], limits) for look in looks[-limits.watch_patience :]]
    return found[-1] if all(found) else []
