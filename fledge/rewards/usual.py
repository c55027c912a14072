"""The usual length, repetition and endings of training answers, and rewards for answers that are within them."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from fledge.evaluation.wording import ending_runs, repetition
from fledge.messages import Answer
from fledge.tasks import Task
from fledge.text.words import as_written

COMMON_SHARE = 0.95  # share of the training answers that would get the full reward
TOO_COMMON = 0.25  # share of the answers: an ending that is this much more common than in training gets no reward
ENOUGH = 6  # other prompts needed to tell what is common


class Usual:
    """How long training answers are and how much they repeat themselves, by the kind of their prompt.

    The limits exclude the outermost twentieth of the training answers on either side. Within them the reward is 1.
    Outside it falls to 0 for an answer half as long, twice as long, or with half as many different word 4-grams.
    """

    def __init__(self, task: Task, rows: list[dict]):
        self.task = task
        found: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            text = row["messages"][-1]["content"]
            found.setdefault(task.kind(row), []).append((len(as_written(text)), 1 - repetition(text)))
        self.limits = {
            kind: (
                float(np.quantile([count for count, _ in of_kind], 1 - COMMON_SHARE)),
                float(np.quantile([count for count, _ in of_kind], COMMON_SHARE)),
                float(np.quantile([fresh for _, fresh in of_kind], 1 - COMMON_SHARE)),
            )
            for kind, of_kind in found.items()
        }

    def reward(self, row: dict, answer: Answer) -> float:
        limits, count = self.limits.get(self.task.kind(row)), len(as_written(answer.text))
        if limits is None:  # a kind of prompt that training does not have
            return 1.0
        shortest, longest, least_fresh = limits
        if count == 0:
            return float(shortest == 0)
        fresh = min(1.0, (1 - repetition(answer.text)) / least_fresh)
        length = min(1.0, count / max(shortest, 1), max(longest, 1) / count)
        return max(0.0, 2 * fresh * length - 1)


class Ending(NamedTuple):
    """The ending of an answer: the kind of its prompt, the prompt, and the word 4-grams of its last forty words."""

    kind: str
    prompt: str
    runs: frozenset[tuple[str, ...]]


class Varied:
    """Rewards answers to different prompts for ending in different words.

    The excess of a word 4-gram at the end of an answer is its share of the answers to other prompts minus its share of
    the training answers, both for the same kind of prompt. An answer has the full reward if its worst 4-gram has no
    excess, and none if the excess is a quarter of the answers. With fewer than `ENOUGH` other prompts the reward is 1.
    """

    def __init__(self, task: Task, rows: list[dict]):
        self.task = task
        endings = [Ending(task.kind(row), "", frozenset(ending_runs(row["messages"][-1]["content"]))) for row in rows]
        of_kind = Counter(ending.kind for ending in endings)
        with_run = Counter((ending.kind, run) for ending in endings for run in ending.runs)
        self.usual = {(kind, run): count / of_kind[kind] for (kind, run), count in with_run.items()}

    def endings(self, rows: list[dict], answers: list[Answer]) -> list[Ending]:
        return [
            Ending(self.task.kind(row), str(row["messages"][:-1]), frozenset(ending_runs(answer.text)))
            for row, answer in zip(rows, answers, strict=True)
        ]

    def rewards(self, endings: list[Ending], among: list[Ending]) -> list[float]:
        """The reward of each of `endings`. They are compared with `among`, which includes them."""
        of_kind = Counter(ending.kind for ending in among)
        of_prompt = Counter((ending.kind, ending.prompt) for ending in among)
        prompts = Counter(kind for kind, _ in of_prompt)
        with_run = Counter((ending.kind, run) for ending in among for run in ending.runs)
        with_run_here = Counter((ending.kind, ending.prompt, run) for ending in among for run in ending.runs)

        def too_common(kind: str, prompt: str, run: tuple[str, ...]) -> float:
            others = of_kind[kind] - of_prompt[kind, prompt]
            share = (with_run[kind, run] - with_run_here[kind, prompt, run]) / others
            return share - self.usual.get((kind, run), 0.0)

        worst = [
            max((too_common(kind, prompt, run) for run in runs), default=0.0) if prompts[kind] > ENOUGH else 0.0
            for kind, prompt, runs in endings
        ]
        return [1 - min(1.0, max(0.0, excess) / TOO_COMMON) for excess in worst]
