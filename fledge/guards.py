"""Guards for private names of libraries: one clear sentence if a release no longer has them."""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from fledge.errors import UserError

Class = TypeVar("Class", bound=type)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def missing(module: str, name: str) -> UserError:
    """The error for a private `name` that the library of `module` no longer has."""
    library = module.partition(".")[0]
    return UserError(
        f"{library} {version(library)} has no {name}, which Fledge builds on; "
        f"install an earlier {library}, or a newer Fledge."
    )


def borrow(module: str, name: str) -> Any:
    """Imports `name` from a library's `module`, where its documentation does not list it.

    Raises:
        UserError: this release does not have it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise missing(module, f"{module}.{name}") from error


def check_overrides(cls: Class) -> Class:
    """Class decorator that checks every method marked `@override`: the base class has it, with the same parameters.

    Raises:
        UserError: a library has dropped the method or a parameter, so that the override would be ignored or would fail
            in
            the middle of a run.
    """
    parent = cls.__bases__[0]
    for name, method in vars(cls).items():
        if not getattr(method, "__override__", False):
            continue
        overridden = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
        if not overridden:
            raise missing(parent.__module__, f"{parent.__name__}.{name}")
        known, is_open = _parameters(overridden)
        for parameter in _named(method):
            if parameter not in known and not is_open:
                raise missing(parent.__module__, f"{parent.__name__}.{name}({parameter})")
    return cls


def _parameters(methods: list[Callable]) -> tuple[set[str], bool]:
    """The parameters of a method and of those it passes its `**kwargs` on to; and whether any other is taken too."""
    known: set[str] = set()
    for method in methods:
        known.update(_named(method))
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values()):
            return known, False
    return known, True


def _named(method: Callable) -> list[str]:
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind in NAMED][1:]  # without self
