"""Compares readings of one model on a text, by paired differences of their loss.

A reading is ruled out if its loss is higher by `CLEARLY` standard errors, and by about as much as the model itself
predicts: if the chosen reading p is the model, its text is much like what p would write, and there the loss of another
reading q is higher by KL(p‖q). A difference far from that comes from unfinished training, and its sign is random. So is
that of a difference too small for a text (`TELLABLE`): exact and tanh GELU, or two epsilons.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.questions import LAST, MATTERS, Key, Questions, Values, change_of, is_louder, is_rare, key_of
from fledge.checkpoints.text_loss import BATCH_NUMBERS, losses_of, text_losses

CLEARLY = 4.0
"""Standard errors of the mean paired difference by which a reading must be worse to be ruled out."""

AGREES = 3.0
"""By which factor the difference in loss may lie above or below KL(chosen‖other)."""

TELLABLE = 1e-3
"""KL(chosen‖other) in nats per token below which text cannot decide."""

FIRST_TOKENS = 2048

WORK = 1.5e12
"""Parameters (a million at least) times tokens that the search may cost."""

PAIRS = 64
"""Pairs of facts that are tried at most, in each round."""

FEWEST = 16
"""Windows from which a standard error means something."""

GROUPS = 32
"""Neighbouring windows share a subject: they are grouped into so many parts of the text for the standard error."""


class Outcome(StrEnum):
    """What the text says about another reading."""

    WORSE = "worse"
    OPEN = "not ruled out"
    TOO_CLOSE = "too close for any text"


@dataclass
class Comparison:
    """Another reading compared with the chosen one.

    `difference` is the mean difference of the loss in nats, `errors` the same in standard errors, `divergence` is
    KL(chosen‖other), and `matters` says that the logits differ.
    """

    difference: float
    errors: float
    divergence: float
    matters: bool

    @property
    def worse(self) -> bool:
        agrees = self.divergence / AGREES <= self.difference <= self.divergence * AGREES
        return self.tellable and self.errors >= CLEARLY and agrees

    @property
    def better(self) -> bool:
        return self.tellable and -AGREES * self.divergence <= self.difference < 0

    @property
    def tellable(self) -> bool:
        return self.divergence >= TELLABLE

    @property
    def outcome(self) -> Outcome:
        if self.worse:
            return Outcome.WORSE
        return Outcome.OPEN if self.tellable else Outcome.TOO_CLOSE


Compared = list[tuple[Values, Comparison]]
"""Changes of the chosen values, each with what it would give."""


class Race:
    """Readings of one model on windows of a text (N, T + 1), each measured on as many of the first as it needs.

    The windows are in random order; `places` (N,) are their places in the text.
    """

    def __init__(self, questions: Questions, windows: Tensor, places: Tensor):
        self.questions, self.windows, self.places = questions, windows, places
        self.losses: dict[Key, Tensor] = {}
        self.left: dict[Key, int] = {}
        self.divergences: dict[tuple[Key, Key], tuple[float, bool]] = {}
        parameters = sum(tensor.numel() for tensor in questions.gpt.tensors.values())
        length, vocab_size = windows.shape[1] - 1, questions.gpt.vocab_size
        self.work, self.per_window = 0.0, max(parameters, 1e6) * length
        self.first = min(len(windows), max(1, FIRST_TOKENS // length))
        rows = max(1, min(BATCH_NUMBERS // 4 // (length * vocab_size), FIRST_TOKENS // 2 // length))
        self.sample = windows[:rows]
        self.kept: tuple[Key, Tensor] | None = None  # a reading and its logits on the sample: those of the chosen one

    def measure(self, values: Values, count: int) -> Tensor:
        """Mean loss of each of the first `count` windows or more under these values."""
        key = key_of(values)
        known = self.losses.get(key, torch.empty(0))
        if len(known) < count:
            new = text_losses(self.questions.reading(values), self.windows[len(known) : count])
            known = self.losses[key] = torch.cat([known, new])
            self.work += self.per_window * len(new)
        return known

    def compare(self, chosen: Values, other: Values) -> Comparison:
        """Compares two readings on the windows on which both were measured."""
        divergence, matters = self._divergence(chosen, other)
        here, there = self.measure(chosen, self.first), self.measure(other, self.first)
        count = min(len(here), len(there))
        difference = (there[:count] - here[:count]).double().nan_to_num(math.inf)
        if not difference.isfinite().all():
            return Comparison(math.inf, math.inf, divergence, matters)
        error = standard_error(difference, self.places[:count])
        mean = difference.mean().item()
        errors = mean / error if error else math.copysign(math.inf, mean)
        return Comparison(mean, errors, divergence, matters)

    def _divergence(self, chosen: Values, other: Values) -> tuple[float, bool]:
        """KL(chosen‖other) in nats per token, and whether the logits differ by more than `MATTERS`."""
        pair = key_of(chosen), key_of(other)
        if pair not in self.divergences:
            if self.kept is None or self.kept[0] != pair[0]:
                self.kept = pair[0], self._logits(chosen)
            p, q = self.kept[1], self._logits(other)
            p_log, q_log = p.log_softmax(-1), q.log_softmax(-1)
            divergence = (p_log.exp() * (p_log - q_log)).sum(-1).mean().nan_to_num(math.inf).item()
            self.divergences[pair] = divergence, change_of(p, q) > MATTERS
        return self.divergences[pair]

    def _logits(self, values: Values) -> Tensor:
        """A reading's logits on the sample, whose losses are known with them."""
        logits = canonical_logits(self.questions.reading(values), self.sample[:, :-1], torch.float32)
        self.work += self.per_window * len(self.sample)
        if key_of(values) not in self.losses:
            self.losses[key_of(values)] = losses_of(logits, self.sample)
        return logits

    def run(self, values: Values) -> tuple[Values, Compared]:
        """Moves to better readings until there is none, and uses more text until every other reading is ruled out.

        Returns:
            The chosen values, and how every single change and the pairs that could be afforded compare with them.
        """
        while True:
            others, better = [], None
            # Rare values are tried last: they could compensate for a common value that is still wrong.
            for moves in (self._common, self._affordable, self._rare):
                others += moves(values)
                if better := self._better(values, others):
                    break
            else:
                return values, [(changes, self.compare(values, values | changes)) for changes in others]
            self.left[key_of(values)] = len(self.measure(values, self.first))
            values = better

    def _common(self, values: Values) -> list[Values]:
        return [changes for changes in self.questions.singles(values) if not changes.keys() & LAST]

    def _rare(self, values: Values) -> list[Values]:
        return [changes for changes in self.questions.singles(values) if changes.keys() & LAST]

    def _affordable(self, values: Values) -> list[Values]:
        """Pairs of changes, those first whose single changes cost the least, as many as the work allows."""
        costs = {key_of(changes): self.compare(values, values | changes).difference for changes in self._common(values)}
        pairs = self.questions.pairs(values)
        pairs.sort(key=lambda pair: sum(costs.get(frozenset([change]), 0.0) for change in pair.items()))
        left = (WORK - self.work) / (self.per_window * self.first)
        return pairs[: min(PAIRS, max(len(self.questions.open), int(left)))]

    def _better(self, values: Values, others: list[Values]) -> Values | None:
        """The best reading that does better than `values`, once all others were measured on enough text."""
        while True:
            compared = [(changes, self.compare(values, values | changes)) for changes in others]
            better = [(changes, one) for changes, one in compared if self._wins(one, values, changes)]
            if better:
                changes, _ = min(better, key=lambda item: item[1].difference)
                return values | changes
            unsure = [values | changes for changes, one in compared if one.tellable and not one.worse]
            counts = {len(self.losses[key_of(other)]) for other in unsure}
            if not counts or min(counts) == len(self.windows) or self.work > WORK:
                return None
            count = min(2 * min(counts), len(self.windows))
            for one in (values, *unsure):
                self.measure(one, count)

    def _wins(self, comparison: Comparison, values: Values, changes: Values) -> bool:
        """What is assumed gives way to whatever does better, but to what few authors have, and against the word of a
        layout or a config, only if that clearly does better, and never to another loudness of a part.

        A reading that was left is taken again only because of text that was not read by then.
        """
        key = key_of(values | changes)
        if len(self.losses[key]) <= self.left.get(key, 0) or is_louder(changes):
            return False
        is_open = changes.keys() <= self.questions.open and not is_rare(changes)
        return comparison.better and (is_open or comparison.errors <= -CLEARLY)


def standard_error(difference: Tensor, places: Tensor) -> float:
    """Of the mean of paired differences (N,): the larger one of windows by themselves and of parts of the text."""
    count = len(difference)
    if count < FEWEST:
        return math.inf
    alone = difference.std().item() / count**0.5
    if count < 2 * GROUPS:
        return alone
    parts = torch.stack([part.mean() for part in difference[places.argsort()].tensor_split(GROUPS)])
    return max(alone, parts.std().item() / GROUPS**0.5)
