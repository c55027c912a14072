"""The names of the stages: each can be started as a script, a command of `fledge`, or a function of `fledge`."""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Name of the command (of the function, with _ for -) → name of the script and of its module in fledge/scripts.
COMMANDS = {
    "convert": "convert_checkpoint",
    "prepare": "prepare_dataset",
    "train": "train_sft",
    "train-dpo": "train_dpo",
    "train-grpo": "train_grpo",
    "evaluate": "evaluate_model",
    "generate": "generate",
    "export": "export",
    "publish": "publish",
    "train-tokenizer": "train_tokenizer",
    "pretrain": "pretrain",
    "trim": "trim_vocabulary",
}
COMMAND_OF = {script: name for name, script in COMMANDS.items()}
# The last words of commands that start several processes of a script, or of a module with -m: `accelerate launch`,
# `accelerate launch --multi_gpu` and `torchrun --nproc_per_node COUNT`.
LAUNCHERS = ("launch ", "--multi_gpu ", "COUNT ")
# The name of a script in a text, but not a file of that name in another folder.
NAMED = re.compile(rf"(?<![\w./-])(python |{'|'.join(LAUNCHERS)})?({'|'.join(COMMAND_OF)})\.py\b")


@contextlib.contextmanager
def started_as(name: str, arguments: list[str]) -> Iterator[None]:
    """Sets `sys.argv` for a script's `main`: `arguments`, and the `name` that its messages use (`fledge train`)."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def command(script: str) -> str:
    """How to start `script` (`train_sft.py`), in the same form in which this process was started.

    That is `fledge train` for a command of `fledge`, `fledge.train` in Python, else `python train_sft.py`.
    """
    name = COMMAND_OF[script.removesuffix(".py")]
    if sys.argv[0].startswith("fledge "):
        return f"fledge {name}"
    if sys.argv[0].startswith("fledge."):
        return f"fledge.{name.replace('-', '_')}"
    return f"python {script}"


def next_command(script: str, used: dict[str, Any], suggested: dict[str, Any]) -> str:
    """The full command of the next stage: with the paths that were just `used`, and others that are `suggested`.

    If this stage was started with a recipe, the command names the next stage's recipe in the same folder, and only the
    keys that differ from it.
    """
    used = {key: value if isinstance(value, list) else str(value) for key, value in used.items() if value is not None}
    recipe = _recipe_beside(script)
    shown = used | suggested
    if recipe:
        import yaml

        given = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
        differing = {key: value for key, value in used.items() if str(given.get(key)) != str(value)}
        shown = {"config": str(recipe)} | (differing | suggested if differing else {})
    begun = command(script)
    if begun.startswith("fledge."):
        return f"{begun}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"
    return " ".join([begun, *(f"--{key} {_quoted(value)}" for key, value in shown.items())])


def _quoted(value: str | list[str]) -> str:
    return shlex.join(value) if isinstance(value, list) else shlex.quote(value)


def _recipe_beside(script: str) -> Path | None:
    """The recipe for `script` in the folder of the one that this process was started with."""
    given = [argument.partition("=") for argument in sys.argv]
    named = [
        value or after for (key, _, value), after in zip(given, [*sys.argv[1:], ""], strict=True) if key == "--config"
    ]
    name = COMMAND_OF[script.removesuffix(".py")].removeprefix("train-")
    recipe = Path(named[0]).with_name(f"{name}.yaml") if named else None
    return recipe if recipe and recipe.is_file() else None


def in_commands(text: str) -> str:
    """`text` with the name of each script replaced by what `command` returns for it."""

    def typed(match: re.Match) -> str:
        before, script = match[1] or "", f"{match[2]}.py"
        said = command(script)
        if said.startswith("python "):
            return match[0]
        return f"{before}-m fledge {COMMAND_OF[match[2]]}" if before in LAUNCHERS else said

    return NAMED.sub(typed, text)
