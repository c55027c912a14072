"""The arguments of a constructor: plain values, or an object that holds all of them."""

import ast
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from torch import nn

from fledge.checkpoints.author.kinds import kind_of
from fledge.checkpoints.author.modules import AuthorModule
from fledge.checkpoints.author.stand_ins import OpenName
from fledge.checkpoints.author.statements import PLAIN

OBJECT = re.compile(
    r"(^|_)(config|configuration|cfg|conf|args|hparams|hps?|params|opts?|options|settings)$|config", re.I
)
"""Names of a constructor's argument that holds all others."""
NO_CONFIGS = ("vocabulary itself", "device")
"""Kinds of arguments that have fields and hold no other values."""


class OpenField(OpenName, AttributeError, KeyError):  # type: ignore[misc]  # `name` is a str in both
    """A missing field of the config; code that has a default for it never sees this."""


class Config(dict):
    """A config that a constructor may read as `config["emb_dim"]` or as `config.emb_dim`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __missing__(self, name: str) -> NoReturn:
        raise OpenField(name)


def value_of(name: str, values: Mapping[str, object]) -> object:
    if name not in values:
        raise OpenName(name)
    return values[name]


def config_type(parameter: inspect.Parameter, module: AuthorModule, read: Collection[str] = ()) -> type | None:
    """The class of an argument that holds other values: the author's own, or `Config`; None for a plain value.

    `read` names the arguments that the constructor reads as `name.field` or as `name["field"]`.
    """
    hint, default = parameter.annotation, parameter.default
    if isinstance(hint, str) and hint.isidentifier():
        with contextlib.suppress(AttributeError, OpenName):
            hint = getattr(module, hint)
    if not isinstance(hint, type) and dataclasses.is_dataclass(type(default)):
        hint = type(default)
    if hint is parameter.empty and isinstance(default, type):  # class attributes as a config
        hint = default
    if isinstance(hint, type) and hint is not parameter.empty and hint.__module__.startswith("fledge_reference"):
        return None if issubclass(hint, nn.Module) else hint
    scalar = hint in (int, float, bool, str) or isinstance(default, (int, float, bool))
    has_fields = default is parameter.empty and parameter.name in read and kind_of(parameter.name) not in NO_CONFIGS
    return Config if (OBJECT.search(parameter.name) or has_fields) and not scalar else None


def read_fields(definition: ast.AST) -> set[str]:
    """The names that a definition reads as `name.field` or as `name["field"]`, where no str or list has the field."""
    found = set()
    for node in ast.walk(definition):
        if not isinstance(node, (ast.Attribute, ast.Subscript)) or not isinstance(node.value, ast.Name):
            continue
        if isinstance(node, ast.Attribute):
            is_field = not hasattr("", node.attr) and not hasattr([], node.attr)
        else:
            is_field = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        if is_field:
            found.add(node.value.id)
    return found


def config_of(kind: type, values: dict[str, object]) -> object:
    """The config object of the class `kind` that the author's module takes, with `values` for its fields.

    Raises:
        OpenName: a field of a dataclass has no value, or only its default where the checkpoint should tell.
    """
    if kind is Config:
        return Config(values)
    if dataclasses.is_dataclass(kind):
        given = {}
        fields = [entry.name for entry in dataclasses.fields(kind) if entry.init]
        for entry in dataclasses.fields(kind):
            missing = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
            if entry.init and entry.name in values:
                given[entry.name] = values[entry.name]
            elif entry.init and (missing or (isinstance(entry.default, PLAIN) and kind_of(entry.name))):
                default = inspect.Parameter.empty if missing else entry.default
                raise OpenName(entry.name, default, kind.__name__, fields)
        return kind(**given)
    names = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    made = kind(**{name: value_of(name, values) for name in names})
    for name, value in values.items():
        if hasattr(made, name) and not callable(getattr(made, name)):
            with contextlib.suppress(AttributeError):  # a property
                setattr(made, name, value)
    return made
