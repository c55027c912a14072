"""Measures what a quantised model has lost, in the program that will run it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.encoding import IGNORED, encode_prompt
from fledge.errors import UserError
from fledge.evaluation.intervals import Ratio, interval, means, paired_difference
from fledge.evaluation.measuring import completion_nats, loss_ratios, supervised_text
from fledge.evaluation.prompts import open_prompts
from fledge.exporting.programs import Program
from fledge.generation.answers import answer_all, answer_of, continue_each
from fledge.messages import Answer, Messages
from fledge.models import context_of
from fledge.sampling import Sampling
from fledge.tasks import FOLLOWING

MOST_LOST_BITS = 0.02  # largest increase, as a share of the original's bits per byte
MOST_LOST_OBEDIENCE = 0.05  # largest loss, as a share of all prompts, if the 95% interval excludes 0
TEXTS = 32  # texts that the model itself samples, if there is no dataset
BEGINNING = 8  # tokens at the beginning of such a text that both models continue
GREEDY = Sampling(temperature=0, max_new_tokens=300)


@dataclass
class Trial:
    """The data that both models are measured on.

    `prompts` are answered greedily. The loss is measured on `rows`, which have `input_ids` and `labels`. `score`
    computes the share of prompts followed; without a dataset it is `None`.
    """

    prompts: list[list[int]]
    rows: list[dict[str, list[int]]]
    on: str
    score: Callable[[list[Answer]], Ratio] | None = None


def held_out(data: Path, task_file: str | None, tokenizer: PreTrainedTokenizerBase, num_prompts: int) -> Trial:
    """The prompts and answers of a dataset's test split.

    Raises:
        UserError: see `open_prompts`; or the dataset is encoded with another vocabulary than the model's.
    """
    prompts = open_prompts(data, task_file, "test", num_prompts, 1)
    if prompts.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{data} has another vocabulary than the model; name the dataset it was trained on.")
    scorer = prompts.task.scorer(prompts.train_rows, [])
    weights = np.array(prompts.task.weights(prompts.rows), dtype=float)

    def score(answers: list[Answer]) -> Ratio:
        return means(scorer.score(prompts.rows, answers), 1, weights)[FOLLOWING]

    return Trial(prompts.ids, prompts.encoded, f"the held-out answers of {data}", score)


def self_written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Messages) -> Trial:
    """Texts that the model itself samples: the loss of another model on them measures the KL divergence.

    `example` is the prompt; a model without a chat template begins a document.
    """
    if tokenizer.chat_template:
        prompt = encode_prompt(tokenizer, example or [{"role": "user", "content": "Tell me something."}])
    else:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        prompt = [0 if begin is None else begin]
    drawn = Sampling(temperature=1, top_p=1, max_new_tokens=200)
    end = cast(int | None, tokenizer.eos_token_id)
    texts = [ids for _, ids in sorted(continue_each(model, end, [prompt] * TEXTS, drawn, TEXTS))]
    rows = [{"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids} for ids in texts]
    rows = [row for row in rows if supervised_text(tokenizer, row)]
    return Trial([row["input_ids"][: len(prompt) + BEGINNING] for row in rows], rows, f"{len(rows)} texts of its own")


@dataclass
class Verdict:
    """The measured loss, for `export.json` (`record`), and a sentence for each limit that it exceeds (`faults`)."""

    record: dict
    faults: list[str]

    def __str__(self) -> str:
        bits, same = self.record["bits_per_byte"], self.record["same_greedy_answers"]
        lost = "{value:+.4f} bits per byte (95% interval {low:+.4f} to {high:+.4f}".format(**bits["lost"])
        said = [
            f"logits within {self.record['largest_logit_error']:.1e} of the largest one",
            f"{lost}, from {bits['original']:.4f}) on {self.record['measured_on']}",
            f"{same['value']:.0%} of {same['n']} greedy answers are the same",
        ]
        if followed := self.record.get(FOLLOWING):
            value, low, high = (100 * followed["difference"][name] for name in ("value", "low", "high"))
            said.append(
                f"prompts followed {followed['original']:.1%} to {followed['quantised']:.1%} ({value:+.1f} points, 95% "
                f"interval {low:+.1f} to {high:+.1f}; greedy)"
            )
        return "; ".join(said) + "."


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    program: Program,
    trial: Trial,
    error: float,
    tell: Callable[[int], None],
) -> Verdict:
    """Measures what a quantised model in its program loses compared with `model`.

    `error` is the largest error of its logits, already measured. `tell` is called with the number of prompts done.
    """
    texts = [supervised_text(tokenizer, row) for row in trial.rows]
    nats = [row.cpu() for row in completion_nats(model, tokenizer, trial.rows)]
    bits = loss_ratios(nats, texts)["bits_per_byte"]
    quantised_bits = loss_ratios([_nats(program, row) for row in trial.rows], texts)["bits_per_byte"]
    original = answer_all(model, tokenizer, trial.prompts, GREEDY, 64, lambda done: None)
    context = context_of(model.config)
    quantised = []
    for prompt in trial.prompts:
        quantised.append(_answer(program, tokenizer, prompt, context))
        tell(len(quantised))
    same = np.array([float(one.text == other.text) for one, other in zip(original, quantised, strict=True)])
    lost = paired_difference(bits, quantised_bits)
    assert lost
    values = float(bits.value()), float(quantised_bits.value())
    record: dict[str, Any] = {
        "measured_on": trial.on,
        "largest_logit_error": error,
        "bits_per_byte": {"original": values[0], "quantised": values[1], "lost": lost},
        "same_greedy_answers": interval(Ratio(same, np.ones_like(same))),
    }
    faults = []
    if lost["value"] > MOST_LOST_BITS * values[0]:
        faults.append(f"it loses {lost['value'] / values[0]:.1%} of the bits per byte (limit {MOST_LOST_BITS:.0%})")
    if trial.score:
        record[FOLLOWING] = _followed(trial.score(original), trial.score(quantised))
        difference = record[FOLLOWING]["difference"]
        if difference["value"] < -MOST_LOST_OBEDIENCE and difference["high"] < 0:
            faults.append(
                f"it follows {-100 * difference['value']:.1f} points fewer prompts (limit {MOST_LOST_OBEDIENCE:.0%})"
            )
    return Verdict(record, faults)


def _followed(before: Ratio, after: Ratio) -> dict[str, Any]:
    """The share of prompts that either model follows, and their difference."""
    shares = {"original": float(before.value()), "quantised": float(after.value())}
    return shares | {"difference": cast(dict, paired_difference(before, after))}


def _nats(program: Program, row: dict[str, list[int]]) -> torch.Tensor:
    """The negative log-likelihood (S,) of a row's supervised tokens."""
    program.restart()
    logits = torch.from_numpy(program.read(row["input_ids"])[:-1])
    labels = torch.tensor(row["labels"][1:])
    kept = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")


def _answer(program: Program, tokenizer: PreTrainedTokenizerBase, prompt: list[int], context: int) -> Answer:
    """The greedy answer, as `answer_each` gives it."""
    program.restart()
    ids: list[int] = []
    new = prompt
    while len(ids) < min(GREEDY.max_new_tokens, context - len(prompt)):
        new = [int(program.read(new)[-1].argmax())]
        ids += new
        if new[0] == tokenizer.eos_token_id:
            break
    return answer_of(tokenizer, ids)
