"""Several evaluations at a glance: the headline of each, before and after training, as a table and a picture.

    python benchmarks/results.py "Quickstart=runs/quickstart/evaluation" "Constraints=runs/constraints/evaluation" \\
        --picture docs/results/results.png

Each argument is a name and a folder of evaluate_model.py. The table is Markdown.
"""

import argparse
import json
from pathlib import Path

from fledge.pictures import picture

HEADLINE = "instruction_following"


def row_of(name: str, metrics: dict) -> dict[str, object]:
    """The headline of one evaluation: values between 0 and 1, and the ends of the model's interval."""
    model = metrics["model"][HEADLINE]
    return {
        "name": name,
        "base": metrics["base"][HEADLINE]["value"],
        "model": model["value"],
        "interval": (model["low"], model["high"]),
        "chance": metrics["chance"]["model"].get(HEADLINE, {}).get("value"),
        "reference": metrics["reference"].get(HEADLINE, {}).get("value"),
        "prompts": metrics["num_prompts"],
        "loss": tuple(metrics[side]["completion_loss"]["value"] for side in ("base", "model")),
    }


def table(rows: list[dict]) -> str:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    columns = ("model", "before", "after", "chance", "reference", "prompts", "completion loss")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        after = f"{row['model']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})"
        loss = " to ".join(f"{value:.3f}" for value in row["loss"])
        cells = [row["name"], percent(row["base"]), after, percent(row["chance"]), percent(row["reference"])]
        lines.append(f"| {' | '.join(map(str, [*cells, row['prompts'], loss]))} |")
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    with picture(file, (7.5, 1.1 + 0.5 * len(rows))) as axes:
        places = range(len(rows))
        for place, row in zip(places, rows, strict=True):
            axes.plot([row["base"], row["model"]], [place, place], color="0.75", linewidth=2, zorder=1)
            axes.plot(row["interval"], [place, place], color="tab:blue", linewidth=5, alpha=0.35, zorder=2)
        for key, label, style in (
            ("base", "before", {"marker": "o", "color": "0.5"}),
            ("model", "after, with its 95% interval", {"marker": "o", "color": "tab:blue"}),
            ("chance", "the same answers, another instruction (chance)", {"marker": "|", "color": "tab:red", "s": 150}),
            ("reference", "held-out references", {"marker": "|", "color": "black", "s": 150}),
        ):
            there = [place for place in places if rows[place][key] is not None]
            axes.scatter([rows[place][key] for place in there], there, label=label, zorder=3, **style)
        axes.set_yticks(places, [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set(xlim=(-0.02, 1.02), xlabel="instruction following")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    args = parser.parse_args()
    rows = []
    for given in args.evaluations:
        name, _, folder = given.rpartition("=")
        rows.append(row_of(name, json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))))
    print(table(rows))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
