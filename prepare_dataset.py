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
    data: list[str] = field(metadata={"help": "files, folders or Hub datasets, one or several"})
    tokenizer: str = field(metadata={"help": "the folder that convert_checkpoint.py wrote"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    source: str = field(default="tinystories_instruct", metadata={"help": "the form of the data"})
    task: str = field(default="topic_ending", metadata={"help": "what to make of a record"})
    columns: str | None = field(default=None, metadata={"help": "for --source columns: instruction=COLUMN,response=…"})
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
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} is out of range; read at least one record.")

    import transformers
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
    from datasets.utils.logging import disable_progress_bar

    from fledge.budget import Budget
    from fledge.curation import balance, split_by_group, split_shares
    from fledge.encoding import OVERFLOW_POLICIES, encode, fit
    from fledge.publishing import dataset_card
    from fledge.sources import load_source
    from fledge.tasks import RejectedRecord, load_task
    from fledge.templates import add_template
    from fledge.tokenizers import encoding_of, open_tokenizer

    disable_progress_bar()
    transformers.logging.set_verbosity_error()
    shares = split_shares(args.split)
    source, task = load_source(args.source, args.columns), load_task(args.task)
    tokenizer = open_tokenizer(args.tokenizer)
    template = args.template or task.TEMPLATE
    add_template(tokenizer, template)
    max_length = tokenizer.model_max_length if args.max_length is None else args.max_length
    if not 0 < max_length <= tokenizer.model_max_length:
        raise UserError(f"--max_length {max_length} is outside 1 to {tokenizer.model_max_length}, the model's context.")
    if args.overflow not in OVERFLOW_POLICIES:
        raise UserError(f"--overflow {args.overflow} is unknown; choose one of {', '.join(OVERFLOW_POLICIES)}.")
    classes = {column: labels for column, labels in task.COLUMNS.items() if isinstance(labels, tuple)}
    if args.balance not in (None, *classes):
        raise UserError(
            f"--balance {args.balance} is no column to balance; {args.task} has {', '.join(classes) or 'none'}."
        )
    budget = Budget(args.source, args.task, template, args.seed, max_length, args.overflow)

    # Read: every record becomes an example or is counted under a reason.
    examples, seen = [], set()
    for record in (record for file in files for record in source.records(file)):
        if budget.rows_read == args.limit:
            break
        budget.rows_read += 1
        try:
            # Chance is the record's own, so that its examples do not depend on the records before it.
            made = task.examples(record, random.Random(f"{args.seed} {budget.rows_read}"))
        except RejectedRecord as reason:
            budget.rejected[str(reason)] += 1
            continue
        budget.records_used += 1
        budget.examples += len(made)
        for example in made:
            fingerprint = hash(tuple((message["role"], message["content"]) for message in example["messages"]))
            if fingerprint in seen:
                budget.rejected["an exact duplicate"] += 1
                continue
            seen.add(fingerprint)
            examples.append(example)
    print(f"Read {budget.rows_read:,} records: {len(examples):,} examples.", flush=True)

    # Encode, and let the overflow policy decide.
    kept = []
    for begin in range(0, len(examples), 1000):
        batch = examples[begin : begin + 1000]
        with encoding_of("A record"):
            encoded = encode(tokenizer, [example["messages"] for example in batch])
        for example, whole in zip(batch, encoded, strict=True):
            fitted = fit(tokenizer, example["messages"], whole, max_length, args.overflow)
            if fitted is None:
                budget.rejected[f"longer than {max_length} tokens"] += 1
            else:
                example["messages"], ids = fitted
                kept.append((example, ids))
    if not kept:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in budget.rejected.most_common())
        raise UserError(f"No record of {', '.join(files)} can be used ({reasons or 'there is none'}).")

    # Split by topic, so that no topic is in two splits; then balance each split.
    rng = random.Random(args.seed)
    splits = split_by_group(kept, shares, rng)
    if args.balance:
        for name, rows in splits.items():
            splits[name] = balance(rows, args.balance, classes[args.balance], rng)
            if surplus := len(rows) - len(splits[name]):
                budget.rejected[f"surplus of one {args.balance}"] += surplus
    for name, rows in splits.items():
        if not rows:
            raise UserError(
                f"The {name} split is empty with {len(kept):,} usable records; give more data or another --split."
            )
        labels = {column: [example[column] for example, _ in rows] for column in classes}
        budget.describe(name, [encoded for _, encoded in rows], labels, tokenizer.eos_token_id)

    kinds = {"string": Value("string"), "strings": List(Value("string"))}
    columns = {
        column: ClassLabel(names=list(kind)) if isinstance(kind, tuple) else kinds[kind]
        for column, kind in task.COLUMNS.items()
    }
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")}), **columns})
    with staged(args.output_dir, args.overwrite, "budget.json") as folder:
        (folder / "data").mkdir()
        for name, rows in splits.items():
            text = [{column: example[column] for column in features} for example, _ in rows]
            Dataset.from_list(text, features=features).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        tokenized = {name: Dataset.from_list([encoded.row for _, encoded in rows]) for name, rows in splits.items()}
        DatasetDict(tokenized).save_to_disk(folder / "tokenized")
        tokenizer.save_pretrained(folder / "tokenizer")
        budget.save(folder, [encoded for _, encoded in splits["train"]])
        (folder / "README.md").write_text(
            dataset_card(budget.as_dict(), splits["train"][0][0]["messages"]), encoding="utf-8"
        )
    print(budget.markdown())
    print(f"{args.output_dir} is ready (budget.png shows the lengths). Next: train_sft.py")


if __name__ == "__main__":
    run(main)
