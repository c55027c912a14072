"""How much figures differ between trainings: trains and evaluates a recipe with several seeds, prints mean and spread.

    python benchmarks/seeds.py --recipe quickstart --seeds 3

The recipe's base and dataset must be there (`bash recipes/run.sh quickstart` makes them). Only the training's seed
changes: prompts and the evaluation's random numbers stay the same. A seed that was measured before is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from fledge.cpu import describe

ROOT = Path(__file__).parents[1]
SHOWN = ("instruction_following", "eos_rate", "completion_loss", "perplexity", "bits_per_byte")


def run(script: str, recipe: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / script, "--config", recipe, *map(str, arguments)], check=True)


def measure(recipe: Path, folder: Path, seed: int, others: list[str]) -> dict:
    """The metrics of the model that `seed` trains, with the recipe's own base, dataset and settings."""
    model, evaluation = folder / f"model{seed}", folder / f"evaluation{seed}"
    if not (evaluation / "metrics.json").exists():
        run("train_sft.py", recipe / "train.yaml", "--seed", seed, "--output_dir", model, "--overwrite", True, *others)
        run("evaluate_model.py", recipe / "evaluate.yaml", "--model", model, "--output_dir", evaluation)
    return json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="a folder of recipes/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="default: runs/RECIPE/seeds")
    parser.add_argument("others", nargs="*", help="keys of train_sft.py, after --")
    args = parser.parse_args()
    folder = args.output_dir or Path("runs", args.recipe, "seeds")
    recipe = ROOT / "recipes" / args.recipe
    found = [measure(recipe, folder, seed, args.others) for seed in range(1, args.seeds + 1)]
    print(f"\n{describe()}\n\n| metric | mean | standard deviation | each seed |\n|---|---:|---:|---|")
    of_task = [name for name in found[0]["chance"]["model"] if name not in SHOWN]
    for name in (*SHOWN[:1], *of_task, *SHOWN[1:]):
        values = [metrics["model"][name]["value"] for metrics in found]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"| {name} | {statistics.mean(values):.4f} | {spread:.4f} | {', '.join(f'{v:.4f}' for v in values)} |")


if __name__ == "__main__":
    main()
