"""Chance: what the same answers score against the instructions of other prompts.

An answer that ignores its instruction fits another prompt's as well as its own. What a metric is above chance comes
from the instruction.
"""

from collections.abc import Hashable

import numpy as np

from fledge.evaluation.intervals import Ratio, means

PERMUTATIONS = 5
SAME = "it does not depend on the instruction"
ALONE = "no other prompt of its kind asks for something else"


def permutations(rows: list[dict], kinds: list[Hashable], most: int = PERMUTATIONS) -> np.ndarray:
    """Several permutations of the rows (N, P), seeded: for each row the number of the row that takes its place, or -1.

    A row moves only among the rows of its kind, never stays in its place, and meets another row in each permutation.
    Rows of a kind that all ask the same have no other instruction to meet.
    """
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
    scorer, rows: list[dict], answers: list, num_samples: int, others: np.ndarray, weights: np.ndarray
) -> tuple[dict[str, Ratio], list[list[dict[str, float]]]]:
    """The metrics of answers, `num_samples` a row in turn, against the rows that take the place of their own.

    Each metric is the mean over all permutations of `others` (N, P). Returned as well are the scores, for each
    permutation one of each answer; they are empty where a row has no other to meet.
    """
    total, scores = {}, []
    for places in others:
        numbers = [number for number in range(len(answers)) if places[number // num_samples] >= 0]
        given = [rows[places[number // num_samples]] for number in numbers]
        of_answers = [{} for _ in answers]
        for number, score in zip(numbers, scorer.score(given, [answers[number] for number in numbers]), strict=True):
            of_answers[number] = score
        scores.append(of_answers)
        for name, ratio in means(of_answers, num_samples, weights[places]).items():
            if name in total:
                ratio.numerator += total[name].numerator
                ratio.denominator += total[name].denominator
            total[name] = ratio
    return total, scores


def dependent(own: list[dict[str, float]], permuted: list[list[dict[str, float]]]) -> set[str]:
    """The metrics that some answer gets differently under another instruction than under its own."""
    return {
        name
        for of_answers in permuted
        for mine, theirs in zip(own, of_answers, strict=True)
        for name in mine.keys() & theirs.keys()
        if mine[name] != theirs[name]
    }
