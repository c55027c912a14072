"""`--probe_text`: settles open facts by text. The right reading of a model predicts its training text best.

Readings are compared on growing numbers of the same windows (`race`). Many comparisons do not add up to a higher risk:
only one reading is right, and the risk is that it is ruled out at one of the few sizes.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.facts import Fact, Source
from fledge.checkpoints.questions import Questions, Values, is_usual
from fledge.checkpoints.race import FIRST_TOKENS, WORK, Compared, Comparison, Outcome, Race
from fledge.checkpoints.text_loss import pair_loss, text_losses, text_windows, unigram_loss
from fledge.errors import UserError
from fledge.tokenizers import encoding_of

MOST_TOKENS = 32_768

WINDOW = 256
"""The largest window in tokens; a shorter context has shorter windows."""


@dataclass
class Trial:
    """The loss of other values of one or two facts, in nats per token, compared with the chosen values.

    `errors` are the standard errors by which the text prefers what was chosen.
    """

    values: dict[str, object]
    score: float
    chosen: float
    errors: float
    verdict: Outcome

    def as_dict(self) -> dict[str, object]:
        """The trial as `conversion.json` holds it, with names and values joined."""
        names, values = ", ".join(self.values), ", ".join(map(str, self.values.values()))
        return {"name": names, "value": values} | {k: v for k, v in vars(self).items() if k != "values"}


def settle_by_text(
    gpt: CanonicalGPT, facts: list[Fact], tokenizer: PreTrainedTokenizerBase, file: str
) -> tuple[CanonicalGPT, float, list[Trial]]:
    """Finds the facts under which the model predicts a text best, and settles those that the text decides.

    Returns:
        The model, its loss in nats per token, and what other values would give.

    Raises:
        UserError: the file cannot be read, or no reading predicts it better than the frequencies of its tokens.
    """
    ids = _read_ids(file, tokenizer)
    questions = Questions(gpt, facts)
    parameters = sum(tensor.numel() for tensor in gpt.tensors.values())
    tokens = int(min(MOST_TOKENS, max(2 * FIRST_TOKENS, WORK / 32 / parameters)))
    windows, places = text_windows(ids, min(WINDOW, questions.length), tokens)
    race = Race(questions, windows, places)
    values, compared = race.run(questions.now)
    losses = race.measure(values, len(windows) if race.work < WORK else race.first)
    loss, unigrams, pairs = losses.mean().item(), unigram_loss(ids), pair_loss(ids)
    if not loss < unigrams:
        raise UserError(
            f"The model's loss on {file} is {loss:.2f} nats per token, and the frequencies of its tokens alone give "
            f"{unigrams:.2f}: this text or this tokenizer is not the model's."
        )
    if not loss < pairs:
        for fact in facts:
            if fact.name in questions.open:
                fact.detail = f"a model with a loss of {loss:.2f}, where pairs give {pairs:.2f}, tells little"
        return gpt, text_losses(gpt, windows).mean().item(), []
    if against := _against_code(facts, questions.now, values):
        before = text_losses(gpt, windows).mean().item()
        favoured = vars(questions.reading(values))
        for fact in against:
            other = favoured.get(fact.name, values[fact.name])
            difference = f"{loss:.3f} against {before:.3f} nats per token"
            fact.detail += f"; the text favours {other} ({difference}): the code may have changed after training"
        return gpt, before, []
    gpt = questions.adopt(values, Source.PROBE_TEXT)
    compared = [(changes, comparison) for changes, comparison in compared if comparison.matters]
    for fact in facts:
        if fact.name in questions.open:
            about = [(changes, comparison) for changes, comparison in compared if fact.name in changes]
            _judge(fact, about, used=f"{len(losses) * (windows.shape[1] - 1):,} tokens")
    trials = [Trial(changes, loss + one.difference, loss, one.errors, one.outcome) for changes, one in compared]
    return gpt, loss, trials


def _read_ids(file: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--probe_text {file} cannot be read as text: {error}.") from error
    with encoding_of(f"--probe_text {file}"):
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def _against_code(facts: list[Fact], now: Values, values: Values) -> list[Fact]:
    """The facts that the author's module settled and for which the text prefers another value."""
    return [
        fact
        for fact in facts
        if fact.source is Source.REFERENCE and fact.name in values and values[fact.name] != now[fact.name]
    ]


def _judge(fact: Fact, about: Compared, used: str) -> None:
    """Settles an assumed fact if every other value was ruled out; records how surely, or which values are left."""
    unsure = [changes for changes, comparison in about if not comparison.worse]
    if not about:  # parallel blocks are ruled out with pre-norm ones
        fact.settle(Source.PROBE_TEXT, "no other value goes with what else is settled")
    elif not unsure:
        surely = min(comparison.errors for _, comparison in about)
        fact.settle(Source.PROBE_TEXT, f"by {surely:.0f} standard errors, {used}")
    elif is_usual(fact) and not any(_does_better(one) for _, one in about):
        fact.settle(Source.UNTOLD, f"{used} are predicted better under no other value")
    else:
        fewest = min(map(len, unsure))
        left = dict.fromkeys(_said(changes) for changes in unsure if len(changes) == fewest)
        fact.detail = f"{used} do not rule out {', '.join(left)}"


def _does_better(comparison: Comparison) -> bool:
    return comparison.outcome is Outcome.OPEN and comparison.difference < 0


def _said(changes: Values) -> str:
    return " with ".join(f"{name} {value}" for name, value in changes.items())
