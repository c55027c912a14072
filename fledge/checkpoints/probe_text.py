"""Settles open facts by text: the right reading of a model predicts the text that the model was trained on best.

Readings are compared by paired differences of their loss, on growing numbers of the same windows. A reading is ruled
out when its loss is higher by `CLEARLY` standard errors, and by about as much as the model itself says it should be:
if the chosen reading p is the model, its text is much like what p would write, where the loss of another reading q is
higher by the divergence KL(p‖q). A difference far from it comes from what training has not finished, and its sign is
chance. So is that of a difference too small for text (`TELLABLE`): exact and tanh GELU, or two epsilons.

Only one reading is right, so that many comparisons do not add up: the risk is that this one is ruled out, at the few
sizes at which it is looked at.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.facts import Fact, Source
from fledge.checkpoints.questions import MATTERS, Questions, change_of
from fledge.cli import UserError
from fledge.tokenizers import encoding_of

CLEARLY = 4.0
"""Standard errors of the mean paired difference by which a reading must be worse to be ruled out."""
AGREES = 3.0
"""By which factor the difference in loss may lie above or below KL(chosen‖other)."""
TELLABLE = 1e-3
"""Nats per token of KL(chosen‖other) below which text is not asked."""
FIRST_TOKENS, MOST_TOKENS = 2048, 32_768
WINDOW = 256
"""Tokens of a window at most; a shorter context has shorter windows."""
BATCH_NUMBERS = 1 << 24
"""Logits in memory at a time."""
WORK = 1.5e12
"""Parameters (a million at least) times tokens that the search may cost."""
PAIRS = 64
"""Pairs of facts that are tried at most, in each round."""
FEWEST = 16
"""Windows from which a standard error means something."""
SEEN = 20
"""Times that a pair of tokens must be seen on average, or its frequency says nothing."""
GROUPS = 32
"""Neighbouring windows share a subject: they are grouped into so many parts of the text for the standard error."""


@dataclass
class Trial:
    """What other values of one or two facts would give, in nats per token, beside the loss of what was chosen.

    `verdict` is worse, or the reason for which the text cannot tell.
    """

    name: str
    value: object
    score: float
    chosen: float
    errors: float
    verdict: str


@dataclass
class Verdict:
    """How another reading does against the chosen one: mean difference in nats, its standard errors, KL."""

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


class Race:
    """Readings of one model on windows of a text (N, T + 1), each measured on as many of the first as it needs.

    The windows are in random order; `places` (N,) are their places in the text.
    """

    def __init__(self, questions: Questions, windows: Tensor, places: Tensor):
        self.questions, self.windows, self.places = questions, windows, places
        self.losses: dict[frozenset, Tensor] = {}
        self.left: dict[frozenset, int] = {}
        self.compared: dict[tuple[frozenset, frozenset], tuple[float, bool]] = {}
        parameters = sum(tensor.numel() for tensor in questions.gpt.tensors.values())
        self.work, self.per_window = 0.0, max(parameters, 1e6) * (windows.shape[1] - 1)
        length = windows.shape[1] - 1
        self.first = min(len(windows), max(1, FIRST_TOKENS // length))
        sample = max(1, min(BATCH_NUMBERS // 4 // (length * questions.gpt.vocab_size), FIRST_TOKENS // 2 // length))
        self.sample = windows[: min(sample, len(windows)), :-1]

    def measure(self, values: Mapping[str, object], count: int) -> Tensor:
        """Mean loss of each of the first `count` windows or more under these values."""
        key, known = frozenset(values.items()), self.losses.get(frozenset(values.items()), torch.empty(0))
        if len(known) < count:
            new = text_losses(self.questions.reading(values), self.windows[len(known) : count])
            known = self.losses[key] = torch.cat([known, new])
            self.work += self.per_window * len(new)
        return known

    def verdict(self, chosen: Mapping[str, object], other: Mapping[str, object]) -> Verdict:
        """Compares two readings on the windows on which both were measured."""
        pair = frozenset(chosen.items()), frozenset(other.items())
        if pair not in self.compared:
            readings = (self.questions.reading(one) for one in (chosen, other))
            p, q = (canonical_logits(reading, self.sample, torch.float32) for reading in readings)
            p_log, q_log = p.log_softmax(-1), q.log_softmax(-1)
            divergence = (p_log.exp() * (p_log - q_log)).sum(-1).mean().nan_to_num(math.inf).item()
            self.compared[pair] = divergence, change_of(p, q) > MATTERS
            self.work += 2 * self.per_window * len(self.sample)
        here, there = self.measure(chosen, self.first), self.measure(other, self.first)
        count = min(len(here), len(there))
        difference = (there[:count] - here[:count]).double().nan_to_num(math.inf)
        if not difference.isfinite().all():
            return Verdict(math.inf, math.inf, *self.compared[pair])
        error = standard_error(difference, self.places[:count])
        mean = difference.mean().item()
        return Verdict(mean, mean / error if error else math.copysign(math.inf, mean), *self.compared[pair])

    def run(self, values: dict[str, object]) -> tuple[dict[str, object], list[tuple[dict, Verdict]]]:
        """Moves to better readings until none is left, on more and more text until each other one is ruled out.

        Returns:
            The chosen values, and the verdict on every single change and the pairs that could be afforded.
        """
        while True:
            moves = self.questions.singles(values)
            others = [(changes, {**values, **changes}) for changes in moves]
            if (better := self._better(values, others)) is None:
                pairs = self._affordable(values)
                others += [(changes, {**values, **changes}) for changes in pairs]
                better = self._better(values, others)
            if better is None:
                return values, [(changes, self.verdict(values, other)) for changes, other in others]
            self.left[frozenset(values.items())] = len(self.measure(values, self.first))
            values = better

    def _affordable(self, values: dict[str, object]) -> list[dict[str, object]]:
        """Pairs of changes, those first whose single changes cost the least, as many as the work allows."""
        verdicts = {
            tuple(changes.items()): self.verdict(values, {**values, **changes}).difference
            for changes in self.questions.singles(values)
        }
        pairs = self.questions.pairs(values)
        pairs.sort(key=lambda pair: sum(verdicts.get((item,), 0.0) for item in pair.items()))
        left = (WORK - self.work) / (self.per_window * (self.first + 2 * len(self.sample)))
        return pairs[: min(PAIRS, max(len(self.questions.open), int(left)))]

    def _better(self, values: dict[str, object], others: list[tuple[dict, dict]]) -> dict[str, object] | None:
        """The best reading that does better than `values`, once all others were measured on enough text."""
        while True:
            verdicts = [(self.verdict(values, other), changes, other) for changes, other in others]
            better = [item for item in verdicts if self._wins(*item)]
            if better:
                return min(better, key=lambda item: item[0].difference)[2]
            unsure = [other for verdict, _, other in verdicts if verdict.tellable and not verdict.worse]
            counts = {len(self.losses[frozenset(other.items())]) for other in unsure}
            if not counts or min(counts) == len(self.windows) or self.work > WORK:
                return None
            count = min(2 * min(counts), len(self.windows))
            for one in (values, *unsure):
                self.measure(one, count)

    def _wins(self, verdict: Verdict, changes: Mapping[str, object], other: Mapping[str, object]) -> bool:
        """What is assumed gives way to whatever does better, what a layout or config says only to what clearly does.

        A reading that was left is taken again only because of text that was not read by then.
        """
        key = frozenset(other.items())
        if len(self.losses[key]) <= self.left.get(key, 0):
            return False
        return verdict.better and (changes.keys() <= self.questions.open or verdict.errors <= -CLEARLY)


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


def settle_by_text(
    gpt: CanonicalGPT, facts: list[Fact], tokenizer: PreTrainedTokenizerBase, file: str
) -> tuple[CanonicalGPT, float, list[Trial]]:
    """Finds the facts under which the model predicts a text best; those that are sure rest on it from now on.

    Returns:
        The model, its loss in nats per token, and what other values would give.

    Raises:
        UserError: the file cannot be read, or no reading predicts it better than the frequencies of its tokens.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--probe_text {file} cannot be read as text: {error}.") from error
    with encoding_of(f"--probe_text {file}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    questions = Questions(gpt, facts)
    parameters = sum(tensor.numel() for tensor in gpt.tensors.values())
    tokens = int(min(MOST_TOKENS, max(2 * FIRST_TOKENS, WORK / 32 / parameters)))
    windows, places = text_windows(ids, min(WINDOW, gpt.context_length), tokens)
    race = Race(questions, windows, places)
    values, verdicts = race.run(questions.now)
    losses = race.measure(values, len(windows) if race.work < WORK else race.first)
    loss, unigram = losses.mean().item(), unigram_loss(ids)
    if not loss < unigram:
        raise UserError(
            f"The model's loss on {file} is {loss:.2f} nats per token, and the frequencies of its tokens alone give "
            f"{unigram:.2f}: this text or this tokenizer is not the model's."
        )
    if not loss < pair_loss(ids):
        for fact in facts:
            if fact.name in questions.open:
                fact.detail = f"a model with a loss of {loss:.2f}, where pairs give {pair_loss(ids):.2f}, tells little"
        return gpt, text_losses(gpt, windows).mean().item(), []
    if against := _against_code(facts, questions.now, values):
        before = text_losses(gpt, windows).mean().item()
        favoured = vars(questions.reading(values))
        for fact in against:
            other = favoured.get(fact.name, values[fact.name])
            losses_said = f"{loss:.3f} against {before:.3f} nats per token"
            fact.detail += f"; the text favours {other} ({losses_said}): the code may have changed after training"
        return gpt, before, []
    gpt = questions.adopt(values, Source.PROBE_TEXT)
    used = f"{len(losses) * (windows.shape[1] - 1):,} tokens"
    for fact in facts:
        about = [(changes, verdict) for changes, verdict in verdicts if fact.name in changes and verdict.matters]
        if fact.name in questions.open:
            _judge(fact, about, used)
    return gpt, loss, [_trial(changes, verdict, loss) for changes, verdict in verdicts if verdict.matters]


def _against_code(facts: list[Fact], now: Mapping[str, object], values: Mapping[str, object]) -> list[Fact]:
    """What the author's module settled, and the text would have otherwise. The module is asked what it computes."""
    return [
        fact
        for fact in facts
        if fact.source is Source.REFERENCE and fact.name in values and values[fact.name] != now[fact.name]
    ]


def _judge(fact: Fact, about: list[tuple[dict, Verdict]], used: str) -> None:
    """Settles an assumed fact if every other value was ruled out, and says how surely or what is left."""
    unsure = [changes for changes, verdict in about if not verdict.worse]
    if not about:  # parallel blocks are ruled out with pre-norm ones
        fact.settle(Source.PROBE_TEXT, "no other value goes with what else is settled")
        return
    if not unsure:
        surely = min(verdict.errors for _, verdict in about)
        fact.settle(Source.PROBE_TEXT, f"by {surely:.0f} standard errors, {used}")
        return
    unsure.sort(key=len)
    left = dict.fromkeys(_said(changes) for changes in unsure if len(changes) == len(unsure[0]))
    fact.detail = f"{used} do not rule out {', '.join(left)}"


def _said(changes: Mapping[str, object]) -> str:
    return " with ".join(f"{name} {value}" for name, value in changes.items())


def _trial(changes: Mapping[str, object], verdict: Verdict, loss: float) -> Trial:
    said = "worse" if verdict.worse else "not ruled out" if verdict.tellable else "too close for any text"
    names, values = ", ".join(changes), ", ".join(map(str, changes.values()))
    return Trial(names, values, loss + verdict.difference, loss, verdict.errors, said)


@torch.no_grad()
def text_losses(gpt: CanonicalGPT, windows: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window of token ids (N, T + 1) → (N,), in float32."""
    rows = max(1, BATCH_NUMBERS // ((windows.shape[1] - 1) * gpt.vocab_size))
    losses = []
    for batch in windows.split(min(rows, 256)):
        logits = canonical_logits(gpt, batch[:, :-1], torch.float32)
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1))
    return torch.cat(losses)


def text_windows(ids: list[int], length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Windows (N, T + 1) that share no predicted token, of up to `tokens` in all, spread over the text.

    Returns:
        The windows in random order, the same on every run, and the place of each in the text (N,).

    Raises:
        UserError: the text is shorter than two tokens.
    """
    length = min(length, len(ids) - 1)
    if length < 1:
        raise UserError("The --probe_text holds fewer than two tokens; give some pages of the training text.")
    starts = torch.arange(0, len(ids) - length, length)
    kept = torch.linspace(0, len(starts) - 1, min(len(starts), max(1, tokens // length))).round().long()
    places = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    return torch.tensor(ids)[starts[places, None] + torch.arange(length + 1)], places


def pair_loss(ids: list[int]) -> float:
    """Nats per token that the frequencies of pairs of tokens give; infinite for a text too short to know them.

    A model above it has hardly been trained, and its loss may fall under a wrong reading that makes its parts louder.
    """
    tokens = torch.tensor(ids)
    pairs = torch.stack([tokens[:-1], tokens[1:]], dim=1).unique(dim=0, return_counts=True)[1].double()
    if len(ids) < SEEN * len(pairs):
        return math.inf
    return -(pairs / pairs.sum() * (pairs / pairs.sum()).log()).sum().item() - unigram_loss(ids)


def unigram_loss(ids: list[int]) -> float:
    """Nats per token that the frequencies of a text's own tokens give."""
    counts = torch.tensor(ids).unique(return_counts=True)[1].double()
    return -(counts / len(ids) * (counts / len(ids)).log()).sum().item()
