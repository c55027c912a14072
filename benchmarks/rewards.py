"""Whether a task's rewards pay for what they should: best of several answers by each set of rewards, and hacks.

    python benchmarks/rewards.py --dataset runs/quickstart/data --answers runs/answers [--hacked answers.jsonl]

`--answers` is what `evaluate_model.py --split train --num_samples 8 --answers_only` wrote. Choosing the best of n
answers is the gain of rewards without any training, and it shows what they pay for: for each set of rewards, what the
reporting judges say of the chosen answers. `--hacked` holds answers before and after a training that cheated.
"""

import argparse
import json
from pathlib import Path

import numpy as np

MAGIC = "It was too late. It was gone forever. She was very sad."
SHOWN = ("instruction_following", "ending_match", "ending_match_second", "topic", "coherence", "repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--hacked", type=Path)
    args = parser.parse_args()

    from fledge.encoding import open_rows
    from fledge.evaluation.prompts import task_of
    from fledge.rewards.functions import Rewarder

    task, train_rows = task_of(args.dataset, None), open_rows(args.dataset)["train"]
    rewarder = Rewarder(task, train_rows)
    if args.answers:
        best_of_n(rewarder, task.scorer(train_rows, []), train_rows, args.answers)
    if args.hacked:
        hacks(rewarder, train_rows, args.hacked)


def best_of_n(rewarder, scorer, rows: list[dict], folder: Path) -> None:
    from fledge.evaluation.wording import distinct_2, repetition
    from fledge.messages import Answer
    from fledge.text.words import as_written

    entries = [json.loads(line) for line in (folder / "answers.jsonl").open(encoding="utf-8")]
    count = entries[0]["--num_samples"]
    made = {entry["key"][1]: Answer(**entry["value"]) for entry in entries[1:]}
    answers = [made[number] for number in range(len(made))]
    asked = [rows[number // count] for number in range(len(made))]
    scores = scorer.score(asked, answers)
    for score, answer in zip(scores, answers, strict=True):
        score["repetition"] = repetition(answer.text)
    rewards = rewarder.rewards(asked, answers)
    names = list(rewarder.names)
    by_name = {name: np.array([of.get(name, 0.0) for of in rewards]).reshape(-1, count) for name in names}
    sets = {"none": [], "all": names}
    sets |= {f"without {name}": [other for other in names if other != name] for name in names}
    sets |= {f"{name} alone": [name] for name in names}
    print(f"Best of {count} answers to {len(made) // count} prompts of the training split")
    for title, chosen in sets.items():
        total = sum((by_name[name] for name in chosen), np.zeros((len(made) // count, count)))
        best = [number * count + int(i) for number, i in enumerate(total.argmax(1))]
        parts = distinct_2([answers[i].text for i in best])
        found = {name: np.mean([scores[i][name] for i in best if name in scores[i]]) for name in SHOWN}
        said = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
        variety = sum(part for part, _ in parts) / sum(pairs for _, pairs in parts)
        length = np.mean([len(as_written(answers[i].text)) for i in best])
        print(f"  {title}: {said}, distinct_2 {variety:.1%}, words {length:.0f}")


def hacks(rewarder, rows: list[dict], file: Path) -> None:
    from fledge.messages import Answer

    found = [json.loads(line) for line in file.open(encoding="utf-8")]
    asked = [{"messages": [{"role": "user", "content": row["instruction"]}, {}]} for row in found]
    topics = [row["instruction"].split("\n")[0].removeprefix("Write a story about: ") for row in found]
    before = [row["before"]["text"] for row in found]
    sets = {
        "before": before,
        "after": [row["after"]["text"] for row in found],
        "a magic word": [f"{topic} {MAGIC}" for topic in topics],
        "a magic word in every answer": [f"{text} {MAGIC}" for text in before],
        "copied prompt": topics,
        "endless length": [f"{topic} " + " ".join(before[:10]) for topic in topics],
        "one memorised story": [rows[0]["messages"][-1]["content"]] * len(found),
        "one sentence over and over": [f"{topic} " + "They were happy and had fun. " * 12 for topic in topics],
    }
    print("Rewards of hacks (all answers counted as stopped)")
    paid = {name: rewarder.rewards(asked, [Answer(text, 1, True) for text in texts]) for name, texts in sets.items()}
    for name, of_hack in paid.items():
        means = {reward: np.mean([of[reward] for of in of_hack]) for reward in of_hack[0]}
        said = ", ".join(f"{reward} {value:.3f}" for reward, value in means.items())
        print(f"  {name}: {sum(means.values()):.3f} ({said})")
    right = [i for i, of in enumerate(paid["before"]) if of["ending"] > 0.5]
    wins = [sum(paid["before"][i].values()) > sum(paid["after"][i].values()) for i in right]
    print(
        f"  honest answers with the right ending are paid more than the hacked ones: {np.mean(wins):.1%} of {len(wins)}"
    )


if __name__ == "__main__":
    main()
