"""What the judges of stories are worth: against readers, against broken stories, on real stories, and when gamed.

    python benchmarks/judges.py --data DIR

`--data` holds tinystories_instruct/ and hacked/answers.jsonl. The judge of coherence learns from the shipped tales,
without those that readers labelled.
"""

import argparse
import gzip
import json
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from train_judges import ROOT, learned_from, read_records

ENDINGS, TOPICS = ("happy", "sad", "neither"), ("about", "contradicts", "not")
MAGIC = "It was too late. It was gone forever. She was very sad."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    yardsticks = [json.loads(line) for line in (ROOT / "tests/judges/yardsticks.jsonl").open(encoding="utf-8")]
    with gzip.open(ROOT / "examples/tales.txt.gz", "rt", encoding="utf-8") as file:
        read = {row["story"] for row in yardsticks}
        tales = [story for story, *_ in read_records(file.read()) if story not in read]
    random.Random(1).shuffle(tales)
    valid = "".join((args.data / f"tinystories_instruct/{name}.txt").read_text() for name in ("train", "valid"))
    real = [record for record in read_records(valid) if record[1] or not learned_from(record[0])]

    from fledge.judges.coherence import CoherenceJudge

    coherence = CoherenceJudge(tales[300:])
    of_readers(yardsticks)
    of_endings(yardsticks, real)
    of_topics(yardsticks)
    of_coherence(coherence, yardsticks, tales[:300], [story for story, is_sad, _ in real if not is_sad][:300])
    of_hacks(args.data / "hacked/answers.jsonl", tales)


def share(right: np.ndarray) -> str:
    """`93.5% (90.6 to 95.5) of 400`, Wilson's interval."""
    from fledge.evaluation.intervals import wilson

    low, high = wilson(int(right.sum()), len(right))
    return f"{right.mean():.1%} ({100 * low:.1f} to {100 * high:.1f}) of {len(right)}" if len(right) else "none"


def kappa(one: list, other: list) -> float:
    """Cohen's kappa (1960): agreement beyond what the two would reach by chance."""
    observed = np.mean([a == b for a, b in zip(one, other, strict=True)])
    first, second = Counter(one), Counter(other)
    by_chance = sum(first[label] * second[label] for label in first) / len(one) ** 2
    return (observed - by_chance) / (1 - by_chance)


def of_readers(rows: list[dict]) -> None:
    print("Readers")
    for label in ("ending", "topic", "coherence"):
        one, other = ([row["readers"][i][label] for row in rows] for i in (0, 1))
        print(f"  {label}: kappa {kappa(one, other):.3f}, {dict(sorted(Counter(map(str, one)).items()))}")
    for rule in ("happy", "sad"):
        found = np.array([row["agreed"]["ending"] == rule for row in rows if row.get("rule") == rule])
        print(f"  shipped tales whose rule says {rule}: readers agree on {share(found)}")


def of_endings(rows: list[dict], real: list[tuple[str, bool, str]]) -> None:
    from fledge.judges.endings import EndingJudge
    from fledge.judges.sentiment import SentimentJudge

    said = np.array([row["agreed"]["ending"] for row in rows])
    is_tale = np.array(["rule" in row for row in rows])
    by_hand = json.loads((ROOT / "benchmarks/real_endings.json").read_text(encoding="utf-8"))
    sad = [story for story, is_sad, _ in real if is_sad]
    read = np.array([by_hand.get(name_of(story), "") for story in sad])
    happy = [story for story, is_sad, _ in real if not is_sad]
    for name, judge in (("classifier", EndingJudge()), ("lexicon", SentimentJudge())):
        found = np.array(judge.judge([row["story"] for row in rows]))
        print(f"Endings by the {name}")
        for title, chosen in (("all", is_tale | True), ("tales", is_tale), ("answers", ~is_tale)):
            print(f"  {title}: {share((found == said)[chosen])}")
            for label in ENDINGS:
                counts = Counter(found[chosen & (said == label)].tolist())
                print(f"    readers say {label}: {', '.join(f'{key} {counts[key]}' for key in ENDINGS[:2])}")
        found = np.array(judge.judge(sad)) == "sad"
        print(f"  real stories with BadEnding: sad {share(found)}")
        print(f"    of those that were read as sad: {share(found[read == 'sad'])}")
        print(f"    of those that were read as happy, said happy: {share(~found[read == 'happy'])}")
        print(f"  real stories without it: happy {share(np.array(judge.judge(happy)) == 'happy')}")


def name_of(story: str) -> str:
    return f"{zlib.crc32(story.encode()):08x}"


def tuned_on(row: dict) -> bool:
    """The half of the yardsticks that the rules of topic and coherence were tuned on."""
    return zlib.crc32(row["id"].encode()) % 2 == 0


def of_topics(rows: list[dict]) -> None:
    from fledge.judges.topic import judge_topic

    found = np.array([judge_topic(row["topic"], row["story"]).label for row in rows])
    said = np.array([row["agreed"]["topic"] for row in rows])
    tuned, is_tale = np.array([tuned_on(row) for row in rows]), np.array(["rule" in row for row in rows])
    print("Topic")
    parts = {
        "all": tuned | True,
        "tuned on": tuned,
        "other half": ~tuned,
        "its answers": ~tuned & ~is_tale,
    }
    for title, chosen in parts.items():
        print(f"  {title}: {share((found == said)[chosen])}")
    for title, chosen in (("all", tuned | True), ("other half", ~tuned)):
        for label in TOPICS:
            counts = Counter(found[chosen & (said == label)].tolist())
            print(f"    {title}, readers say {label}: {', '.join(f'{key} {counts[key]}' for key in TOPICS)}")


def of_coherence(judge, rows: list[dict], tales: list[str], real: list[str]) -> None:
    from scipy.stats import spearmanr

    from fledge.judges.corruption import ALL, Corrupter

    print("Coherence")
    for title, stories in (("unseen tales", tales), ("real stories", real)):
        corrupter = Corrupter(stories, random.Random(0))
        for kind in ALL:
            pairs = [(story, getattr(corrupter, kind)(story)) for story in stories]
            whole, broken = (judge.score(list(side)) for side in zip(*[p for p in pairs if p[1]], strict=True))
            print(f"  {title}, {kind}: {share(whole > broken)}")
    score = judge.score([row["story"] for row in rows])
    said = np.array([sum(reader["coherence"] for reader in row["readers"][:2]) for row in rows])
    tuned, is_tale = np.array([tuned_on(row) for row in rows]), np.array(["rule" in row for row in rows])
    parts = {"all": tuned | True, "other half": ~tuned, "tales": is_tale, "answers": ~is_tale}
    for title, chosen in parts.items():
        print(f"  Spearman with the readers, {title}: {spearmanr(score[chosen], said[chosen])[0]:.2f}")


def of_hacks(file: Path, tales: list[str]) -> None:
    from fledge.messages import Answer
    from fledge.tasks import load_task

    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    asked = [{"messages": [{"role": "user", "content": row["instruction"]}, {}]} for row in rows]
    train = [{"messages": [{"role": "assistant", "content": story}]} for story in tales]
    scorer = load_task("topic_ending").scorer(train, [])
    topics = [row["instruction"].split("\n")[0].removeprefix("Write a story about: ") for row in rows]
    before = [row["before"]["text"] for row in rows]
    sets = {
        "before": before,
        "after": [row["after"]["text"] for row in rows],
        "copied prompt": topics,
        "copied prompt and a happy close": [f"{topic} They were very happy. The end." for topic in topics],
        "endless length": [f"{topic} " + " ".join(before[:10]) for topic in topics],
        "one memorised story": [tales[0]] * len(rows),
        "a magic word": [f"{topic} {MAGIC}" for topic in topics],
        "a magic word in every answer": [f"{text} {MAGIC}" for text in before],
        "one sentence over and over": [f"{topic} " + "They were happy and had fun. " * 12 for topic in topics],
    }
    print("Hacks")
    for name, texts in sets.items():
        scores = scorer.score(asked, [Answer(text, 1, True) for text in texts])
        print(f"  {name}: " + ", ".join(f"{key} {np.mean([score[key] for score in scores]):.1%}" for key in scores[0]))


if __name__ == "__main__":
    main()
