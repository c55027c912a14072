"""Metrics of an answer's words for any task: repetition, copying, variety, and whether it is an answer at all."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

from transformers import PreTrainedTokenizerBase

from fledge.messages import INPUT_MARK, Answer
from fledge.text.words import as_written

MEANING = {
    "eos_rate": "answers that the model ended itself",
    "answered": "answers that are not empty and do not continue with another prompt",
    "answer_tokens": "length of an answer in tokens",
    "repetition": "share of an answer's word 4-grams that occur earlier in it",
    "copied": "share of an answer's words that lie in a word 8-gram of a training answer",
    "distinct_answers": "answers with the same words as no other answer",
    "same_ending": "answers whose last forty words contain the word 4-gram that is most common there",
    "distinct_2": "different word pairs over all word pairs of all answers",
}
REPEATED_RUN = 4
COPIED_RUN = 8
SHARED_RUN = 4
ENDING = 40  # words
OPENING = 3
CONTENT = "\ue000"  # stands for the content of a message where only the template's text matters


def runs(text: str, length: int) -> Iterator[tuple[str, ...]]:
    """The n-grams of a text, for n = `length`, of words in lower case."""
    return runs_of(as_written(text), length)


def runs_of(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(length)), strict=False)


def repetition(text: str) -> float:
    """Share of an answer's word 4-grams that occur earlier in it."""
    all_runs = list(runs(text, REPEATED_RUN))
    return 1 - len(set(all_runs)) / len(all_runs) if all_runs else 0.0


def copied(texts: list[str], training: Iterable[str]) -> list[float | None]:
    """For each text the share of its words that lie in a word 8-gram of a training text; `None` for shorter texts.

    Only the 8-grams of `texts` are kept in memory, and `training` is read once.
    """
    wanted = {run for text in texts for run in runs(text, COPIED_RUN)}
    found = set()
    for text in training:
        found.update(wanted.intersection(runs(text, COPIED_RUN)))
    shares = []
    for text in texts:
        covered: set[int] = set()
        for begin, run in enumerate(runs(text, COPIED_RUN)):
            if run in found:
                covered.update(range(begin, begin + COPIED_RUN))
        count = len(as_written(text))
        shares.append(len(covered) / count if count >= COPIED_RUN else None)
    return shares


def distinct_2(texts: list[str]) -> list[tuple[float, int]]:
    """Distinct-2 (Li et al. 2016, arXiv:1510.03055), different word pairs over all word pairs, text by text.

    Returns for each text the sum of 1 / (count of the pair in all texts) over its pairs, and the number of its pairs.
    Their sums over all texts are the numerator and the denominator of distinct-2.
    """
    counts = Counter(pair for text in texts for pair in runs(text, 2))
    return [(sum(1 / counts[pair] for pair in runs(text, 2)), max(len(as_written(text)) - 1, 0)) for text in texts]


def unique(texts: list[str]) -> list[bool]:
    """Whether no other text has the same words."""
    counts = Counter(tuple(as_written(text)) for text in texts)
    return [counts[tuple(as_written(text))] == 1 for text in texts]


def ending_runs(text: str) -> set[tuple[str, ...]]:
    """The word 4-grams of the last forty words."""
    return set(runs_of(as_written(text)[-ENDING:], SHARED_RUN))


def same_ending(texts: list[str]) -> list[bool]:
    """Whether the last words of each text contain the word 4-gram that is most common there over all texts.

    If no 4-gram is in two texts, no text has it. Of equally common ones, the first in alphabetical order counts.
    """
    endings = [ending_runs(text) for text in texts]
    counts = Counter(run for ending in endings for run in ending)
    commonest = min(counts, key=lambda run: (-counts[run], run), default=None)
    return [commonest in ending and counts[commonest] > 1 for ending in endings]


class Wording:
    """Scores any task's answers by their words.

    Args:
        tokenizer: the dataset's, with the chat template of the prompts. rows: the rows of the prompts. train_rows: the
            training split, from which answers may be copied and which shows how prompts begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: list[dict], train_rows: list[dict]):
        self.training = [m["content"] for row in train_rows for m in row["messages"] if m["role"] == "assistant"]
        self.marks = template_marks(tokenizer, [row["messages"] for row in rows])
        self.openings = instruction_openings([row["messages"] for row in train_rows])

    def score(self, answers: list[Answer]) -> list[dict[str, float]]:
        """The metrics of `MEANING` for each answer, except distinct-2, which is one figure for all answers.

        `copied` is absent for an answer of fewer than eight words.
        """
        texts = [answer.text for answer in answers]
        scores = []
        shared = zip(copied(texts, self.training), unique(texts), same_ending(texts), strict=True)
        for answer, (share, is_unique, is_shared) in zip(answers, shared, strict=True):
            goes_on = continues_prompt(answer.text, self.marks, self.openings)
            scores.append(
                {
                    "eos_rate": float(answer.stopped),
                    "answered": float(bool(answer.text) and not goes_on),
                    "answer_tokens": float(answer.tokens),
                    "repetition": repetition(answer.text),
                    **({} if share is None else {"copied": share}),
                    "distinct_answers": float(is_unique),
                    "same_ending": float(is_shared),
                }
            )
        return scores


def template_marks(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]]) -> set[str]:
    """The lines that the chat template adds around these messages, such as `### Story:` or `<|user|>`."""
    shapes = {tuple((m["role"], INPUT_MARK in m["content"]) for m in messages) for messages in conversations}
    marks: set[str] = set()
    for shape in shapes:
        messages = [{"role": role, "content": CONTENT + INPUT_MARK * marked + CONTENT} for role, marked in shape]
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False)).replace(
            str(tokenizer.eos_token), "\n"
        )
        marks.update(line.strip() for line in re.split(f"[{CONTENT}\n]", text))
    return {mark for mark in marks if as_written(mark)}


def instruction_openings(conversations: list[list[dict]]) -> set[str]:
    """First three words of lines that mark prompts: in 1% of the prompts, and ten times rarer in answers."""
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for messages in conversations:
        for count, role in ((asked, "user"), (answered, "assistant")):
            count.update({begin for m in messages if m["role"] == role for begin in _openings(m["content"])})
    return {begin for begin, n in asked.items() if n >= 0.01 * len(conversations) and n >= 10 * answered[begin]}


def continues_prompt(answer: str, marks: set[str], openings: set[str]) -> bool:
    """Whether an answer continues with another prompt: it has a template mark, or a line that begins like a prompt."""
    return any(mark in answer for mark in marks) or any(begin in openings for begin in _openings(answer))


def _openings(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        first = as_written(line)[:OPENING]
        if len(first) == OPENING:
            yield " ".join(first)
