"""A file of prompts → a file of answers, one JSON object per line. An interrupted run can be continued."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.cli import writing
from fledge.errors import UserError
from fledge.generation.answers import answer_each
from fledge.hub import find_model
from fledge.journal import Journal
from fledge.messages import Answer, Messages
from fledge.reading.files import TABLES, decoded, row_chunks, suffix
from fledge.reading.values import UNLEARNED, as_messages, as_text, is_visible, why_unusable
from fledge.sampling import Sampling
from fledge.terminal import progress


class Asked(Protocol):
    """The arguments of generate.py that concern a file of prompts."""

    model: str
    prompts_file: str | None
    output_file: str | None
    num_samples: int
    batch_size: int
    dtype: str


def answer_file(
    args: Asked,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    encode: Callable[[Messages], list[int]],
) -> list[Answer]:
    """Answers `args.prompts_file` into `args.output_file`, in the prompts' order; returns the answers made now.

    Answers are written to OUTPUT.partial as they are made, after a line with the settings. An answer depends only on
    its place in the file and the seed, so an interrupted run ends with the same file as an uninterrupted one.

    Raises:
        UserError: the prompts cannot be read, the partial file is of another run, or the disk is full.
    """
    assert args.prompts_file
    assert args.output_file
    output, folder = Path(args.output_file), find_model(args.model)
    asked = read_prompts(Path(args.prompts_file))
    work = [(number, sample) for number in range(len(asked)) for sample in range(args.num_samples)]
    made_with = {
        "--model": str(folder.resolve()),
        "date of the model": (folder / "config.json").stat().st_mtime_ns,
        "--prompts_file": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "--num_samples": args.num_samples,
        "--dtype": args.dtype,
        **{f"--{name}": value for name, value in asdict(sampling).items()},
    }
    prompts = []
    for number, messages in enumerate(asked, 1):
        try:
            prompts.append(encode(messages))
        except UserError as error:
            raise UserError(f"{args.prompts_file}, prompt {number}: {error}") from error
    partial = output.with_name(output.name + ".partial")
    journal = Journal(partial, made_with, f"move {partial} away", "run the same command again")
    with progress("answers", len(work)) as tell, writing(output, journal.advice):
        left = [i for i in range(len(work)) if (i,) not in journal.done]
        if journal.done:
            print(f"Going on from {len(journal.done)} of {len(work)} answers in {partial}.", file=sys.stderr)
        made = []
        for i, answer in answer_each(
            model, tokenizer, [prompts[work[i][0]] for i in left], sampling, args.batch_size, numbers=left
        ):
            number, sample = work[i]
            journal.add({(i,): {"messages": asked[number], "sample": sample, **asdict(answer)}})
            made.append(answer)
            tell(len(journal.done))
        ordered = [json.dumps(journal.done[i,], ensure_ascii=False) + "\n" for i in range(len(work))]
        whole = output.with_name(f".{output.name}.fledge-building")
        whole.write_text("".join(ordered), encoding="utf-8")
        whole.replace(output)
        partial.unlink()
    return made


def read_prompts(file: Path) -> list[Messages]:
    """Reads a file of prompts: a conversation for each line of a text, or for each row of a table.

    Raises:
        UserError: the file cannot be read, is empty, or a line or row is not what it should be.
    """
    if suffix(file) in (".jsonl", ".ndjson"):
        asked = [_asked(_parsed(line), where) for line, where in _lines(file)]
    elif suffix(file) in TABLES:
        asked = [
            _asked(row, f"{file}, row {number},")
            for chunk in row_chunks(str(file))
            for number, row in enumerate(chunk.rows, chunk.first_row)
        ]
    else:
        asked = [_user(line, where) for line, where in _lines(file)]
    if not asked:
        raise UserError(f"--prompts_file {file} holds no prompt; write one a line.")
    return asked


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Those that are not blank, each with its place."""
    for number, line in enumerate("".join(decoded(file, "\n")).split("\n"), 1):
        if line.strip():
            yield line.strip(), f"{file}:{number}"


def _user(text: object, where: str) -> Messages:
    return [{"role": "user", "content": as_text(text, where)}]


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _asked(found: object, where: str) -> Messages:
    messages: Messages = []
    if isinstance(found, dict):
        text = found.get("prompt")
        messages = _user(text, where) if isinstance(text, str) else as_messages(found.get("messages"), where)
    if not messages or messages[-1]["role"] != "user" or not is_visible(messages[-1]["content"]):
        raise UserError(f'{where} is not {{"prompt": "…"}} nor {{"messages": […]}} whose last message is the user\'s.')
    messages = [m | {"role": "assistant"} if m["role"] == UNLEARNED else m for m in messages]
    if why := why_unusable([*messages, {"role": "assistant", "content": "…"}]):
        raise UserError(f"{where} is no conversation that a model can go on with: {why}.")
    return messages
