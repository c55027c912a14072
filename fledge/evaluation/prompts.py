"""The prompts of an evaluation: the first ones of a split of a prepared dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fledge.cli import read_json
from fledge.encoding import numbers_of, open_prepared, open_rows, prompt_length
from fledge.errors import UserError
from fledge.messages import Answer
from fledge.tasks import Task, open_task, task_names


@dataclass
class Prompts:
    """The prompts that both models answer, `num_samples` times each, and the rows that a scorer may learn from.

    `rows` (P,) have messages and columns, of which the last message is the held-out answer; `encoded` (P,) has the
    `input_ids` and `labels` of the same rows.
    """

    task: Task
    split: str
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict]
    encoded: list[dict[str, list[int]]]
    train_rows: list[dict]
    unseen_rows: list[dict]
    num_samples: int

    @property
    def ids(self) -> list[list[int]]:
        """(P,) the ids of the prompts."""
        return [row["input_ids"][: prompt_length(row["labels"])] for row in self.encoded]

    @property
    def row_of_each_answer(self) -> list[dict]:
        """(P * num_samples,) the row that each answer belongs to."""
        return [row for row in self.rows for _ in range(self.num_samples)]

    @property
    def references(self) -> list[Answer]:
        """(P,) the held-out answers, as answers of a model. A truncated one counts as not stopped."""
        eos = self.tokenizer.eos_token_id
        return [
            Answer(
                row["messages"][-1]["content"],
                len(ids["labels"]) - prompt_length(ids["labels"]),
                ids["labels"][-1] == eos,
            )
            for row, ids in zip(self.rows, self.encoded, strict=True)
        ]


def open_prompts(
    data: Path, task_file: str | None, split: str, num_prompts: int, num_samples: int, only: Sequence[str] = ()
) -> Prompts:
    """Opens what `prepare_dataset.py` wrote. `task_file` is what --task names, for a task that is not shipped.

    `only` are conditions on the rows; see `numbers_of`.

    Raises:
        UserError: there is no such dataset or split, the split is empty or no row of it meets `only`, it holds a
            model's own answers, or `task_of` refuses.
    """
    task = task_of(data, task_file)
    budget, tokenizer, encoded = open_prepared(data)
    if budget.get("keep"):
        raise UserError(
            f"{data} holds a model's own answers to training prompts; evaluate on the dataset that these came from."
        )
    if split not in encoded:
        raise UserError(f"{data} has no split {split!r}; it has {', '.join(encoded)}.")
    if not len(encoded[split]):
        raise UserError(f"The {split} split of {data} is empty; prepare more data or name another --split.")
    rows = open_rows(data)
    numbers = numbers_of(rows[split], only)[:num_prompts]
    return Prompts(
        task=task,
        split=split,
        tokenizer=tokenizer,
        rows=[rows[split][number] for number in numbers],
        encoded=encoded[split].select(numbers).to_list(),
        train_rows=rows["train"],
        unseen_rows=[row for name, of_split in rows.items() if name != "train" for row in of_split],
        num_samples=num_samples,
    )


def task_of(data: Path, task_file: str | None) -> Task:
    """The task that a dataset was prepared for.

    Raises:
        UserError: it is not shipped and --task does not name its file, or --task names another one.
    """
    prepared_for = read_json(data / "budget.json", "prepare_dataset.py", task=str)["task"]
    if task_file is None and prepared_for not in task_names():
        raise UserError(
            f"{data} was prepared for {prepared_for!r}, which is no shipped task; name its file with --task "
            f"{prepared_for}.py, and its code is run."
        )
    task = open_task(task_file or prepared_for)
    if task.name != prepared_for:
        raise UserError(f"--task {task_file} is the task {task.name}; {data} was prepared for {prepared_for}.")
    return task
