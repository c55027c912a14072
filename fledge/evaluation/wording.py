"""What the words of answers show whatever the task is: repetition, copying, variety, and answers that are none."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

from transformers import PreTrainedTokenizerBase

from fledge.messages import INPUT_MARK, Answer
from fledge.text.words import as_written

MEANING = {
    "eos_rate": "answers that the model ended itself",
    "answered": "answers that are not empty and do not go on with the prompt's form instead",
    "answer_tokens": "length of an answer in tokens",
    "repetition": "share of an answer's runs of four words that have already occurred in it",
    "copied": "share of an answer's words inside a run of eight words that a training answer has too",
    "distinct_answers": "answers that no other answer equals word for word",
    "same_ending": "answers whose last forty words have the run of four words that most answers end with",
    "distinct_2": "different word pairs over all word pairs of all answers",
}
REPEATED_RUN = 4
COPIED_RUN = 8
SHARED_RUN = 4
ENDING = 40  # words
OPENING = 3
CONTENT = "\ue000"  # stands for a message's content where only what surrounds it matters


def runs(text: str, length: int) -> Iterator[tuple[str, ...]]:
    """Every run of `length` words."""
    return runs_of(as_written(text), length)


def runs_of(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(length)), strict=False)


def repetition(text: str) -> float:
    """Share of an answer's runs of four words that have already occurred in it."""
    all_runs = list(runs(text, REPEATED_RUN))
    return 1 - len(set(all_runs)) / len(all_runs) if all_runs else 0.0


def copied(texts: list[str], training: Iterable[str]) -> list[float | None]:
    """For each text the share of its words that lie in a run of eight words of a training text.

    Only the runs of `texts` are kept in memory, and `training` is read once. None for a text of fewer words.
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

    For each text the sum over its pairs of one over the pair's count in all texts, and the number of its pairs: the
    sums of either over the texts are distinct-2's numerator and denominator.
    """
    counts = Counter(pair for text in texts for pair in runs(text, 2))
    return [(sum(1 / counts[pair] for pair in runs(text, 2)), max(len(as_written(text)) - 1, 0)) for text in texts]


def unique(texts: list[str]) -> list[bool]:
    """Whether no other text has the same words."""
    counts = Counter(tuple(as_written(text)) for text in texts)
    return [counts[tuple(as_written(text))] == 1 for text in texts]


def ending_runs(text: str) -> set[tuple[str, ...]]:
    """Every run of four words among the last forty."""
    return set(runs_of(as_written(text)[-ENDING:], SHARED_RUN))


def same_ending(texts: list[str]) -> list[bool]:
    """Whether each text has, among its last words, the run of four words that most texts have there.

    If no run is in two texts, no text has it. Of equally common runs the first in the alphabet counts.
    """
    endings = [ending_runs(text) for text in texts]
    counts = Counter(run for ending in endings for run in ending)
    commonest = min(counts, key=lambda run: (-counts[run], run), default=None)
    return [commonest in ending and counts[commonest] > 1 for ending in endings]


class Wording:
    """Scores any task's answers by their words.

    Args:
        tokenizer: the dataset's, whose chat template asked.
        rows: the rows that are asked.
        train_rows: the training split, which answers may have copied and which shows how prompts begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: list[dict], train_rows: list[dict]):
        self.training = [m["content"] for row in train_rows for m in row["messages"] if m["role"] == "assistant"]
        self.marks = template_marks(tokenizer, [row["messages"] for row in rows])
        self.openings = instruction_openings([row["messages"] for row in train_rows])

    def score(self, answers: list[Answer]) -> list[dict[str, float]]:
        """The metrics of `MEANING` for each answer, but distinct-2, which belongs to all answers together.

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
    """The lines that the chat template itself puts around these messages, such as `### Story:` or `<|user|>`."""
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
    """First three words of lines by which prompts are told: in 1% of the prompts, and ten times rarer in answers."""
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for messages in conversations:
        for count, role in ((asked, "user"), (answered, "assistant")):
            count.update({begin for m in messages if m["role"] == role for begin in _openings(m["content"])})
    return {begin for begin, n in asked.items() if n >= 0.01 * len(conversations) and n >= 10 * answered[begin]}


def continues_prompt(answer: str, marks: set[str], openings: set[str]) -> bool:
    """Whether an answer goes on with the prompt's form: a mark of the template, or a line that opens like one of it."""
    return any(mark in answer for mark in marks) or any(begin in openings for begin in _openings(answer))


def _openings(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        first = as_written(line)[:OPENING]
        if len(first) == OPENING:
            yield " ".join(first)
