"""Records → a dataset of instructions and responses, encoded for training, with a report of what it holds.

    python prepare_dataset.py --source tinystories_instruct --data tales.txt.gz --task topic_ending \\
        --tokenizer base --balance ending --output_dir data
"""

import random
import sys
from dataclasses import dataclass, field

from fledge.cli import UserError, check_output_dir, parse, run, staged


@dataclass
class PrepareArguments:
    data: list[str] = field(metadata={"help": "one file or several (text or .gz)"})
    tokenizer: str = field(metadata={"help": "the folder that convert_checkpoint.py wrote"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    source: str = field(default="tinystories_instruct", metadata={"help": "the form of the data"})
    task: str = field(default="topic_ending", metadata={"help": "what to make of a record"})
    template: str | None = field(default=None, metadata={"help": "the prompt's style; default: the task's own"})
    balance: str | None = field(default=None, metadata={"help": "a column whose values become equally frequent"})
    split: str = field(default="85/5/10", metadata={"help": "train/validation/test in percent (default 85/5/10)"})
    max_length: int | None = field(default=None, metadata={"help": "in tokens; default: the model's context length"})
    overflow: str = field(default="drop", metadata={"help": "drop, cut_prompt or cut_completion (default drop)"})
    limit: int | None = field(default=None, metadata={"help": "read this many records"})
    seed: int = field(default=0, metadata={"help": "of the splits and the balancing (default 0)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier dataset in output_dir"})


def main():
    (args,) = parse(sys.argv[1:], PrepareArguments, description=__doc__)
    check_output_dir(args.output_dir, args.overwrite, "budget.json")
    files = [args.data] if isinstance(args.data, str) else args.data
    shares = split_shares(args.split)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} is out of range; read at least one record.")

    import transformers
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets.utils.logging import disable_progress_bar

    from fledge.budget import Budget
    from fledge.encoding import OVERFLOW_POLICIES, encode, fit
    from fledge.publishing import dataset_card
    from fledge.sources import load_source
    from fledge.tasks import RejectedRecord, load_task
    from fledge.templates import load_template
    from fledge.tokenizers import encoding_of, open_tokenizer

    disable_progress_bar()
    transformers.logging.set_verbosity_error()
    source, task = load_source(args.source), load_task(args.task)
    tokenizer = open_tokenizer(args.tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The vocabulary of {args.tokenizer} has no end-of-text token, so a model with it can generate but not "
            "learn where an answer ends; train one whose vocabulary has <|endoftext|>."
        )
    template = args.template or task.TEMPLATE
    tokenizer.chat_template = load_template(template)
    max_length = tokenizer.model_max_length if args.max_length is None else args.max_length
    if not 0 < max_length <= tokenizer.model_max_length:
        raise UserError(f"--max_length {max_length} is outside 1 to {tokenizer.model_max_length}, the model's context.")
    if args.overflow not in OVERFLOW_POLICIES:
        raise UserError(f"--overflow {args.overflow} is unknown; choose one of {', '.join(OVERFLOW_POLICIES)}.")
    if args.balance not in (None, task.LABEL):
        raise UserError(f"--balance {args.balance} is no column to balance; {args.task} has {task.LABEL}.")
    budget = Budget(args.source, args.task, template, args.seed, max_length, args.overflow)

    # Read: every record becomes an example or is counted under a reason.
    examples, seen = [], set()
    for record in (record for file in files for record in source.records(file)):
        if budget.rows_read == args.limit:
            break
        budget.rows_read += 1
        try:
            example = task.example(record)
        except RejectedRecord as reason:
            budget.rejected[str(reason)] += 1
            continue
        if (example["instruction"], example["response"]) in seen:
            budget.rejected["an exact duplicate"] += 1
            continue
        seen.add((example["instruction"], example["response"]))
        examples.append(example)
    print(f"Read {budget.rows_read:,} records: {len(examples):,} examples.", flush=True)

    # Encode, and let the overflow policy decide.
    kept = []
    for begin in range(0, len(examples), 1000):
        batch = examples[begin : begin + 1000]
        with encoding_of("A record"):
            encoded = encode(tokenizer, [e["instruction"] for e in batch], [e["response"] for e in batch])
        for example, whole in zip(batch, encoded, strict=True):
            fitted = fit(whole, max_length, args.overflow)
            if fitted is None:
                budget.rejected[f"longer than {max_length} tokens"] += 1
            else:
                kept.append((example, fitted))
    if not kept:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in budget.rejected.most_common())
        raise UserError(f"No record of {', '.join(files)} can be used ({reasons or 'there is none'}).")

    # Split by topic, so that no topic is in two splits; then balance each split.
    rng = random.Random(args.seed)
    splits = split_by_group(kept, shares, rng)
    if args.balance:
        for name, rows in splits.items():
            splits[name] = balance(rows, task.LABEL, task.LABELS, rng)
            if surplus := len(rows) - len(splits[name]):
                budget.rejected[f"surplus of one {args.balance}"] += surplus
    for name, rows in splits.items():
        if not rows:
            raise UserError(
                f"The {name} split is empty with {len(kept):,} usable records; give more data or another --split."
            )
        labels = [example[task.LABEL] for example, _ in rows]
        budget.describe(name, [encoded for _, encoded in rows], labels, tokenizer.eos_token_id)

    features = Features(
        {"instruction": Value("string"), "response": Value("string"), task.LABEL: ClassLabel(names=list(task.LABELS))}
    )
    with staged(args.output_dir, args.overwrite, "budget.json") as folder:
        (folder / "data").mkdir()
        for name, rows in splits.items():
            text = [{column: example[column] for column in features} for example, _ in rows]
            Dataset.from_list(text, features=features).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        tokenized = {name: Dataset.from_list([encoded.row for _, encoded in rows]) for name, rows in splits.items()}
        DatasetDict(tokenized).save_to_disk(folder / "tokenized")
        tokenizer.save_pretrained(folder / "tokenizer")
        budget.save(folder, [encoded for _, encoded in splits["train"]])
        (folder / "README.md").write_text(dataset_card(budget.as_dict(), splits["train"][0][0]), encoding="utf-8")
    print(budget.markdown())
    print(f"{args.output_dir} is ready (budget.png shows the lengths). Next: train_sft.py")


def split_shares(text: str) -> dict[str, float]:
    """`85/5/10` → the share of each split."""
    try:
        percents = [float(part) for part in text.split("/")]
    except ValueError:
        percents = []
    if len(percents) != 3 or not min(percents) > 0 or not abs(sum(percents) - 100) <= 1e-6:
        raise UserError(f"--split {text} is not three positive percentages that add up to 100, such as 85/5/10.")
    return dict(zip(("train", "validation", "test"), (percent / 100 for percent in percents), strict=True))


def split_by_group(rows: list, shares: dict[str, float], rng: random.Random) -> dict[str, list]:
    """Deals whole groups to the splits until each has its share of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row[0]["group"], []).append(row)
    order = sorted(groups)
    rng.shuffle(order)
    splits, dealt, bound, names = {name: [] for name in shares}, 0, 0.0, iter(shares)
    for group in order:
        while dealt >= bound - 1e-9:
            name = next(names)
            bound += shares[name] * len(rows)
        splits[name] += groups[group]
        dealt += len(groups[group])
    for part in splits.values():
        rng.shuffle(part)
    return splits


def balance(rows: list, label: str, labels: tuple[str, ...], rng: random.Random) -> list:
    """Keeps as many rows of each label as the rarest one has.

    Raises:
        UserError: a label does not occur.
    """
    by_label = {name: [row for row in rows if row[0][label] == name] for name in labels}
    rarest = min(labels, key=lambda name: len(by_label[name]))
    if not by_label[rarest]:
        raise UserError(f"A split has no example with {label} {rarest}, so it cannot be balanced; give more data.")
    balanced = [row for rows_of in by_label.values() for row in rng.sample(rows_of, len(by_label[rarest]))]
    rng.shuffle(balanced)
    return balanced


if __name__ == "__main__":
    run(main)
