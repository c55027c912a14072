"""What every script shares: its arguments, its one-sentence errors, and outputs that appear whole or not at all.

Only the standard library and TRL's light parser are imported here, so that `--help` answers at once.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A base has one of these, or neither when another tool made it.
ORIGINS = ("conversion.json", "pretraining.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence: what was found, what was expected, what to do."""


def parse(arguments: list[str], *dataclass_types: type, description: str | None = None) -> tuple[Any, ...]:
    """Parses `arguments` (`--config recipe.yaml` and any key) into the given dataclasses, in their order.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type, or a recipe that is no YAML mapping.
    """
    import yaml
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str):
            raise UserError(f"{message}; --help lists every key.")

        def set_defaults_with_config(self, **recipe):
            recipe = {key: value for key, value in recipe.items() if value is not None}
            # argparse converts and checks a default that is text, and no other.
            recipe = {key: str(value) if type(value) in (int, float) else value for key, value in recipe.items()}
            return super().set_defaults_with_config(**recipe)

    parser = Parser(
        dataclass_types,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # TrlParser takes `--config FILE` out before argparse sees it; it is added here for --help alone.
    parser.add_argument("--config", metavar="RECIPE.yaml", help="a recipe; its keys may be overridden here")
    arguments = [part for argument in arguments for part in _split_config(argument)]
    if arguments.count("--config") > 1:
        raise UserError("--config is given twice; name one recipe.")
    try:
        *parsed, left_over = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        if left_over:
            raise UserError(f"{' '.join(left_over)} is unknown; --help lists every key.")
        for given in parsed[: len(dataclass_types)]:
            _settle_types(given)
        return tuple(parsed[: len(dataclass_types)])
    except yaml.YAMLError as error:
        raise UserError(f"The recipe is not valid YAML: {' '.join(str(error).split())}.") from error
    except OSError as error:
        raise UserError(f"The recipe {error.filename} cannot be read: {error.strerror}.") from error
    except IndexError as error:
        raise UserError("--config needs the path of a recipe.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{' '.join(str(error).split())}") from error


def _settle_types(arguments) -> None:
    """argparse checks the command line; the values of a recipe reach a dataclass as YAML read them.

    One value where a list is wanted becomes a list of one, as it is on the command line.
    """
    for name, hint in typing.get_type_hints(type(arguments)).items():
        value, kinds = getattr(arguments, name, None), _alternatives(hint)
        if isinstance(value, str) and list[str] in kinds and str not in kinds:
            setattr(arguments, name, [value])
        if not set(kinds) <= {int, float, str, bool, type(None)}:
            continue
        fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if not fits and not (float in kinds and type(value) is int):
            raise UserError(f"{name} is {value!r}, not of the type {hint}; --help lists every key.")


def _alternatives(hint) -> tuple:
    """`X | Y` → X and Y; anything else → itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _split_config(argument: str) -> list[str]:
    return ["--config", argument.removeprefix("--config=")] if argument.startswith("--config=") else [argument]


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` becomes one sentence on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted.", file=sys.stderr)
        sys.exit(130)


def check_hub_id(key: str, value: str) -> None:
    """Raises:
    UserError: `value`, given as `key`, names no repository of the Hub.
    """
    if not HUB_ID.fullmatch(value):
        raise UserError(f"{key} {value} is not of the form user/name.")


def check_output_dir(output_dir: str | Path, overwrite: bool, *markers: str) -> Path:
    """Says early, before any work, that `output_dir` cannot be written.

    A folder with content is replaced only with `overwrite`, and only if it holds one of `markers`, by which Fledge
    knows a folder of its own: `--output_dir ~ --overwrite` must never empty a home.

    Raises:
        UserError: the folder has content, or is a file.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; name a folder.")
    if any(path.is_file() for path in folder.rglob("*")):
        if not overwrite:
            raise UserError(f"{folder} already has content; name another --output_dir or pass --overwrite.")
        if not any((folder / marker).exists() for marker in markers):
            raise UserError(f"{folder} holds no {markers[0]}, so Fledge did not write it and will not replace it.")
    return folder


@contextlib.contextmanager
def staged(output_dir: str | Path, overwrite: bool, *markers: str) -> Iterator[Path]:
    """Yields a folder beside `output_dir` that takes its place when the block succeeds and vanishes when it fails.

    A run that is killed leaves the output as it was, and the next one clears what it had begun. A lock keeps a second
    run out as long as this one lives.

    Raises:
        UserError: see `check_output_dir`; another run is writing the same folder; or the disk is full.
    """
    folder = check_output_dir(output_dir, overwrite, *markers).resolve()
    building, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "replaced"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if replaced.exists() and not folder.exists():  # killed between the two steps of taking its place
                replaced.replace(folder)
                check_output_dir(output_dir, overwrite, *markers)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                yield building
                if folder.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                    folder.replace(replaced)
                building.replace(folder)
            finally:
                if replaced.exists() and not folder.exists():
                    replaced.replace(folder)
                shutil.rmtree(building, ignore_errors=True)
                shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        from safetensors import SafetensorError  # its way of reporting a full disk

        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a file beside `folder`; the system releases it when the process dies, however that happens."""
    file = folder.with_name(f".{folder.name}.lock")
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != file.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            raise UserError(
                f"Another run is writing {folder} at this moment; wait for it or name another --output_dir."
            ) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep_origin(base: Path, folder: Path) -> None:
    """Copies what says where `base` came from, if one of our scripts made it."""
    for name in ORIGINS:
        if (base / name).exists():
            shutil.copy(base / name, folder)


def read_json(path: Path, what: str) -> dict:
    """Reads a JSON file that an earlier stage wrote.

    Raises:
        UserError: it is missing or damaged; `what` names the stage to run.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing; {what} writes it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); run {what} again.") from error
