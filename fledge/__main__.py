"""`fledge COMMAND …` and `python -m fledge COMMAND …`: each command is a script of the repository."""

import importlib
import sys

from fledge.cli import run
from fledge.commands import COMMANDS, started_as
from fledge.errors import UserError
from fledge.version import __version__

USAGE = """usage: fledge COMMAND [--config RECIPE.yaml] [--KEY VALUE ...]

A GPT that was trained from scratch becomes an instruction-following Hugging Face model.

{commands}

fledge COMMAND --help tells the keys of a command. Several processes: accelerate launch -m fledge train …
"""


def main() -> None:
    """Runs the command that the command line names; `--help` and `--version` are answered here.

    Raises:
        UserError: there is no such command.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    sys.argv[0] = "fledge"
    if name in ("-h", "--help"):
        print(usage(), end="")
    elif name == "--version":
        print(f"fledge {__version__}")
    elif name in COMMANDS:
        with started_as(f"fledge {name}", arguments):
            run(importlib.import_module(f"fledge.scripts.{COMMANDS[name]}").main)
    else:
        raise UserError(f"{name} is no command of fledge; choose one of {', '.join(COMMANDS)}.")


def usage() -> str:
    """What `fledge --help` prints: each command with the first line of its script's docstring."""
    lines = []
    for name, script in COMMANDS.items():
        summary = (importlib.import_module(f"fledge.scripts.{script}").__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<16} {summary}")
    return USAGE.format(commands="\n".join(lines))


def started() -> None:
    """What the console command calls."""
    run(main)


if __name__ == "__main__":
    started()
