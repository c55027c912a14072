"""The budget report: what goes into a training, known before it starts."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fledge.cli import write_json
from fledge.encoding import IGNORED, Encoded

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass
class Budget:
    """What is read, rejected and kept.

    `rows_read` records give `examples`, of which `rows_kept` are kept; `rejected` counts by reason the records that
    give none and the examples that are left out. So (rows_read - records_used) + (examples - rows_kept) is their sum.
    """

    source: str
    task: str
    template: str
    seed: int
    max_length: int
    overflow: str
    rows_read: int = 0
    records_used: int = 0
    examples: int = 0
    rejected: Counter = field(default_factory=Counter)
    splits: dict[str, dict] = field(default_factory=dict)

    def describe(self, split: str, encoded: list[Encoded], labels: dict[str, list[str]], eos_token_id: int) -> None:
        """Adds the figures of one finished split; `labels` holds each class column's values, row by row."""
        lengths = np.array([len(example) for example in encoded])
        prompt, completion = (
            np.array([len(getattr(example, part)) for example in encoded]) for part in ("prompt_ids", "completion_ids")
        )
        self.splits[split] = {
            "rows": len(encoded),
            "labels": dict(sorted(Counter(next(iter(labels.values()), [])).items())),
            "classes": {column: dict(sorted(Counter(values).items())) for column, values in labels.items()},
            "tokens": int(lengths.sum()),
            "supervised_share": float(
                sum(len(example) - example.labels.count(IGNORED) for example in encoded) / lengths.sum()
            ),
            "eos_supervised": sum(example.input_ids[-1] == eos_token_id for example in encoded),
            "cut": sum(example.was_cut for example in encoded),
            "lengths": {
                name: {f"{quantile:g}": int(np.quantile(values, quantile)) for quantile in QUANTILES}
                for name, values in (("prompt", prompt), ("completion", completion), ("total", lengths))
            },
            "longer_than": {str(limit): int((lengths > limit).sum()) for limit in LENGTHS},
        }

    def as_dict(self) -> dict:
        kept = sum(split["rows"] for split in self.splits.values())
        content = dict(vars(self))
        content["rejected"] = dict(self.rejected.most_common())
        return {**content, "rows_kept": kept}

    def markdown(self) -> str:
        """The report for people: what was kept, what was not and why, and how long the rows are."""
        content = self.as_dict()
        lines = [
            f"# Budget: {self.task} from {self.source}",
            "",
            f"Read {self.rows_read:,} records and kept {content['rows_kept']:,}.",
            f"Template `{self.template}`, max_length {self.max_length}, overflow `{self.overflow}`, seed {self.seed}.",
            "",
        ]
        if self.rejected:
            lines += ["| left out | records |", "|---|---:|"]
            lines += [f"| {reason} | {count:,} |" for reason, count in content["rejected"].items()]
            lines.append("")
        lines += [
            "| split | rows | labels | tokens | supervised | ends supervised | median | p95 | longest |",
            "|---|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, split in self.splits.items():
            labels = ", ".join(f"{count:,} {label}" for label, count in split["labels"].items())
            median, p95, longest = (split["lengths"]["total"][quantile] for quantile in ("0.5", "0.95", "1"))
            lines.append(
                f"| {name} | {split['rows']:,} | {labels} | {split['tokens']:,} | {split['supervised_share']:.1%} "
                f"| {split['eos_supervised']:,} of {split['rows']:,} | {median} | {p95} | {longest} |"
            )
        over = self.splits["train"]["longer_than"]
        lines += ["", "Training rows longer than " + ", ".join(f"{limit}: {n:,}" for limit, n in over.items())]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path, train: list[Encoded]) -> None:
        """Writes `budget.json`, `budget.md` and `budget.png`, the lengths of the training rows."""
        write_json(folder / "budget.json", self.as_dict())
        (folder / "budget.md").write_text(self.markdown(), encoding="utf-8")

        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
        axes.hist(
            [[len(example.prompt_ids) for example in train], [len(example.completion_ids) for example in train]],
            bins=60,
            histtype="stepfilled",
            alpha=0.6,
            label=["prompt", "completion"],
        )
        axes.axvline(self.max_length, color="black", linestyle="--", linewidth=1, label=f"max_length {self.max_length}")
        axes.set(xlabel="tokens", ylabel="training rows")
        axes.legend(frameon=False)
        figure.savefig(folder / "budget.png", dpi=120)
        pyplot.close(figure)
