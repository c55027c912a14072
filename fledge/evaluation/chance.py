"""Chance: the score of the same answers when a part of their instruction is replaced by that of another prompt.

An answer that ignores its instruction fits another prompt's as well as its own, so what a metric has above chance comes
from the instruction. If an instruction has several parts, such as a topic and an ending, each part is replaced
separately, and the highest score is the chance level: following an easy part must not hide that another is ignored.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial

import numpy as np

from fledge.evaluation.intervals import Ratio, means
from fledge.messages import Answer
from fledge.tasks import Scorer, Task

PAIRS = 1000  # of different prompts, at least, if there are enough prompts
SAME = "it does not depend on the instruction"
ALONE = "no other prompt of its kind asks for something else"


def permutations(rows: list[dict], kinds: list[Hashable]) -> np.ndarray:
    """Seeded permutations of the rows (N, P): for each row the number of the row that replaces it, or -1.

    A row is only replaced by rows of its kind, never by itself, and by a different one in each permutation. If all rows
    of a kind ask the same, none can be replaced. Fewer rows get more permutations.
    """
    most = math.ceil(PAIRS / len(rows))
    rng = np.random.default_rng(0)
    found = np.full((most, len(rows)), -1)
    for kind in dict.fromkeys(kinds):
        members = [number for number, of_row in enumerate(kinds) if of_row == kind]
        if len({repr(rows[number]["messages"][:-1]) for number in members}) > 1:
            order = rng.permutation(members)
            for shift in range(1, min(most, len(order) - 1) + 1):
                found[shift - 1, order] = np.roll(order, shift)
    return found[(found >= 0).any(axis=1)]


def against_others(
    scorer: Scorer,
    rows: list[dict],
    answers: list[Answer],
    others: np.ndarray,
    weights: np.ndarray,
    exchange: Callable,
) -> tuple[dict[str, Ratio], list[tuple[int, dict[str, float]]]]:
    """The metrics of answers against `exchange(own row, row that replaces it)`.

    Permutations of `others` (N, P) and answers to each prompt are paired in turn until all of both have been used. Also
    returns the scores, each with the number of its answer.
    """
    num_samples = len(answers) // len(rows)
    total: dict[str, Ratio] = {}
    scored: list[tuple[int, dict[str, float]]] = []
    for turn in range(max(len(others), num_samples) if len(others) else 0):
        places = others[turn % len(others)]
        moved = np.flatnonzero(places >= 0)
        numbers = moved * num_samples + turn % num_samples
        given = [exchange(rows[row], rows[places[row]]) for row in moved]
        scores = scorer.score(given, [answers[number] for number in numbers])
        scored += zip(numbers.tolist(), scores, strict=True)
        of_prompts = dict(zip(moved.tolist(), scores, strict=True))
        for name, ratio in means([of_prompts.get(i, {}) for i in range(len(rows))], 1, weights[places]).items():
            if name in total:
                ratio.numerator += total[name].numerator
                ratio.denominator += total[name].denominator
            total[name] = ratio
    return total, scored


def dependent(own: list[dict[str, float]], scored: list[tuple[int, dict[str, float]]]) -> set[str]:
    """The metrics in which some answer scores differently under another instruction than under its own."""
    return {
        name
        for number, score in scored
        for name in own[number].keys() & score.keys()
        if own[number][name] != score[name]
    }


def chance_levels(
    scorer: Scorer,
    task: Task,
    rows: list[dict],
    answers: dict[str, list[Answer]],
    scores: dict[str, list[dict[str, float]]],
    weights: np.ndarray,
) -> tuple[dict[str, dict[str, tuple[str, Ratio]]], set[str]]:
    """For each model, the chance level of each metric and the part of the instruction that was replaced.

    A part counts for the metrics that it changes in the scores of any model. Also returns the metrics that any answer
    got under another instruction.
    """
    others = permutations(rows, [task.kind(row) for row in rows])
    found: dict[str, dict[str, tuple[str, Ratio]]] = {who: {} for who in answers}
    met: set[str] = set()
    for part in task.parts:
        exchange = partial(task.exchanged, part)
        of_part, names = {}, set()
        for who, of_who in answers.items():
            of_part[who], scored = against_others(scorer, rows, of_who, others, weights, exchange)
            names |= dependent(scores[who], scored)
            met |= of_part[who].keys()
        for who, ratios in of_part.items():
            for name in names & ratios.keys():
                earlier = found[who].get(name)
                if earlier is None or ratios[name].value() > earlier[1].value():
                    found[who][name] = part, ratios[name]
    return found, met
