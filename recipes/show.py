"""The last screen of `recipes/run.sh`: what was reached, what was generated, where it lies, what to type next."""

import shlex
import sys
import textwrap
from pathlib import Path

import yaml

from fledge.cli import read_json, run
from fledge.evaluation.report import beside, cautions, judged_by, table

HEADINGS = {"happy.txt": "A happy ending", "sad.txt": "A sad ending", "answer.txt": "An answer"}


def main():
    name = sys.argv[1]
    runs = Path("runs", name)
    metrics = read_json(runs / "evaluation/metrics.json", "evaluate_model.py")
    print("\n" + "=" * 100)
    print(f"Base against instruct, {metrics['num_prompts']} held-out prompts, 95% intervals")
    print(f"Instruction following: base {beside(metrics, 'base')}, instruct {beside(metrics)}\n")
    print("\n".join([table(metrics), *cautions(metrics), *judged_by(metrics)]))
    for file, heading in HEADINGS.items():
        if (runs / file).exists():
            print(f"\n{heading}")
            for paragraph in (runs / file).read_text(encoding="utf-8").strip().splitlines():
                print(textwrap.fill(paragraph, 98, initial_indent="  ", subsequent_indent="  "))
    print(f"\nThe model: {runs}/model   every answer: {runs}/evaluation/report.html   for the Hub: {runs}/repository")
    print("Next: source .venv/bin/activate")
    print(f"      {shlex.join(next_command(name))}")


def next_command(name: str) -> list[str]:
    """What asks the recipe's model as its `generate.yaml` does."""
    asked = yaml.safe_load(Path("recipes", name, "generate.yaml").read_text(encoding="utf-8"))
    key = next(key for key in ("topic", "words", "constraints", "prompt") if key in asked)
    values = asked[key] if isinstance(asked[key], list) else [asked[key]]
    return ["python", "generate.py", "--model", f"runs/{name}/model", f"--{key}", *map(str, values)]


if __name__ == "__main__":
    run(main)
