"""The stages by the three names a person may start them by: a script, a command of `fledge`, a function of `fledge`."""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The name of the command, which with _ for - is that of the function → the script and its module in fledge/scripts.
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
# What starts a script by itself, and what starts several processes of a script, or of a module with -m: the ends of
# `accelerate launch`, `accelerate launch --multi_gpu` and `torchrun --nproc_per_node COUNT`.
LAUNCHERS = ("launch ", "--multi_gpu ", "COUNT ")
# A script in a sentence or an example, not a file of that name in another folder.
NAMED = re.compile(rf"(?<![\w./-])(python |{'|'.join(LAUNCHERS)})?({'|'.join(COMMAND_OF)})\.py\b")


@contextlib.contextmanager
def started_as(name: str, arguments: list[str]) -> Iterator[None]:
    """Lets a script's `main` find `arguments`, and its messages say that it is `name`, as in `fledge train`."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def command(script: str) -> str:
    """What to type for `script` (`train_sft.py`), in the way in which this process was started.

    `fledge train` beside another command of `fledge`, `fledge.train` in Python, else `python train_sft.py`.
    """
    name = COMMAND_OF[script.removesuffix(".py")]
    if sys.argv[0].startswith("fledge "):
        return f"fledge {name}"
    if sys.argv[0].startswith("fledge."):
        return f"fledge.{name.replace('-', '_')}"
    return f"python {script}"


def next_command(script: str, used: dict[str, Any], suggested: dict[str, Any]) -> str:
    """The whole command of the stage that comes next: with the paths just `used`, and others that are `suggested`.

    After a stage that was started with a recipe, the recipe beside it is named, and keys only where they differ.
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
    """`text` with each script that it names as `command` names it."""

    def typed(match: re.Match) -> str:
        before, script = match[1] or "", f"{match[2]}.py"
        said = command(script)
        if said.startswith("python "):
            return match[0]
        return f"{before}-m fledge {COMMAND_OF[match[2]]}" if before in LAUNCHERS else said

    return NAMED.sub(typed, text)
