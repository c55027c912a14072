"""The last screen of `recipes/run.sh`: what was reached, what was generated, where it lies, what to type next."""

import shlex
import sys
import textwrap
from pathlib import Path

import yaml

from fledge.cli import read_json, run
from fledge.evaluation.report import beside, cautions, judged_by, table
from fledge.terminal import in_columns


def main():
    recipe = Path(sys.argv[1])
    compared = keys_of(recipe, "evaluate")
    evaluation = Path(compared["output_dir"])
    metrics = read_json(evaluation / "metrics.json", "evaluate_model.py")
    print("\n" + "=" * 100)
    print(f"{compared['base']} (base) against {compared['model']} (instruct)")
    print(f"{metrics['num_prompts']} held-out prompts, 95% intervals")
    print(f"Instruction following: base {beside(metrics, 'base')}, instruct {beside(metrics)}\n")
    print("\n".join([table(metrics), *cautions(metrics), *judged_by(metrics)]))
    print("\n" + answers(evaluation.parent))
    made = [f"The model: {compared['model']}", f"every answer: {evaluation}/report.html"]
    if (recipe / "publish.yaml").exists():
        made.append(f"for the Hub: {keys_of(recipe, 'publish')['output_dir']}")
    print("\n" + "   ".join(made))
    print("Next: source .venv/bin/activate")
    print(f"      {shlex.join(next_command(recipe))}")


def keys_of(recipe: Path, stage: str) -> dict:
    return yaml.safe_load((recipe / f"{stage}.yaml").read_text(encoding="utf-8"))


def answers(runs: Path) -> str:
    """What the model was asked for last: one topic told twice, side by side, or an answer."""
    if (runs / "happy.txt").exists():
        told = [(runs / file).read_text(encoding="utf-8").strip() for file in ("happy.txt", "sad.txt")]
        return in_columns(("A happy ending", "A sad ending"), (told[0], told[1]))
    paragraphs = (runs / "answer.txt").read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(["An answer", *(textwrap.fill(paragraph, 98) for paragraph in paragraphs)])


def next_command(recipe: Path) -> list[str]:
    """What asks the recipe's model as its `generate.yaml` does."""
    asked = keys_of(recipe, "generate")
    key = next(key for key in ("topic", "words", "constraints", "prompt") if key in asked)
    values = asked[key] if isinstance(asked[key], list) else [asked[key]]
    return ["python", "generate.py", "--model", asked["model"], f"--{key}", *map(str, values)]


if __name__ == "__main__":
    run(main)
