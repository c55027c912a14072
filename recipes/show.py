"""The last screen of `recipes/run.sh`: what was reached, two stories, where it lies, what to type next."""

import json
import sys
import textwrap
from pathlib import Path

from fledge.report import table


def main():
    runs = Path("runs", sys.argv[1])
    metrics = json.loads((runs / "evaluation/metrics.json").read_text(encoding="utf-8"))
    print("\n" + "=" * 100)
    print(f"Base against instruct, {metrics['model']['eos_rate']['n']} held-out prompts, 95% intervals\n")
    print(table(metrics))
    print(f"(endings judged by a classifier that is right on {metrics['judge']['accuracy']:.1%} of unseen stories)")
    for ending in ("happy", "sad"):
        story = (runs / f"{ending}.txt").read_text(encoding="utf-8").strip()
        print(f"\nA {ending} ending")
        for paragraph in story.splitlines():
            print(textwrap.fill(paragraph, 98, initial_indent="  ", subsequent_indent="  "))
    print(f"\nThe model: {runs}/model   every answer: {runs}/evaluation   for the Hub: {runs}/repository")
    print("Next: source .venv/bin/activate")
    print(f'      python generate.py --model {runs}/model --topic "A dog who lost his bone." --ending sad')


if __name__ == "__main__":
    main()
