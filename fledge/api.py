"""The stages as functions, for notebooks and other programs.

    import fledge

    base = fledge.convert(checkpoint="model.pt", tokenizer="tokenizer.json", output_dir="base")
    data = fledge.prepare(data="records.txt.gz", tokenizer=base, output_dir="data")
    model = fledge.train(model_name_or_path=base, dataset=data, output_dir="model", num_train_epochs=2)
    fledge.evaluate(model=model, base=base, dataset=data, output_dir="evaluation").record["model"]
    fledge.generate(model=model, topic="A cat who was afraid of the sea.", ending="sad")

A function runs the `main` of its script. Its keyword arguments are the script's keys, `config` among them, and
`fledge train --help` lists them. A value is what Python has for it: a number, a text, a path, True, a list, a dict, or
what an earlier function returned. `None` leaves a key at its default.

Raises:
    UserError: what would end the script with one sentence and exit status 2.
"""

import contextlib
import importlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.commands import COMMANDS, in_commands, started_as
from fledge.errors import UserError


@dataclass(frozen=True)
class Written:
    """What a stage wrote. It may be given to the next stage as it stands, like a path."""

    path: Path
    # What the stage says of its work: the content of the JSON file that its function names, {} for none.
    record: dict[str, Any] = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.path)


def convert(**keys: Any) -> Written | None:
    """A checkpoint → a Hugging Face model, proven; the record is `conversion.json`.

    With `inspect` or `dry_run` nothing is written, and the result is None.
    """
    return _written("convert", keys, "conversion.json")


def prepare(**keys: Any) -> Written | None:
    """Records → a dataset of instructions and responses; the record is `budget.json`."""
    return _written("prepare", keys, "budget.json")


def train(**keys: Any) -> Written | None:
    """A base and a dataset → an instruct model; the record is `run.json`, with the losses and tokens per second."""
    return _written("train", keys, "run.json")


def train_dpo(**keys: Any) -> Written | None:
    """An instruct model and pairs of answers → a model that prefers the better ones; the record is `run.json`."""
    return _written("train-dpo", keys, "run.json")


def train_grpo(**keys: Any) -> Written | None:
    """An instruct model and its prompts → a model that follows them better; the record is `run.json`."""
    return _written("train-grpo", keys, "run.json")


def evaluate(**keys: Any) -> Written | None:
    """Base against instruct; the record is `metrics.json`: `record["model"]["instruction_following"]["value"]`.

    With `capabilities` the answers are printed, and the result is None.
    """
    return _written("evaluate", keys, "metrics.json")


def generate(**keys: Any) -> list[str]:
    """The answers to one question, `num_samples` of them, or to each prompt of `prompts_file`, in its order.

    Nothing is printed. With `compare` the answers of the other model follow.

    Raises:
        UserError: also if a conversation is asked for, which needs a terminal.
    """
    if keys.get("interactive"):
        raise UserError("A conversation needs a terminal: fledge generate --interactive.")
    with contextlib.redirect_stdout(io.StringIO()):
        return _run("generate", keys)


def export(**keys: Any) -> Written | None:
    """A model → GGUF or ONNX, proven; the record is `export.json`, with what `quantize` lost."""
    return _written("export", keys, "export.json")


def publish(**keys: Any) -> Written | None:
    """A model, its dataset and a Space → the Hub; the record is `publication.json`.

    With `dry_run` the folders are written, and nothing is sent.
    """
    return _written("publish", keys, "publication.json")


def train_tokenizer(**keys: Any) -> Written | None:
    """Raw text → a byte-level BPE tokenizer; the record is `tokenizer_report.json`."""
    return _written("train-tokenizer", keys, "tokenizer_report.json")


def pretrain(**keys: Any) -> Written | None:
    """Raw text and a tokenizer → a base; the record is `pretraining.json`."""
    return _written("pretrain", keys, "pretraining.json")


def trim(**keys: Any) -> Written | None:
    """A model → the same model with the tokens that a text uses; the record is `trimming.json`."""
    return _written("trim", keys, "trimming.json")


def _written(name: str, keys: dict[str, Any], record: str | None) -> Written | None:
    path = _run(name, keys)
    if path is None:
        return None
    content = (path / record).read_text(encoding="utf-8") if record and (path / record).exists() else "{}"
    return Written(path, json.loads(content))


def _run(name: str, keys: dict[str, Any]) -> Any:
    """What the `main` of the command `name` returns, given `keys`."""
    script = importlib.import_module(f"fledge.scripts.{COMMANDS[name]}")
    arguments = [part for key, value in keys.items() if value is not None for part in _argument(key, value)]
    with started_as(f"fledge.{name.replace('-', '_')}", arguments):
        try:
            return script.main()
        except UserError as error:
            raise UserError(in_commands(str(error))) from error


def _argument(key: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *map(_text, value)]
    return [f"--{key}={_text(value)}"]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
