"""Chance: what the same answers score when a part of their instruction is another prompt's.

An answer that ignores its instruction fits another prompt's as well as its own. What a metric is above chance comes
from the instruction. An instruction may have several parts, such as a topic and an ending. The chance level of a metric
is then the highest that is reached without one of them: an easy part must not hide that another one is ignored.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial

import numpy as np

from fledge.evaluation.intervals import Ratio, means
from fledge.messages import Answer
from fledge.tasks import Scorer, Task

PAIRS = 1000  # of a prompt and another one, at least, where there are prompts enough
SAME = "it does not depend on the instruction"
ALONE = "no other prompt of its kind asks for something else"


def permutations(rows: list[dict], kinds: list[Hashable]) -> np.ndarray:
    """Several permutations of the rows (N, P), seeded: for each row the number of the row that takes its place, or -1.

    A row moves only among the rows of its kind, never stays in its place, and meets another row in each permutation.
    Rows of a kind that all ask the same have no other instruction to meet. Fewer rows get more permutations.
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
    """The metrics of answers against `exchange(own row, row that takes its place)`.

    The permutations of `others` (N, P) and the several answers to each prompt are gone through together, in turn, until
    all of both have been used. Returned as well are the scores, each with its answer's number.
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
    """The metrics that some answer gets differently under another instruction than under its own."""
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
    """For everybody who answered, the chance level of each metric and the part of the instruction it does without.

    A part counts for the metrics to which it makes a difference in anybody's scores. Returned as well are the metrics
    that any answer got under another instruction.
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
