"""The last screen of `make quickstart`: what was reached, two stories, where it lies, what to type next."""

import json
import textwrap
from pathlib import Path

from fledge.evaluation import table

ROOT = Path("runs/quickstart")
NEXT = 'python generate.py --model runs/quickstart/model --topic "A dog who lost his bone." --ending sad'


def main():
    metrics = json.loads((ROOT / "evaluation/metrics.json").read_text(encoding="utf-8"))
    print("\n" + "=" * 100)
    print(f"Base against instruct, {metrics['model']['eos_rate']['n']} held-out prompts, 95% intervals\n")
    print(table(metrics))
    print(f"(endings judged by a classifier that is right on {metrics['judge']['accuracy']:.1%} of unseen stories)")
    for ending in ("happy", "sad"):
        story = (ROOT / f"{ending}.txt").read_text(encoding="utf-8").strip()
        print(f"\nA {ending} ending")
        for paragraph in story.splitlines():
            print(textwrap.fill(paragraph, 98, initial_indent="  ", subsequent_indent="  "))
    print(f"\nThe model: {ROOT}/model   every answer: {ROOT}/evaluation   for the Hub: {ROOT}/repository")
    print(f"Next: source .venv/bin/activate\n      {NEXT}")


if __name__ == "__main__":
    main()
