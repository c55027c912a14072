"""Which learning rate a base wants: an epoch of train_sft.py at each, and a picture of where the validation loss ends.

    python benchmarks/learning_rates.py --model_name_or_path runs/quickstart/base --dataset runs/quickstart/data \\
        --output_dir runs/rates --rates 1e-4 3e-4 1e-3 2e-3 4e-3 1e-2

What follows `--` goes to train_sft.py. A rate that was measured before is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(args, rate: str) -> float:
    """The validation loss after training at `rate`."""
    folder = Path(args.output_dir, rate)
    if not (folder / "run.json").exists():
        command = [sys.executable, ROOT / "train_sft.py", "--model_name_or_path", args.model_name_or_path]
        command += ["--dataset", args.dataset, "--output_dir", folder, "--learning_rate", rate]
        subprocess.run([*command, "--num_train_epochs", "1", *args.others], check=True)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["validation_loss"]


def draw(losses: dict[str, float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot([float(rate) for rate in losses], losses.values(), "o-")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3", "2e-3", "4e-3", "1e-2"])
    parser.add_argument("others", nargs="*", help="keys of train_sft.py, after --")
    args = parser.parse_args()
    losses = {rate: measure(args, rate) for rate in sorted(args.rates, key=float)}
    print("\n| learning rate | validation loss |\n|---|---:|")
    for rate, loss in losses.items():
        print(f"| {rate} | {loss:.3f} |")
    picture = Path(args.output_dir, "learning_rates.png")
    draw(losses, picture)
    print(f"\n{picture} shows them.")


if __name__ == "__main__":
    main()
