"""Stand-ins for values, packages and options that are missing while the author's code is evaluated."""

import argparse
import inspect
import types
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn


class OpenName(Exception):
    """A name whose value only the author's data or command line would show, or that may differ from its default.

    `owner` and `fields` say of which class, with which fields, it is one.
    """

    def __init__(
        self, name: str, default: object = inspect.Parameter.empty, owner: str = "", fields: list | None = None
    ):
        super().__init__(name)
        self.name, self.default, self.owner, self.fields = name, default, owner, fields or []


class StandIn:
    """A stand-in for a package that is not installed; it fails only when it is used."""

    def __init__(self, name: str):
        self._name = name
        self.__name__ = name

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], (type, types.FunctionType)):  # a decorator
            return args[0]
        raise ModuleNotFoundError(f"{self._name} is not installed")

    def __getitem__(self, key: object) -> "StandIn":  # an annotation
        return self

    __or__ = __ror__ = __getitem__

    def __mro_entries__(self, bases: tuple) -> tuple:  # a base class
        kind = LightningModule if self._name.endswith("LightningModule") else nn.Module
        return (kind,) if "Module" in self._name and nn.Module not in bases else ()


class LightningModule(nn.Module):
    """Lightning's base class as far as models use it."""

    def save_hyperparameters(self, *args: Any, ignore: str | Sequence[str] = (), **options: Any) -> None:
        """Keeps the arguments of the constructor that calls it, or those that are named, as `self.hparams`."""
        frame = inspect.currentframe()
        given = dict(frame.f_back.f_locals) if frame and frame.f_back else {}
        names = [name for name in args if isinstance(name, str)] or inspect.signature(type(self).__init__).parameters
        ignored = {"self", *([ignore] if isinstance(ignore, str) else ignore)}
        kept = {name: given[name] for name in names if name in given and name not in ignored}
        for whole in (value for value in args if not isinstance(value, str)):
            kept |= whole if isinstance(whole, dict) else vars(whole)
        self.hparams = Hyperparameters(kept)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Hyperparameters(dict):
    """Values that are read as `hparams.width` or as `hparams["width"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Defaults(argparse.ArgumentParser):
    """The default values of a script's options; a required one is `None`."""

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:  # type: ignore[override]  # takes anything
        return argparse.Namespace(**{action.dest: action.default for action in self._actions if action.dest != "help"})

    def parse_known_args(  # type: ignore[override]  # takes anything
        self, *args: Any, **kwargs: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        return self.parse_args(), []


ARGPARSE = types.ModuleType("argparse")
ARGPARSE.__dict__.update(vars(argparse), ArgumentParser=Defaults)


def refuse(*args: object) -> NoReturn:
    raise RuntimeError("the model's code asks for input or wants to end the program")
