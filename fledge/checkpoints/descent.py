"""The search for the reading under which the canonical GPT computes the logits of the author's module."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.checkpoints.canonical import SCALED, CanonicalGPT, canonical_logits
from fledge.checkpoints.proof import Probes
from fledge.checkpoints.questions import LAST, Key, Questions, Values, key_of
from fledge.errors import UserError

NORMALISED = 1e-6
"""Logits are log-probabilities if the probabilities that they give sum to one within about this."""
NUMBERS = ("embedding_scale", "residual_scale", "logit_scale", "norm_eps", "attention_scale", "rope_theta")
"""Facts with a number that an author may choose freely, and that the logits therefore are fitted for."""
CAPS = ("attention_cap", "logit_cap")
"""The same for those that have a number only if there is such a part."""
FITS = 4
"""How many readings are fitted."""
STEPS, FEW_STEPS = 20, 5
"""Steps of a fit at most, and of one that only compares readings."""
CLOSE = 1e-5
"""Where a fit does not end before it is exact, in logits."""
CLEARLY = 0.8
"""The share of the error that a step with fitted numbers must leave at most."""
COLUMNS = 512
"""About how many tokens of the vocabulary have their logits compared in the search."""


@dataclass
class Descent:
    """Steps to readings whose logits are nearer to the author's, over some probes and by changes of some facts.

    They start from a reading, and then from each reading that is one change away. A step changes one fact, or two if no
    single change helps, because two wrong facts may hide each other. Where steps end, numbers are fitted.

    An error of `good` is none. One of `near` may be rounding: no number is fitted to it, and no other start is taken.
    """

    questions: Questions
    probes: Probes
    names: Collection[str]
    good: float
    near: float
    errors: dict[Key, float] = field(default_factory=dict)
    passed: set[Key] = field(default_factory=set)
    fits: dict[Key, Values] = field(default_factory=dict)

    def run(self, start: Values) -> Values:
        """The first reading whose error is small enough, or else the one with the smallest."""
        best = start
        for find in (lambda: self._lowest(start), lambda: self._fitted(start), lambda: self._lowest_fitted(start)):
            best = min(best, find(), key=self.error)
            if self.error(best) <= self.near:
                return best
        for changes in self._kept(self.questions.singles(start)):
            best = min(best, self._lowest(start | changes), key=self.error)
            if self.error(best) <= self.near:
                return best
        return best

    def error(self, values: Values) -> float:
        """Largest |Δ logit|, a mean over the probes. Many descents pass a reading."""
        key = key_of(values)
        if key not in self.errors:
            self.errors[key] = author_error(self.questions.reading(values), self.probes).mean().item()
        return self.errors[key]

    def _kept(self, changes: list[Values]) -> list[Values]:
        return [change for change in changes if change.keys() <= {*self.names}]

    def _lowest(self, values: Values) -> Values:
        """Where steps lead from a reading; as far as the first reading from which they were taken before."""
        while self.error(values) > self.good and key_of(values) not in self.passed:
            self.passed.add(key_of(values))
            lower = self._step(values)
            if lower is None:
                is_fitted = self.error(values) > self.near and len(self.fits) < FITS
                return min(values, self._fitted(values), key=self.error) if is_fitted else values
            values = lower
        return values

    def _lowest_fitted(self, values: Values) -> Values:
        """Where steps of one common fact lead, if the numbers are fitted anew at each."""
        values = self._roughly_fitted(values)
        while self.error(values) > self.near:
            changes = [one for one in self._kept(self.questions.singles(values)) if not one.keys() & {*LAST, *NUMBERS}]
            tried = [self._roughly_fitted(values | one) for one in changes]
            best = min(tried, key=self.error, default=values)
            if not self.error(best) < CLEARLY * self.error(values):
                break
            values = self._fitted(best)
        return values

    def _step(self, values: Values) -> Values | None:
        """The best change of one fact, or else of two, if it lowers the error."""
        for moves in (self.questions.singles, self.questions.pairs):
            tried = [values | changes for changes in self._kept(moves(values))]
            best = min(tried, key=self.error, default=None)
            if best is not None and self.error(best) < self.error(values):
                return best
        return None

    def _fitted(self, values: Values) -> Values:
        """The reading with the numbers that give the smallest error, as short as they may be written."""
        key = key_of(values)
        if key not in self.fits:
            # Scaled embeddings and scaled residuals are alike but for a table of positions: one is tried alone first.
            best = min(values, self._fit(values, STEPS), key=self.error)
            if {"residual_scale", "residual_scaled"} <= {*self.names}:
                for place in dict.fromkeys([values["residual_scaled"], *SCALED]):
                    if self.error(best) <= self.near:
                        break
                    placed = self._fit(values | {"residual_scaled": place}, STEPS, scales_residuals=True)
                    best = min(best, placed, key=self.error)
            self.fits[key] = best
        return self.fits[key]

    def _roughly_fitted(self, values: Values) -> Values:
        """The same with few steps, and with the scale of residuals as it is."""
        return min(values, self._fit(values, FEW_STEPS), key=self.error)

    def _fit(self, values: Values, steps: int, scales_residuals: bool = False) -> Values:
        names = [name for name in self._numbers(values) if scales_residuals or name != "residual_scale"]
        return self._rounded(fit(self.questions, values, names, self.probes, steps))

    def _numbers(self, values: Values) -> list[str]:
        capped = [name for name in CAPS if values.get(name) is not None]
        return [name for name in (*NUMBERS, *capped) if name in self.names and name in values]

    def _rounded(self, values: Values) -> Values:
        """The values with numbers as short as they may be written, if they are right up to rounding."""
        if (error := self.error(values)) > self.near:
            return values
        for name in self._numbers(values):
            if isinstance(values[name], float):
                # The usual number first: 1/√8 has more digits than are tried.
                tried = [self.questions.now[name], *(float(f"{values[name]:.{digits}g}") for digits in range(1, 8))]
                others = (values | {name: number} for number in tried)
                values = next((other for other in others if self.error(other) <= max(self.good, 2 * error)), values)
        return values


def fit(questions: Questions, values: Values, names: list[str], probes: Probes, steps: int) -> Values:
    """The values with numbers under which the logits are nearest to the author's: Levenberg's and Marquardt's steps.

    Numbers are positive, so their logarithms are fitted.
    """
    numbers = torch.tensor([number_of(questions, values, name) for name in names], dtype=torch.float64).log()

    def given(logs: Tensor) -> Values:
        return values | dict(zip(names, logs.exp().tolist(), strict=True))

    def differences(logs: Tensor) -> Tensor:
        parts = compared(questions.reading(given(logs)), probes)
        return torch.cat([(ours - theirs).flatten() for ours, theirs in parts])

    now, damping = differences(numbers), 1e-3
    for _ in range(steps):
        if not names or not now.isfinite().all() or not now.any():
            break
        moved = [numbers + 1e-6 * torch.eye(len(names), dtype=torch.float64)[i] for i in range(len(names))]
        slopes = torch.stack([(differences(logs) - now) / 1e-6 for logs in moved], dim=1)
        sizes = slopes.norm(dim=0).clamp_min(1e-30)
        while damping < 1e6:
            damped = torch.cat([slopes / sizes, damping * torch.eye(len(names), dtype=torch.float64)])
            wanted = torch.cat([-now, torch.zeros(len(names), dtype=torch.float64)])
            step = (torch.linalg.lstsq(damped, wanted[:, None]).solution[:, 0] / sizes).clamp(-2, 2)
            other = differences(numbers + step)
            if other.isfinite().all() and other.square().sum() < now.square().sum():
                break
            damping *= 10
        else:
            break
        gain = 1 - (other.square().sum() / now.square().sum()).item()
        numbers, now, damping = numbers + step, other, damping / 10
        # Far from the author's logits it ends sooner than near them, where only an epsilon may still be off.
        if gain < 1e-3 and (damping < 1e-12 or now.abs().max() > CLOSE):
            break
    return given(numbers)


def number_of(questions: Questions, values: Values, name: str) -> float:
    """The number of a fact; an attention scale may be a rule."""
    return vars(questions.reading(values))[name] if name == "attention_scale" else values[name]


def author_error(gpt: CanonicalGPT, probes: Probes) -> Tensor:
    """Largest |Δ logit| in float64 for each probe (N,) between the canonical GPT and the author's logits."""
    if any(ids.shape[1] > gpt.context_length for ids, _ in probes):
        return torch.tensor([math.inf])
    return torch.stack([(ours - theirs).abs().max() for ours, theirs in compared(gpt, probes)]).nan_to_num(math.inf)


def compared(gpt: CanonicalGPT, probes: Probes) -> list[tuple[Tensor, Tensor]]:
    """For each probe the logits of the canonical GPT, and the author's.

    Some authors' forward returns the last position alone; then that one is compared. Others return log-probabilities;
    then those are.
    """
    pairs = []
    for ids, expected in probes:
        logits = canonical_logits(gpt, ids)[:, -expected.shape[1] :]
        if is_log_probabilities(expected):
            logits = logits.log_softmax(-1)
        if logits.shape != expected.shape:
            raise UserError(f"--reference gives logits {tuple(expected.shape)} where {tuple(logits.shape)} are due.")
        pairs.append((logits, expected))
    return pairs


def is_log_probabilities(logits: Tensor) -> bool:
    """Whether these are log-probabilities, which sum to one as probabilities."""
    return bool(logits.logsumexp(-1).abs().max() < NORMALISED)
