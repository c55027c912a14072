"""Records → a dataset of instructions and responses, encoded for training, with a report of its content.

    python prepare_dataset.py --source tinystories_instruct --data tales.txt.gz --task topic_ending \\
        --tokenizer base --balance ending --output_dir data
    python prepare_dataset.py --source answers --data answers --task topic_ending --tokenizer model --output_dir pairs
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fledge.cli import check_hub_id, parse
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.hub import check_license
from fledge.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from fledge.sources import load_source, source_names
from fledge.tasks import Task, open_task, task_names
from fledge.terminal import has_colours, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fledge.preparation.budget import Budget
    from fledge.preparation.chunks import Facts, Preparation
    from fledge.preparation.preferences import Choice
    from fledge.sources import Source


TEMPLATE_NAMES = "alpaca, inst, phi3, play, story, story_chat"  # fledge.templates takes seconds to import
RANGES = {
    "show": NOT_NEGATIVE,
    "limit": AT_LEAST_ONE,
    "pairs_per_prompt": AT_LEAST_ONE,
    "margin": POSITIVE,
    "max_length": AT_LEAST_ONE,
    "near_duplicates": Range(above=0, below=1),  # a similarity
    "num_proc": AT_LEAST_ONE,
    "seed": SEED,
}


@dataclass
class PrepareArguments:
    GROUPS: ClassVar = {"source": "what to read", "template": "how to encode it", "max_shard_size": "what to write"}

    data: list[str] = field(metadata={"help": "one or more files, folders or Hub datasets"})
    tokenizer: str = field(metadata={"help": "the folder that convert_checkpoint.py wrote, or another tokenizer's"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    source: str = field(
        default="tinystories_instruct",
        metadata={"help": f"the form of the data: {', '.join(source_names())}"},
    )
    task: str = field(
        default="topic_ending",
        metadata={
            "help": f"what to make of a record: {', '.join(task_names())} (default topic_ending), or a Python file "
            "with a task of your own, whose code is run"
        },
    )
    columns: str | None = field(default=None, metadata={"help": "for --source columns: instruction=COLUMN,response=…"})
    keep: str | None = field(
        default=None,
        metadata={
            "help": "for --source answers: pairs (default), preferences for train_dpo.py; or best, the best answer to "
            "each prompt for train_sft.py"
        },
    )
    pairs_per_prompt: int = field(default=4, metadata={"help": "for --keep pairs: at most this many (default 4)"})
    margin: float = field(
        default=0.3, metadata={"help": "for --keep pairs: the least difference in reward; less is a tie (default 0.3)"}
    )
    rewards: list[str] | None = field(
        default=None, metadata={"help": "for --source answers: the rewards that rank (default: the task's)"}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "for --source answers: a weight for each (default: the task's)"}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": f"the prompt's style: {TEMPLATE_NAMES} (default: the task's own, of answers the model's)",
        },
    )
    only: list[str] = field(
        default_factory=list, metadata={"help": "keep only these rows: COLUMN=VALUE, as in kind=words"}
    )
    balance: str | None = field(default=None, metadata={"help": "a column whose values become equally frequent"})
    split: str | None = field(
        default=None,
        metadata={"help": "percentages, or source: the data's own splits (default 85/5/10; 90/10/0 for answers)"},
    )
    max_length: int | None = field(default=None, metadata={"help": "in tokens; default: the model's context length"})
    overflow: str = field(default="drop", metadata={"help": "drop, cut_prompt or cut_completion (default drop)"})
    near_duplicates: float | None = field(
        default=None,
        metadata={"help": "leave out rows this similar to an earlier one, such as 0.8 (default: none)"},
    )
    limit: int | None = field(default=None, metadata={"help": "read this many records"})
    max_shard_size: str = field(
        default="500MB", metadata={"help": "largest parquet file, by its size in memory (default 500MB)"}
    )
    license: str | None = field(default=None, metadata={"help": "an SPDX id for the card; default: the source's own"})
    show: int = field(default=0, metadata={"help": "print this many rows, with the supervised tokens in colour"})
    push_to_hub: str | None = field(default=None, metadata={"help": "user/name: also upload the dataset there"})
    private: bool = field(default=False, metadata={"help": "make the repository on the Hub private"})
    num_proc: int | None = field(default=None, metadata={"help": "processes; default: one for each core"})
    seed: int = field(default=0, metadata={"help": "random seed of the splits and the balancing (default 0)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier dataset in output_dir"})


@dataclass
class Plan:
    """The checked arguments, and the source, task and tokenizer that they name."""

    arguments: PrepareArguments
    source: "Source"
    task: Task
    template: str
    shares: dict[str, float] | None
    max_shard_bytes: int
    preparation: "Preparation"


def main() -> Path:
    """Returns the folder it wrote."""
    (args,) = parse(sys.argv[1:], PrepareArguments, description=__doc__)
    inputs = {"--data": args.data, "--tokenizer": args.tokenizer}
    with claimed(args.output_dir, "prepare_dataset.py", args.overwrite, inputs) as output:
        prepare(args, output)
    if args.push_to_hub:
        push(Path(args.output_dir), args.push_to_hub, args.private)
    return output.path


def prepare(args: PrepareArguments, output: Output) -> None:
    # ------------------------------------------------------------ Check the arguments, and open what they name
    plan = make_plan(args)

    from fledge.preparation.chunks import Facts, named_chunks, prepare_chunks

    # ------------------------------------------------------------ Encode all records, then write the splits
    with output.staged() as folder:
        plan.preparation.folder = folder / "chunks"
        plan.preparation.folder.mkdir()
        num_proc = args.num_proc or os.cpu_count() or 1
        prepare_chunks(plan.preparation, lambda: named_chunks(plan.source, args.data, args.limit), num_proc)
        budget = write_dataset(plan, Facts.read(folder / "chunks"), folder)
        shutil.rmtree(folder / "chunks")

    # ------------------------------------------------------------ Report
    print(budget.markdown())
    if args.show:
        show(Path(args.output_dir), args.show)
    print(f"{args.output_dir} is ready (budget.png shows the lengths).")
    suggested = {"output_dir": str(output.path.parent / "model")}
    used = {"model_name_or_path": args.tokenizer, "dataset": args.output_dir}
    script = "train_dpo.py" if plan.preparation.has_pairs else "train_sft.py"
    print(f"Next: {next_command(script, used, suggested)}")


def make_plan(args: PrepareArguments) -> Plan:
    """Checks the arguments and opens what they name.

    Raises:
        UserError: an argument is wrong.
    """
    if args.push_to_hub is not None:
        check_hub_id("--push_to_hub", args.push_to_hub)
    if args.license:
        check_license(args.license)
    check_ranges(args, RANGES)
    if args.near_duplicates and not importlib.util.find_spec("rensa"):
        raise UserError("--near_duplicates needs the package rensa; pip install 'fledge-gpt[dedup]'.")

    from fledge.encoding import OVERFLOW_POLICIES
    from fledge.preparation.choices import check_conditions, choose_length
    from fledge.preparation.chunks import Preparation
    from fledge.preparation.curation import split_shares
    from fledge.preparation.shards import bytes_of
    from fledge.tokenizers import open_tokenizer
    from fledge.tokenizers.fast import TextEncoder

    quiet()
    source, task = load_source(args.source, args.columns), open_task(args.task)
    choice = choose_among_answers(args, task)
    split = args.split or ("90/10/0" if choice else "85/5/10")
    shares = None if split == "source" else split_shares(split)
    max_shard_bytes = bytes_of(args.max_shard_size)
    tokenizer = open_tokenizer(args.tokenizer)
    template = choose_template(args, task, tokenizer)
    max_length = choose_length(args.tokenizer, args.max_length, tokenizer)
    if args.overflow not in OVERFLOW_POLICIES:
        raise UserError(f"--overflow {args.overflow} is unknown; choose one of {', '.join(OVERFLOW_POLICIES)}.")
    if args.balance not in (None, *task.classes):
        columns = ", ".join(task.classes) or "none"
        raise UserError(f"--balance {args.balance} is no column to balance; {task.name} has {columns}.")
    check_conditions(args.only, task)
    preparation = Preparation(
        source,
        args.task,
        tokenizer,
        TextEncoder(tokenizer),
        max_length,
        args.overflow,
        args.seed,
        args.near_duplicates is not None,
        choice=choice,
        only=args.only,
    )
    return Plan(args, source, task, template, shares, max_shard_bytes, preparation)


def choose_among_answers(args: PrepareArguments, task: Task) -> "Choice | None":
    """How training data is chosen among a model's answers; `None` for another source.

    Raises:
        UserError: a key does not go with the source.
    """
    from fledge.preparation.preferences import KEEP, Choice
    from fledge.rewards.functions import chosen_rewards, weights_of

    if args.source != "answers":
        for key in ("keep", "rewards", "reward_weights"):
            if vars(args)[key]:
                raise UserError(f"--{key} goes with --source answers; {args.source} has no answers to choose from.")
        return None
    if args.keep not in (None, *KEEP):
        raise UserError(f"--keep {args.keep} is unknown; choose {' or '.join(KEEP)}.")
    if own := sorted(set(args.rewards or ()) - weights_of(task).keys()):
        raise UserError(
            f"--rewards {own[0]} is not among the rewards that answers have: {', '.join(weights_of(task))}."
        )
    if args.overflow != "drop":
        raise UserError(f"--overflow {args.overflow} does not go with --source answers, which are kept whole or not.")
    if args.split == "source":
        raise UserError("--split source does not go with --source answers, which are all to training prompts.")
    weights = chosen_rewards(task, args.rewards, args.reward_weights)
    return Choice(args.keep or "pairs", weights, args.margin, args.pairs_per_prompt)


def choose_template(args: PrepareArguments, task: Task, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Gives the tokenizer the template and returns its name. Answers keep the template of their model.

    Raises:
        UserError: there is none of that name, or the model has none.
    """
    from fledge.templates import add_template, load_template, names

    if args.source == "answers" and not args.template:
        if tokenizer.chat_template is None:
            raise UserError(f"--tokenizer {args.tokenizer} has no chat template; name the model that gave the answers.")
        own = (name for name in names() if load_template(name) == tokenizer.chat_template)
        return next(own, "the model's own")
    template = args.template or task.template
    add_template(tokenizer, template)
    return template


def write_dataset(plan: Plan, facts: "Facts", folder: Path) -> "Budget":
    """Splits and balances the rows that the facts are of, and writes the dataset into `folder`.

    Raises:
        UserError: there is no row, or a split is empty or cannot be balanced.
    """
    from fledge.encoding import prompt_text
    from fledge.preparation.budget import Budget
    from fledge.preparation.curation import assign_splits
    from fledge.preparation.duplicates import near_duplicates
    from fledge.preparation.shards import first_rows, write_splits
    from fledge.preparation.tables import written_columns
    from fledge.publishing.repositories import dataset_card

    args, preparation, classes = plan.arguments, plan.preparation, plan.task.classes
    budget = Budget(
        args.source,
        plan.task.name,
        plan.template,
        args.seed,
        preparation.max_length,
        args.overflow,
        license=args.license or plan.source.license(args.data),
        columns={column: list(kind) if isinstance(kind, tuple) else kind for column, kind in plan.task.columns.items()},
        about_task=plan.task.about,
        keep=preparation.choice.keep if preparation.choice else None,
        only=args.only,
    )
    budget.count(facts)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in budget.rejected.most_common())
    left_out = f" Left out: {reasons}." if reasons else ""
    print(f"Read {budget.rows_read:,} {budget.record}s: {budget.examples:,} examples.{left_out}", flush=True)
    if not facts.total:
        raise UserError(
            f"No {budget.record} of {', '.join(args.data)} can be used ({reasons}); give other data, or another "
            "--source, --task, --template or --max_length."
        )

    balanced = (args.balance, classes[args.balance]) if args.balance else None
    near = None
    if args.near_duplicates:
        near = near_duplicates(facts.files("minhash.npy"), facts.columns["group"], args.near_duplicates)
    splits = assign_splits(facts, plan.shares, balanced, args.seed, near)
    budget.rejected.update(splits.left_out)
    for name in splits.names:
        budget.describe(name, facts.of(splits.rows(name)), classes)
    write_splits(folder, facts, splits, written_columns(plan.task, preparation.has_pairs), plan.max_shard_bytes)
    preparation.tokenizer.save_pretrained(folder / "tokenizer")
    budget.save(folder, facts.of(splits.rows("train")))
    rows = first_rows(folder, "train", 2)
    prompt = prompt_text(preparation.tokenizer, rows[0]["messages"][:-1])
    (folder / "README.md").write_text(dataset_card(budget.as_dict(), rows, prompt), encoding="utf-8")
    return budget


def push(data: Path, repo_id: str, private: bool) -> None:
    """Uploads the parquet files, the card and the budget, but not the ids and the tokenizer, which belong to one model.

    Raises:
        UserError: the Hub refuses the upload.
    """
    from fledge.publishing.preflight import check_folder
    from fledge.publishing.repositories import build_dataset
    from fledge.publishing.upload import Repository, send

    with tempfile.TemporaryDirectory(prefix="fledge-") as folder:
        build_dataset(Path(folder), data)
        check_folder("dataset", Path(folder))
        print(f"Sent to {send(Path(folder), Repository('dataset', repo_id, private)).url}")


def show(data: Path, count: int) -> None:
    """Prints the first rows of the training split, supervised tokens in green, or in brackets on a plain terminal."""
    from fledge.encoding import marked, open_prepared

    _, tokenizer, rows = open_prepared(data)
    marks = ("\033[32m", "\033[0m") if has_colours(sys.stdout) else ("[[", "]]")
    for number in range(min(count, len(rows["train"]))):
        row = rows["train"][number]
        print(f"--- row {number}: {len(row['input_ids'])} tokens, supervised {marks[0]}so{marks[1]}")
        print(marked(tokenizer, row["input_ids"], row["labels"], *marks))
        if "rejected_ids" in row:
            print(f"--- row {number}, rejected\n{tokenizer.decode(row['rejected_ids'])}")
