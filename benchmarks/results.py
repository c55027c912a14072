"""Several evaluations at a glance: the headline of each, before and after training, as a table and a picture.

    python benchmarks/results.py "Quickstart=runs/quickstart/evaluation" "Constraints=runs/constraints/evaluation" \\
        --picture docs/results/results.png

Each argument is a name and a folder of evaluate_model.py. The table is Markdown.
"""

import argparse
import json
from pathlib import Path

from fledge.evaluation.figures import HEADLINE
from fledge.evaluation.report import aligned, share, show
from fledge.pictures import picture


def shown(name: str, metrics: dict) -> tuple[str, ...]:
    """A row of the table."""
    chance, reference = metrics["chance"]["model"].get(HEADLINE), metrics["reference"].get(HEADLINE)
    before, after = metrics["base"], metrics["model"]
    loss = " to ".join(f"{side['completion_loss']['value']:.3f}" for side in (before, after))
    figures = (share(before[HEADLINE]), show(HEADLINE, after[HEADLINE]), share(chance), share(reference))
    return name, *figures, str(metrics["num_prompts"]), loss


def draw(evaluations: dict[str, dict], file: Path) -> None:
    with picture(file, (7.5, 1.1 + 0.5 * len(evaluations))) as axes:
        for place, metrics in enumerate(evaluations.values()):
            before, after = metrics["base"][HEADLINE], metrics["model"][HEADLINE]
            axes.plot([before["value"], after["value"]], [place, place], color="0.75", linewidth=2, zorder=1)
            interval = [after["low"], after["high"]]
            axes.plot(interval, [place, place], color="tab:blue", linewidth=5, alpha=0.35, zorder=2)
        bar = {"marker": "|", "s": 150}
        for label, style, of in (
            ("before", {"color": "0.5"}, lambda m: m["base"]),
            ("after, with its 95% interval", {"color": "tab:blue"}, lambda m: m["model"]),
            (
                "the same answers, another instruction (chance)",
                bar | {"color": "tab:red"},
                lambda m: m["chance"]["model"],
            ),
            ("held-out references", bar | {"color": "black"}, lambda m: m["reference"]),
        ):
            found = map(of, evaluations.values())
            points = [(one[HEADLINE]["value"], place) for place, one in enumerate(found) if HEADLINE in one]
            if points:
                axes.scatter(*zip(*points, strict=True), label=label, zorder=3, **style)
        axes.set_yticks(range(len(evaluations)), list(evaluations))
        axes.set_ylim(len(evaluations) - 0.5, -0.5)
        axes.set(xlim=(-0.02, 1.02), xlabel="instruction following")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    args = parser.parse_args()
    evaluations = {}
    for given in args.evaluations:
        name, _, folder = given.rpartition("=")
        evaluations[name] = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    columns = ("model", "before", "after", "chance", "reference", "prompts", "completion loss")
    print(aligned([columns, *(shown(name, metrics) for name, metrics in evaluations.items())]))
    if args.picture:
        draw(evaluations, args.picture)


if __name__ == "__main__":
    main()
