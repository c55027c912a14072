"""Learns the weights that the judges ship, in fledge/judges: endings.json, rewarding.json and coherence.json.

    python benchmarks/train_judges.py --data DIR

`--data` holds tinystories_instruct/ (real stories in the format of TinyStories-Instruct); the shipped tales are read
from examples/. Stories of tests/judges/yardsticks.jsonl are left out, and so are the real ones on which
benchmarks/judges.py measures. What is written are weights, not text.

Of the stories that endings are learned from, one half makes the judge that evaluates (endings.json), and the other half
the judge that rewards (rewarding.json). Stories with the same summary lie in the same half, by its hash.
"""

import argparse
import gzip
import json
import random
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
KEPT = 6000  # words and word pairs of endings
COHERENCE_STORIES = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    yardsticks = (ROOT / "tests/judges/yardsticks.jsonl").read_text(encoding="utf-8").splitlines()
    kept_back = {json.loads(line)["story"] for line in yardsticks}
    with gzip.open(ROOT / "examples/tales.txt.gz", "rt", encoding="utf-8") as file:
        tales = [record for record in read_records(file.read()) if record[0] not in kept_back]
    real = read_records((args.data / "tinystories_instruct/train.txt").read_text(encoding="utf-8"))
    random.Random(0).shuffle(tales)
    for name, rewards in (("endings.json", False), ("rewarding.json", True)):
        of_half = [(story, is_sad) for story, is_sad, group in tales if rewards_with(group) == rewards]
        others = [
            story
            for story, is_sad, group in real
            if not is_sad and learned_from(story) and rewards_with(group) == rewards
        ]
        write(name, learn_endings(of_half, others))
    write("coherence.json", learn_coherence([story for story, *_ in tales]))


def read_records(text: str) -> list[tuple[str, bool, str]]:
    """(story, whether its features say BadEnding, its group) of each record with a whole story.

    The group is the summary. The story stands for it where a record has none.
    """
    from fledge.sources.tinystories_instruct import END, parse_record

    found = [parse_record("\n" + part) for part in text.split(END) if part.strip()]
    return [
        (
            record["Story"],
            "BadEnding" in record.get("Features", ""),
            " ".join(record.get("Summary", record["Story"]).split()),
        )
        for record in found
        if record.get("Story", "").endswith((".", "!", "?", '"'))
    ]


def rewards_with(group: str) -> bool:
    """Whether stories of a group are learned from by the judge that rewards; the other one has those that are not."""
    return zlib.crc32(group.encode()) % 2 == 0


def learned_from(story: str) -> bool:
    """Two thirds of the real stories; the rest is measured on."""
    return zlib.crc32(story.encode()) % 3 > 0


def write(name: str, weights: dict) -> None:
    path = ROOT / "fledge/judges" / name
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in weights.items())
    path.write_text("{" + lines + "}\n", encoding="utf-8")
    print(f"{path}: {len(weights)} weights, {path.stat().st_size / 1000:.0f} kB")


def learn_endings(tales: list[tuple[str, bool]], real: list[str]) -> dict[str, list[float]]:
    from fledge.judges.endings import EndingJudge
    from fledge.judges.sentiment import SentimentJudge

    stories, sad = [story for story, _ in tales], np.array([is_sad for _, is_sad in tales])
    first = EndingJudge(fit_endings(stories, sad)).sadness(real)
    valence = SentimentJudge().valence(real)
    both_sad, both_happy = (first > 0.6) & (valence < 0.1), (first < 0.4) & (valence > 0.1)
    print(f"real stories on which both judges agree: {both_sad.sum()} sad, {both_happy.sum()} happy")
    agreed = [real[i] for i in np.flatnonzero(both_sad | both_happy)]
    return fit_endings(stories + agreed, np.concatenate([sad, both_sad[both_sad | both_happy]]))


def fit_endings(stories: list[str], sad: np.ndarray) -> dict[str, list[float]]:
    """Logistic regression on tf-idf, either ending weighing as much; then again on the pairs that weigh most."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from fledge.judges.endings import grams

    texts, vocabulary = [grams(story) for story in stories], None
    for _ in range(2):
        vectorizer = TfidfVectorizer(
            analyzer=lambda text: text, sublinear_tf=True, min_df=1 if vocabulary else 3, vocabulary=vocabulary
        )
        model = LogisticRegression(C=1, max_iter=1000, class_weight="balanced")
        model.fit(vectorizer.fit_transform(texts), sad)
        names, weights = vectorizer.get_feature_names_out(), model.coef_[0]
        vocabulary = sorted(names[np.argsort(-np.abs(weights), kind="stable")[:KEPT]])
    found = {"": [1.0, round(float(model.intercept_[0]), 4)]}
    for name, frequency, weight in zip(names, vectorizer.idf_, weights, strict=True):
        found[name] = [round(float(frequency), 2), round(float(weight), 3)]
    return found


def learn_coherence(stories: list[str]) -> dict[str, float]:
    """Logistic regression on the differences between a story and itself broken, so that only what breaks counts."""
    from sklearn.linear_model import LogisticRegression

    from fledge.judges.coherence import FEATURES, CoherenceJudge
    from fledge.judges.corruption import ALL, TESTED, Corrupter

    rng = random.Random(0)
    judge, corrupter = CoherenceJudge(stories[COHERENCE_STORIES:]), Corrupter(stories[COHERENCE_STORIES:], rng)
    whole, differences, shares = stories[:COHERENCE_STORIES], [], []
    own = judge.features(whole)
    for kind in ALL:
        broken = [(i, getattr(corrupter, kind)(story)) for i, story in enumerate(whole)]
        at = [i for i, story in broken if story is not None]
        found = judge.features([story for _, story in broken if story is not None])
        differences.append(np.clip((own[at] - judge.mean) / judge.spread, -6, 6))
        differences[-1] -= np.clip((found - judge.mean) / judge.spread, -6, 6)
        shares += [3.0 if kind in TESTED else 1.0] * len(at)
    rows = np.concatenate(differences)
    model = LogisticRegression(fit_intercept=False, max_iter=3000)
    model.fit(
        np.concatenate([rows, -rows]), np.arange(2 * len(rows)) < len(rows), sample_weight=np.array(shares + shares)
    )
    return {name: round(float(weight), 3) for name, weight in zip(FEATURES, model.coef_[0], strict=True)}


if __name__ == "__main__":
    main()
