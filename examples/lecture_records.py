"""Instructions for a model of characters, made from the plays that it was trained on: speak in one sentence or in two.

    python examples/lecture_records.py --text lecture/input.txt --out runs/lecture/records.jsonl

The answers are sentences of the text itself that follow each other within a speech, so a vocabulary that wrote the text
writes them too. Whether an answer has the sentences that were asked for is counted by rule (the task `instructions`).
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fledge.text.stories import sentences

COUNTS = ("one", "two")
FEWEST_WORDS = 6  # of an answer; of five or fewer the task would ask for the very words


def speeches(text: str) -> Iterator[str]:
    """What is said in a play: paragraphs, without the line that names who speaks."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip().split("\n")
        yield " ".join(lines[1:] if lines[0].endswith(":") else lines)


def records(text: str, most_characters: int, count: int, seed: int) -> list[dict[str, str]]:
    """`count` records at most, as many of one number of sentences as of another."""
    found: dict[str, list[str]] = {number: [] for number in COUNTS}
    for speech in speeches(text):
        said = sentences(speech)
        for size, number in enumerate(COUNTS, 1):
            for begin in range(len(said) - size + 1):
                answer = " ".join(said[begin : begin + size])
                is_whole = answer.endswith((".", "!", "?")) and len(sentences(answer)) == size
                if is_whole and len(answer) <= most_characters and len(answer.split()) >= FEWEST_WORDS:
                    found[number].append(answer)
    rng = random.Random(seed)
    each = min(count // len(COUNTS), *map(len, found.values()))
    made = [
        {"instruction": f"Speak in {number} sentence{'s' if number != 'one' else ''}.", "response": answer}
        for number, answers in found.items()
        for answer in rng.sample(answers, each)
    ]
    rng.shuffle(made)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="the text that the model was trained on")
    parser.add_argument("--out", required=True, help="the file to write, a record a line")
    parser.add_argument("--most_characters", type=int, default=86, help="of an answer (default 86: a context of 128)")
    parser.add_argument("--count", type=int, default=6000, help="records at most (default 6000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = records(Path(args.text).read_text(encoding="utf-8"), args.most_characters, args.count, args.seed)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    print(f"{args.out}: {len(made):,} records")


if __name__ == "__main__":
    main()
