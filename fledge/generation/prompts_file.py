"""A file of prompts → a file of answers, a JSON object a line, that a second run goes on with where one was killed."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.cli import UserError
from fledge.encoding import Messages
from fledge.generation.answers import Answer, answer_each
from fledge.generation.journal import Journal
from fledge.generation.sampling import Sampling


def answer_file(
    args,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    encode: Callable[[Messages], list[int]],
) -> list[Answer]:
    """Answers `args.prompts_file` into `args.output_file`, in the prompts' order; returns the answers made now.

    Answers go to OUTPUT.partial as they are made, after a line that says what made them. An answer depends on its
    place in the file and the seed alone, so an interrupted run ends with the same file as an uninterrupted one.

    Raises:
        UserError: the prompts cannot be read, the output is there, or its partial file is of another run.
    """
    output = Path(args.output_file)
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} is already there; name another --output_file or pass --overwrite.")
    asked = read_prompts(Path(args.prompts_file))
    work = [(number, sample) for number in range(len(asked)) for sample in range(args.num_samples)]
    made_with = {
        "--model": str(Path(args.model).resolve()),
        "date of the model": (Path(args.model) / "config.json").stat().st_mtime_ns,
        "--prompts_file": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "--num_samples": args.num_samples,
        "--dtype": args.dtype,
        **{f"--{name}": value for name, value in asdict(sampling).items()},
    }
    partial = output.with_name(output.name + ".partial")
    try:
        journal = Journal(partial, made_with, f"delete {partial}")
        left = [i for i in range(len(work)) if (i,) not in journal.done]
        if journal.done:
            print(f"Going on from {len(journal.done)} of {len(work)} answers in {partial}.", file=sys.stderr)
        prompts = {number: encode(asked[number]) for number in {work[i][0] for i in left}}
        made = []
        for i, answer in answer_each(
            model, tokenizer, [prompts[work[i][0]] for i in left], sampling, args.batch_size, numbers=left
        ):
            number, sample = work[i]
            journal.add({(i,): {"messages": asked[number], "sample": sample, **asdict(answer)}})
            made.append(answer)
            print(f"\r{len(journal.done)}/{len(work)} answered ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        ordered = [json.dumps(journal.done[i,], ensure_ascii=False) + "\n" for i in range(len(work))]
        whole = output.with_name(output.name + ".whole")
        whole.write_text("".join(ordered), encoding="utf-8")
        whole.replace(output)
        partial.unlink()
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    return made


def read_prompts(file: Path) -> list[Messages]:
    """Raises:
    UserError: the file cannot be read, is empty, or a line is not what it should be.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file {file} cannot be read as text in UTF-8: {error}.") from error
    asked = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            asked.append(_messages(line, f"{file}:{number}") if file.suffix == ".jsonl" else _user(line.strip()))
    if not asked:
        raise UserError(f"--prompts_file {file} holds no prompt; write one a line.")
    return asked


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _messages(line: str, where: str) -> Messages:
    try:
        found = json.loads(line)
        messages = _user(found["prompt"]) if "prompt" in found else found["messages"]
        whole = all(isinstance(m["content"], str) and isinstance(m["role"], str) for m in messages)
        if not whole or messages[-1]["role"] != "user":
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(
            f'{where} is not {{"prompt": "…"}} nor {{"messages": […]}} whose last message is the user\'s.'
        ) from error
    return messages
