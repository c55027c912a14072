"""What the author's code says about values: constants, defaults, options, and the calls of a class."""

import ast
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

from fledge.checkpoints.author.source import AuthorFile

PLAIN = (int, float, str, bool, type(None))
LONGEST = 40
"""The largest number of characters of a word that may be a value."""
OMITTED = object()
"""Stands for an argument that a call leaves at its default."""

Constants = Mapping[str, list[tuple[object, str]]]
"""Name → the values that the code gives it, each with the name of its file."""


class Rank(IntEnum):
    """How reliable a statement about a value is, most reliable first."""

    OWN_FILE = -1
    FLAG = 0
    CONFIG = 1
    CALL = 2
    CODE = 3
    SAME_KIND = 4


class Said(NamedTuple):
    """A stated value, its source, and how reliable it is."""

    value: object
    source: str
    rank: Rank


def constants(files: list[AuthorFile]) -> Constants:
    """Numbers, words and flags that the code gives to names: assignments, keywords, dicts, defaults, options."""
    found: dict[str, list[tuple[object, str]]] = {}
    for file in files:
        for node in ast.walk(file.tree):
            for name, expression in _named_values(node):
                if not name or not isinstance(expression, (ast.Constant, ast.UnaryOp)):
                    continue
                try:
                    value = ast.literal_eval(expression)
                except ValueError:  # -x
                    continue
                if isinstance(value, PLAIN) and not (isinstance(value, str) and len(value) > LONGEST):
                    found.setdefault(name, []).append((value, file.path.name))
    return found


def _named_values(node: ast.AST) -> Iterator[tuple[str | None, ast.expr | None]]:
    """The names to which one node of the syntax tree assigns a value."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield _last_name(target), node.value
    elif isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args]
        for argument, value in zip(arguments[::-1], node.args.defaults[::-1], strict=False):
            yield argument.arg, value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            yield keyword.arg, keyword.value
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument" and node.args:
            option = node.args[-1].value if isinstance(node.args[-1], ast.Constant) else ""
            default = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
            yield str(option).lstrip("-").replace("-", "_"), default


def _last_name(node: ast.expr) -> str | None:
    """`x` of a name x, and of an attribute such as config.x."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def calls_of(name: str, parameters: list[str], files: list[AuthorFile], said: Constants) -> list[dict[str, Said]]:
    """The arguments with which the code itself makes a `name`, as far as they are constants or names of constants.

    The value is None if it is neither, and `OMITTED` if the call leaves it to its default. A name is less sure than a
    constant.
    """
    return [
        _arguments(node, parameters, f"{name}(…) in {file.path.name}", said)
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and _last_name(node.func) == name
    ]


def _arguments(call: ast.Call, parameters: list[str], where: str, said: Constants) -> dict[str, Said]:
    given = dict(zip(parameters, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in parameters}
    found = {}
    if not any(isinstance(argument, ast.Starred) for argument in call.args) and all(k.arg for k in call.keywords):
        found = {key: Said(OMITTED, where, Rank.CALL) for key in parameters if key not in given}
    for key, expression in given.items():
        rank = Rank.CALL if isinstance(expression, ast.Constant) else Rank.CODE
        found[key] = Said(_value_of(expression, said), where, rank)
    return found


def _value_of(expression: ast.expr, said: Constants) -> object:
    """A constant's value, or that of a name to which the code gives only one."""
    if isinstance(expression, ast.Constant):
        return expression.value
    key: object = _last_name(expression)
    if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
        key = expression.slice.value
    values = [value for value, _ in said.get(key, ())] if isinstance(key, str) else []
    return values[0] if len(set(values)) == 1 else None
