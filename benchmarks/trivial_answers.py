"""What answers that need no model score on the test split of a prepared dataset.

    python benchmarks/trivial_answers.py --dataset runs/constraints/data

A metric in which one of them does well says little about a model. "Memorised" is the best of 60 training answers, given
to every prompt.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from fledge.encoding import open_rows
from fledge.messages import Answer
from fledge.tasks import FOLLOWING, load_task

TRIED = 60


def mean_scores(scorer, rows: list[dict], texts: list[str]) -> dict[str, float]:
    found = defaultdict(list)
    for scores in scorer.score(rows, [Answer(text, 1, True) for text in texts]):
        for name, value in scores.items():
            found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--task", default="constraints")
    args = parser.parse_args()

    text = open_rows(args.dataset)
    rows, training = list(text["test"]), list(text["train"])
    scorer = load_task(args.task).scorer(training, rows)
    references = [row["messages"][-1]["content"] for row in rows]
    tried = [row["messages"][-1]["content"] for row in training[:: max(1, len(training) // TRIED)]][:TRIED]
    some = rows[::6]
    memorised = max(tried, key=lambda one: mean_scores(scorer, some, [one] * len(some))[FOLLOWING])
    answers = {
        "reference": references,
        "memorised": [memorised] * len(rows),
        "another prompt's reference": references[len(rows) // 2 :] + references[: len(rows) // 2],
        "copied prompt": [row["messages"][-2]["content"] for row in rows],
        "nothing": [""] * len(rows),
    }
    for name, texts in answers.items():
        scores = mean_scores(scorer, rows, texts)
        print(f"{name}: {', '.join(f'{metric} {value:.1%}' for metric, value in sorted(scores.items()))}", flush=True)


if __name__ == "__main__":
    main()
