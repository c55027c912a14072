"""The budget report: what a training will see, counted before it starts."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fledge.cli import write_json
from fledge.pictures import picture
from fledge.preparation.chunks import Facts
from fledge.preparation.reasons import ANSWER_LOST, OF_ANSWERS, Reason, too_long, unmet, unwritable
from fledge.tokenizers.spelling import named

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
FEW_SUPERVISED, RARE_CLASS, MANY_DROPPED = 0.01, 0.1, 0.05  # below or above which a budget warns
LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass
class Budget:
    """The counts of what was read, rejected and kept.

    `rows_read` records give `examples`, of which `rows_kept` are kept. `rejected` counts by reason the records that
    give no example and the examples that are left out; their sum is (rows_read - records_used) + (examples -
    rows_kept). `cuttable` examples have a prompt that --overflow cut_prompt may shorten, and `remedies` says for each
    key how many of the over-long examples it would keep.
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
    cuttable: int = 0
    rejected: Counter = field(default_factory=Counter)
    remedies: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict] = field(default_factory=dict)
    license: str | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)  # a kind, or the labels of a class
    about_task: dict[str, Any] = field(default_factory=dict)  # see `Task.about`
    keep: str | None = None  # --keep, for a model's answers: pairs or best
    only: list[str] = field(default_factory=list)  # --only

    def count(self, facts: Facts) -> None:
        """Adds the counts of what was read and what was left out."""
        found = facts.found
        self.rows_read, self.records_used, self.examples = (found.counts[key] for key in ("read", "used", "examples"))
        self.cuttable = found.counts["cuttable"]
        # A chunk's file has the text of a reason; texts that are not below are reasons of the task.
        of_encoding = (too_long(self.max_length), ANSWER_LOST, unwritable())
        own = {reason.text: reason for reason in (*of_encoding, *OF_ANSWERS, unmet(self.only))}
        self.rejected.update({own.get(text, Reason(text)): count for text, count in found.rejected.items()})
        if found.lacking:
            self.rejected[unwritable(named(found.lacking))] = self.rejected.pop(unwritable())
        self.remedies = dict(found.remedies.most_common())

    def describe(self, split: str, facts: dict[str, np.ndarray], classes: dict[str, tuple[str, ...]]) -> None:
        """Adds the figures of one finished split from the facts of its rows (see `fledge.preparation.chunks`)."""
        total, completion = facts["length"], facts["completion_length"]
        counts = {
            column: {label: int(n) for label, n in zip(labels, np.bincount(facts[column]), strict=False) if n}
            for column, labels in classes.items()
        }
        counts = {column: dict(sorted(of_column.items())) for column, of_column in counts.items()}
        self.splits[split] = {
            "rows": len(total),
            "labels": next(iter(counts.values()), {}),
            "classes": counts,
            "tokens": int(total.sum()),
            "supervised_share": float(facts["supervised"].sum() / total.sum()),
            "eos_supervised": int(facts["is_ended"].sum()),
            "cut": int(facts["was_cut"].sum()),
            "unknown": int((~facts["is_known"]).sum()),
            "unlearned": int(facts["unlearned"].sum()),
            "prompts_cut": int((facts["was_cut"] & facts["is_ended"]).sum()),
            "lengths": {
                name: {f"{quantile:g}": int(np.quantile(values, quantile)) for quantile in QUANTILES}
                for name, values in (("prompt", total - completion), ("completion", completion), ("total", total))
            },
            "longer_than": {str(limit): int((total > limit).sum()) for limit in LENGTHS},
        }

    @property
    def record(self) -> str:
        """What a record is called."""
        return "prompt" if self.keep else "record"

    def as_dict(self) -> dict:
        kept = sum(split["rows"] for split in self.splits.values())
        content = dict(vars(self))
        content["rejected"] = {str(reason): count for reason, count in self.rejected.most_common()}
        return {**content, "rows_kept": kept, "warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """A sentence for each problem of this data for a training, with the key that changes it."""
        train = self.splits["train"]
        sentences = []
        if train["supervised_share"] < FEW_SUPERVISED:
            helps = "; a smaller --max_length with --overflow cut_prompt shortens the texts" if self.cuttable else ""
            sentences.append(f"Only {train['supervised_share']:.2%} of the training tokens are supervised{helps}.")
        if cut := sum(split["prompts_cut"] for split in self.splits.values()):
            rows = sum(split["rows"] for split in self.splits.values())
            sentences.append(
                f"{cut:,} of {rows:,} rows have a prompt that was cut to fit {self.max_length} tokens, and an answer "
                "may rest on what is gone; --overflow drop leaves them out."
            )
        if unlearned := sum(split["unlearned"] for split in self.splits.values()):
            sentences.append(
                f"{unlearned:,} earlier answers of conversations are not supervised, since the vocabulary joins them "
                "with the template's text; --template story_chat keeps the two apart."
            )
        if unknown := sum(split["unknown"] for split in self.splits.values()):
            sentences.append(
                f"{unknown:,} of {sum(split['rows'] for split in self.splits.values()):,} rows have an answer with the "
                "token for unknown text, which the model then learns to write; use a base with a larger vocabulary."
            )
        for column, counts in train["classes"].items():
            rarest, most = min(counts, key=counts.get), max(counts, key=counts.get)
            if counts[rarest] < RARE_CLASS * counts[most]:
                sentences.append(
                    f"{column} {rarest} is rare: {counts[rarest]:,} of {train['rows']:,} training rows, {most} has "
                    f"{counts[most]:,}; --balance {column} makes them equal."
                )
        for reason, count in self.rejected.most_common():
            of_what, total = ("examples", self.examples) if reason.of_examples else (f"{self.record}s", self.rows_read)
            if not reason.remedy or count <= MANY_DROPPED * total:
                continue
            changes = f"{reason.remedy} changes that"
            if reason == too_long(self.max_length):
                keeps = [f"{way} would keep {n:,} of them" for way, n in self.remedies.items()]
                changes = ", ".join(keeps) or "only a base with a longer context changes that"
            sentences.append(f"{count / total:.1%} of the {of_what} are left out ({reason}); {changes}.")
        return sentences

    def markdown(self) -> str:
        """The report as Markdown: what was kept, what was left out and why, and the lengths of the rows."""
        content = self.as_dict()
        kept = f"{content['rows_kept']:,}"
        if self.keep == "pairs":
            kept += " pairs; the figures below are those of the chosen answers"
        lines = [
            f"# Budget: {self.task} from {self.source}",
            "",
            f"Read {self.rows_read:,} {self.record}s and kept {kept}.",
            f"Template `{self.template}`, max_length {self.max_length}, overflow `{self.overflow}`, seed {self.seed}.",
            "",
        ]
        if self.rejected:
            lines += [f"| left out | {self.record}s |", "|---|---:|"]
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
        lines += ["", *(f"**{sentence}**  " for sentence in self.warnings())] if self.warnings() else []
        over = self.splits["train"]["longer_than"]
        lines += ["", "Training rows longer than " + ", ".join(f"{limit}: {n:,}" for limit, n in over.items())]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path, train: dict[str, np.ndarray]) -> None:
        """Writes `budget.json`, `budget.md` and `budget.png`, the lengths of the training rows."""
        write_json(folder / "budget.json", self.as_dict())
        (folder / "budget.md").write_text(self.markdown(), encoding="utf-8")
        with picture(folder / "budget.png", (7, 3.2)) as axes:
            axes.hist(
                [train["length"] - train["completion_length"], train["completion_length"]],
                bins=60,
                histtype="stepfilled",
                alpha=0.6,
                label=["prompt", "completion"],
            )
            limit = f"max_length {self.max_length}"
            axes.axvline(self.max_length, color="black", linestyle="--", linewidth=1, label=limit)
            axes.set(xlabel="tokens", ylabel="training rows")
            axes.legend(frameon=False)
