"""What all scripts share: parsing arguments, reading and writing records, and turning errors into an exit status.

Only the standard library and TRL's light parser are imported here, so that `--help` answers at once.
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    import yaml
    from trl import TrlParser

from fledge.commands import in_commands
from fledge.errors import UserError

# A base has one of these, or neither if another tool made it.
ORIGINS = ("conversion.json", "pretraining.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def parse(
    arguments: list[str], *dataclass_types: type, description: str | None = None, partly: bool = False
) -> tuple[Any, ...]:
    """Parses `arguments` (`--config recipe.yaml` and any key) into instances of the given dataclasses.

    With `partly`, keys of other dataclasses are ignored; a later call, after slow imports, parses them.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type, or a recipe that is no YAML mapping.
    """
    arguments = [part for argument in arguments for part in _split_config(argument)]
    if arguments.count("--config") > 1:
        raise UserError("--config is given twice; name one recipe.")
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # Python's stand-in for such a byte
            raise UserError(f"{argument!a} has bytes that are no UTF-8; rename the file, or write the text in UTF-8.")
    with _as_user_errors(arguments):
        recipe, texts = _open_recipe(arguments, dataclass_types)
    parser = _parser(dataclass_types, texts, description)
    with _as_user_errors(arguments):
        if not partly:
            _refuse_unknown(arguments, recipe, parser)
        *parsed, left_over = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        if left_over and not partly:
            raise UserError(f"{' '.join(left_over)} is unknown; --help lists every key.")
        for given in parsed[: len(dataclass_types)]:
            _settle_types(given)
        return tuple(parsed[: len(dataclass_types)])


def _parser(
    dataclass_types: tuple[type, ...], texts: dict[str, str | list[str]], description: str | None
) -> "TrlParser":
    """TRL's parser with our help and errors. `texts` are the recipe's values of keys that hold text."""
    from trl import TrlParser
    from typing_extensions import override

    from fledge.guards import check_overrides

    @check_overrides
    class Parser(TrlParser):
        @override
        def error(self, message: str) -> NoReturn:
            message = re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message).rstrip(".")
            raise UserError(f"{message}; --help lists every key.")

        @override
        def format_help(self) -> str:
            return in_commands(grouped_help(self, dataclass_types))

        @override
        def set_defaults_with_config(self, **recipe: Any) -> list[str]:
            recipe = {key: texts.get(key, value) for key, value in recipe.items() if value is not None}
            # argparse only converts and checks defaults that are strings.
            recipe = {key: str(value) if type(value) in (int, float) else value for key, value in recipe.items()}
            return super().set_defaults_with_config(**recipe)

    parser = Parser(
        cast(Any, dataclass_types),  # transformers' type has no name that can be imported
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # TrlParser removes `--config FILE` before argparse sees it; it is added here only for --help.
    parser.add_argument("--config", metavar="RECIPE.yaml", help="a recipe; its keys may be overridden here")
    return parser


@contextlib.contextmanager
def _as_user_errors(arguments: list[str]) -> Iterator[None]:
    """Turns the errors of a recipe that cannot be read, and of values that the parser refuses, into one sentence."""
    import yaml

    try:
        yield
    except yaml.YAMLError as error:
        raise UserError(f"The recipe is not valid YAML: {' '.join(str(error).split())}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {_recipe_of(arguments)} is no text in UTF-8: {error.reason}.") from error
    except OSError as error:
        raise UserError(f"The recipe {error.filename} cannot be read: {error.strerror}.") from error
    except IndexError as error:
        raise UserError("--config needs the path of a recipe.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{' '.join(str(error).split())}") from error


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each key once, without its second spelling with hyphens and without the optional value of a switch."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?":
            return action.option_strings[0]
        shown = action.option_strings[0] if action.nargs == 0 else action.option_strings[0] + f" {self._value(action)}"
        return "-h, --help" if "--help" in action.option_strings else shown

    def _value(self, action: argparse.Action) -> str:
        value = str(action.metavar or action.dest.upper())
        return f"{value} ..." if action.nargs in ("+", "*") else value


def grouped_help(parser: argparse.ArgumentParser, dataclass_types: tuple[type, ...]) -> str:
    """The help of a parser of dataclasses: required keys first, then the others in groups.

    `GROUPS` of a dataclass maps the first field of a group to the group's title. Keys without a group are listed under
    "keys", or under the name of the class if that belongs to another library. `REQUIRED` names keys that the script
    itself requires.
    """
    actions = {action.dest: action for action in parser._actions}
    told = [name for kind in dataclass_types for name in getattr(kind, "REQUIRED", ())]
    required = [action for action in actions.values() if action.required or action.dest in told]
    groups: dict[str, list[argparse.Action]] = {"required": required}
    for kind in dataclass_types:
        foreign = next(base.__name__ for base in kind.__mro__ if not base.__module__.startswith(("fledge", "__main__")))
        group = "keys" if foreign == "object" else f"of {foreign}"
        for entry in fields(kind):
            group = getattr(kind, "GROUPS", {}).get(entry.name, group)
            if entry.name in actions and actions[entry.name] not in required:
                groups.setdefault(group, []).append(actions[entry.name])
    listed = {id(action) for of_group in groups.values() for action in of_group}
    groups["recipe and help"] = [action for action in actions.values() if id(action) not in listed]
    needed = " ".join(f"{action.option_strings[0]} {action.dest.upper()}" for action in required)
    formatter = parser.formatter_class(prog=parser.prog, max_help_position=30)  # type: ignore[call-arg]
    formatter.add_usage(f"{parser.prog} {needed} [--KEY VALUE ...] [--config RECIPE.yaml]".replace("  ", " "), [], [])
    formatter.add_text(parser.description)
    for title, of_group in groups.items():
        if of_group:
            formatter.start_section(title)
            formatter.add_arguments(of_group)
            formatter.end_section()
    return formatter.format_help()


def _recipe_of(arguments: list[str]) -> Path | None:
    return Path(arguments[arguments.index("--config") + 1]) if "--config" in arguments[:-1] else None


def _open_recipe(
    arguments: list[str], dataclass_types: tuple[type, ...]
) -> tuple[list[str], dict[str, str | list[str]]]:
    """The keys of a recipe, and what it gives for those that hold text, as it is written there.

    YAML would read `prompt: no` as false, `007` as 7 and `12:30` as 750.

    Raises:
        UserError: a key is given twice.
    """
    import yaml

    file = _recipe_of(arguments)
    if file is None:
        return [], {}
    with file.open(encoding="utf-8") as text:
        recipe = yaml.compose(text)
    if not isinstance(recipe, yaml.MappingNode):
        return [], {}
    _refuse_duplicates(recipe, file)
    hints = {name: hint for kind in dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    texts = {}
    for key, node in recipe.value:
        kinds = set(_alternatives(hints.get(key.value)))
        if kinds & {bool, int, float, dict}:
            continue
        if str in kinds and _is_text(node):
            texts[key.value] = node.value
        elif list[str] in kinds and _is_text(node):
            texts[key.value] = [node.value]
        elif list[str] in kinds and isinstance(node, yaml.SequenceNode) and all(map(_is_text, node.value)):
            texts[key.value] = [item.value for item in node.value]
    return [str(key.value) for key, _ in recipe.value], texts


def _refuse_unknown(arguments: list[str], recipe: list[str], parser: argparse.ArgumentParser) -> None:
    """argparse would first miss a required key, of which an unknown one is a misspelling.

    Raises:
        UserError: the command line or the recipe has a key that `parser` does not know.
    """
    options = {option for action in parser._actions for option in action.option_strings}
    names = {action.dest for action in parser._actions} - {"help"}
    given = [argument.partition("=")[0] for argument in arguments if re.match(r"--[\w-]+(=|$)", argument)]
    unknown = [key for key in given if key not in options]
    # A recipe names no other recipe; TRL's parser takes env for itself.
    unknown += [f"--{key}" for key in recipe if key not in names - {"config"} | {"env"}]
    for key in unknown:
        like = difflib.get_close_matches(key[2:].replace("-", "_").lower(), names, 1, 0.8)
        meant = f" perhaps --{like[0]} is meant;" if like else ""
        raise UserError(f"{key} is unknown;{meant} --help lists every key.")


def _is_text(node: "yaml.Node") -> bool:
    return isinstance(node.value, str) and not node.tag.endswith(":null")


def _refuse_duplicates(node: "yaml.Node", file: Path) -> None:
    keys = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if not isinstance(key.value, str):
            raise UserError(f"{file} has a key that is no word, in line {key.start_mark.line + 1}; name one key.")
    for number, (key, value) in enumerate(node.value):
        if key.value in keys[:number]:
            line = key.start_mark.line + 1
            raise UserError(f"{file} gives {key.value} a second time, in line {line}; leave one of them.")
        if value.tag.endswith(":map"):
            _refuse_duplicates(value, file)


def _settle_types(arguments: object) -> None:
    """Checks the types of values from a recipe, which argparse does not check.

    A single value for a list key becomes a list of one, as on the command line.
    """
    for name, hint in typing.get_type_hints(type(arguments)).items():
        value, kinds = getattr(arguments, name, None), _alternatives(hint)
        if isinstance(value, str) and list[str] in kinds and str not in kinds:
            setattr(arguments, name, [value])
        if not set(kinds) <= {int, float, str, bool, type(None)}:
            continue
        fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if not fits and not (float in kinds and type(value) is int):
            kind = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"--{name} is {value!r}, not of the type {kind}; --help lists every key.")


def _alternatives(hint: object) -> tuple[Any, ...]:
    """`X | Y` → X and Y; anything else → itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _split_config(argument: str) -> list[str]:
    return ["--config", argument.removeprefix("--config=")] if argument.startswith("--config=") else [argument]


def run(main: Callable[[], object]) -> None:
    """Runs a script's `main`; a `UserError` becomes one sentence on stderr and exit status 2.

    If the reader of the output closes it (`| head`), the script ends quietly. Characters that the output's encoding
    lacks are printed as question marks, and bytes of the input that are no text are read as U+FFFD.
    """
    for stream in (sys.stdin, sys.stdout):  # on Windows a file or pipe is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            main()
        except UserError as error:
            print(f"{Path(sys.argv[0]).name}: {in_commands(str(error))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted.", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `script.py | head`
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python prints an error at exit
            sys.exit(141)  # the status of a program that SIGPIPE ended
        raise  # another pipe than the output


def check_hub_id(key: str, value: str) -> None:
    """Checks that `value`, given as `key`, has the form `user/name`.

    Raises:
        UserError: `value`, given as `key`, names no repository of the Hub.
    """
    if not HUB_ID.fullmatch(value):
        raise UserError(f"{key} {value} is not of the form user/name.")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise UserError(f"{key} {value} is no name that the Hub takes: {str(error).rpartition(': ')[0]}.") from error


def attempt(what: str, do: Callable[[], Any]) -> Any:
    """The result of `do`, or `None` and one sentence on stderr if it fails, for steps that must not stop a run."""
    try:
        return do()
    except Exception as error:  # whatever a plotting library or a tracker may raise
        reason = " ".join(str(error).split()) or "no reason given"
        said = f"{what} failed and is left out ({type(error).__name__}: {reason}); the rest is in place."
        print(said, file=sys.stderr, flush=True)
        return None


@contextlib.contextmanager
def writing(place: Path, advice: str = "") -> Iterator[None]:
    """Turns a full disk and similar errors into one sentence.

    Raises:
        UserError: `place` cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # an error of the terminal, not of the disk
        raise
    except Exception as error:
        # safetensors raises its own error for a full disk; it is not imported only for that name.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise UserError(f"{place} cannot be written: {reason}{advice}.") from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep_origin(base: Path, folder: Path) -> None:
    """Copies the record of how `base` was made into `folder`, if one of our scripts made it."""
    for name in ORIGINS:
        if (base / name).exists():
            shutil.copy(base / name, folder)


def read_json(path: Path, what: str, **kinds: type) -> dict:
    """Reads a JSON file of an earlier stage that must have the keys of `kinds`, each of the given type.

    Raises:
        UserError: the file is missing or damaged; `what` names the stage to run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not a mapping")
        for key, kind in kinds.items():
            if not isinstance(content.get(key), kind):
                raise ValueError(f"{key} is {content.get(key)!r:.60}, not {kind.__name__}")
        return content
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing; {what} writes it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); run {what} again.") from error
