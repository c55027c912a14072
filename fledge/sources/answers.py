"""A model's own answers with rewards: samples.jsonl of evaluate_model.py --answers_only, or the folder that it wrote.

A record is a prompt with all answers of the model to it. Use it with the task of the prompts.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.reading.files import Chunk, row_chunks

LICENSE = None
END = None
NEEDED = {"task": str, "split": str, "prompt": int, "messages": list, "model": dict}
ANSWER = {"text": str, "stopped": bool, "rewards": dict}


def chunks(data: str) -> Iterator[Chunk]:
    """The lines of `data` in chunks that hold all answers to a prompt.

    Raises:
        UserError: see `row_chunks`.
    """
    file = Path(data) / "samples.jsonl" if Path(data).is_dir() else Path(data)
    held: list[dict[str, Any]] = []
    first_row = 1
    for chunk in row_chunks(str(file)):
        held += chunk.rows
        whole = len(held)
        while whole and held[whole - 1].get("prompt") == held[-1].get("prompt"):
            whole -= 1
        if whole:
            yield Chunk(chunk.origin, None, held[:whole], first_row)
            held, first_row = held[whole:], first_row + whole
    yield Chunk(str(file), None, held, first_row)


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yields one record per prompt: its line, with all `answers` in place of one.

    Raises:
        UserError: a line is not one of `samples.jsonl`, answers a prompt outside the training split, or has the number
            of another prompt.
    """
    for number, row in enumerate(chunk.rows, chunk.first_row):
        where = f"{chunk.origin}, row {number},"
        missing = [name for name, kind in NEEDED.items() if not isinstance(row.get(name), kind)]
        missing = missing or [name for name, kind in ANSWER.items() if not isinstance(row["model"].get(name), kind)]
        if missing:
            raise UserError(
                f"{where} has no {missing[0]} as evaluate_model.py writes it; give the samples.jsonl of a run with "
                "--answers_only and --split train."
            )
        if row["split"] != "train":
            raise UserError(
                f"{where} answers a prompt of the {row['split']} split, which is held out; ask for answers with "
                "evaluate_model.py --split train."
            )
    row_number = chunk.first_row
    for _, of_prompt in groupby(chunk.rows, key=lambda row: row["prompt"]):
        rows = list(of_prompt)
        for number, row in enumerate(rows, row_number):
            if row["messages"] != rows[0]["messages"]:
                raise UserError(
                    f"{chunk.origin}, row {number}, answers another prompt than row {row_number}, which has the same "
                    f"number {row['prompt']}; give each samples.jsonl by itself."
                )
        row_number += len(rows)
        yield {**rows[0], "answers": [row["model"] for row in rows]}
