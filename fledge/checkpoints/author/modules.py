"""The author's own files → their classes and functions, without running their scripts.

People keep a model in the script that trains it. Importing such a file would train, or open files that are not there.
So a name is made only when somebody asks for it, from the statements that define it: classes, functions, imports, and
assignments that compute from other such names. Nothing else in a file runs.
"""

import ast
import builtins
import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fledge.checkpoints.author.sandbox import PLACE, on_cpu
from fledge.checkpoints.author.source import AuthorFile, bindings_of, read_file, root_of
from fledge.checkpoints.author.stand_ins import ARGPARSE, OpenName, StandIn, refuse

HARMLESS = {
    "abs", "bool", "complex", "dict", "divmod", "enumerate", "float", "frozenset", "getattr", "hasattr", "int",
    "isinstance", "len", "list", "map", "max", "min", "pow", "print", "property", "range", "reversed", "round",
    "set", "sorted", "str", "sum", "super", "tuple", "type", "vars", "zip",
}  # fmt: skip
"""Builtins that an assignment may call."""

HARMLESS_PACKAGES = {
    "torch", "math", "cmath", "numpy", "functools", "itertools", "operator", "collections", "types", "typing",
    "dataclasses", "enum", "argparse", "string", "os", "pathlib", "einops",
}  # fmt: skip

HARMFUL = {
    "load", "save", "savetxt", "fromfile", "memmap", "hub", "distributed", "multiprocessing", "system", "popen",
    "remove", "unlink", "rmdir", "rename", "replace", "makedirs", "mkdir", "open", "read_text", "read_bytes",
    "write_text", "write_bytes", "listdir", "exec",
}  # fmt: skip
"""Attributes of those packages that read, write or start something."""


class AuthorModule(types.ModuleType):
    """One of the author's files. Its names are evaluated when they are first used."""

    def __init__(self, code: "AuthorCode", source: AuthorFile | None, folder: Path):
        name = "fledge_reference." + (source.path if source else folder).resolve().as_posix().replace(".", "_")
        super().__init__(name)
        self.__dict__.update(
            _code=code, _file=source, _folder=folder, _making=set(), __file__=str(source.path if source else folder)
        )
        if source is None or source.path.stem == "__init__":
            self.__path__ = [str(folder)]
        self.__builtins__ = Names(self)
        sys.modules[name] = self  # where dataclasses and pickle look for it

    def __getattr__(self, name: str) -> Any:
        try:
            return self._make(name)
        except KeyError:
            found = self._code.module_at(self._folder / name) if "__path__" in self.__dict__ else None
        if found is None:
            raise AttributeError(f"{self.__file__} defines no {name}")
        return found

    def _make(self, name: str) -> Any:
        """The value of a name that the file defines.

        Raises:
            KeyError: it defines no such name.
            OpenName: it does, from something that is not at hand.
        """
        if name in self.__dict__:
            return self.__dict__[name]
        if self._file is None or name in self._making:
            raise KeyError(name)
        if name in self._code.values and any(_is_assignment(part, name) for part in self._file.bindings.get(name, [])):
            self.__dict__[name] = self._code.values[name]
            return self.__dict__[name]
        if name not in self._file.bindings:
            return self._make_from_stars(name)
        self._making.add(name)
        device, PLACE.device = PLACE.device, "cpu"
        try:
            with torch.device("cpu"):
                for statement in self._file.bindings[name]:
                    self._run(statement, name)
        finally:
            PLACE.device = device
            self._making.discard(name)
        value = self.__dict__.get(name)
        if value is None and not any(isinstance(s, ast.Assign) and _says_none(s) for s in self._file.bindings[name]):
            self.__dict__.pop(name, None)
            raise OpenName(name)
        if not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            self._code.used[name] = self.__dict__[name] = on_cpu(value)
        return self.__dict__[name]

    def definitions(self, name: str) -> list[ast.AST]:
        """The constructor of a class of this file, or the function itself."""
        parts = [part for part in (self._file.bindings.get(name, []) if self._file else []) if part]
        inside = [inner for part in parts if isinstance(part, ast.ClassDef) for inner in part.body]
        functions = [inner for inner in inside if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
        return [*functions, *(part for part in parts if isinstance(part, ast.FunctionDef))]

    def _make_from_stars(self, name: str) -> Any:
        for star in reversed(self._file.stars):
            module = self._code.load(self, star.module or "", ("*",), star.level)
            if name.startswith("_") or isinstance(module, StandIn):
                continue
            with contextlib.suppress(AttributeError):
                return getattr(module, name)
        raise KeyError(name)

    def _run(self, statement: ast.stmt | None, name: str) -> None:
        fills = isinstance(statement, (ast.Assign, ast.Expr)) and name in self.__dict__
        defines = isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.Import, ast.ImportFrom))
        if statement is None or not (defines or self._is_plain(statement)):
            if fills and isinstance(statement, ast.Expr):
                return
            self.__dict__.pop(name, None)
            raise OpenName(name)
        before = set(self.__dict__)
        strict, self._code.strict = self._code.strict, self._code.strict or isinstance(statement, ast.Try)
        try:
            try:
                exec(self._file.code(statement), self.__dict__)
            except ModuleNotFoundError:
                if not _is_imported(statement, name):
                    raise
                self._code.strict = False  # no package of the alternatives is installed: a stand-in
                exec(self._file.code(statement), self.__dict__)
        except OpenName as error:
            if defines or self._code.can_propose(error.name):
                raise
            raise OpenName(name) from error
        except (Exception, SystemExit) as error:  # whatever the author's code does
            if defines:
                raise
            raise OpenName(name) from error
        finally:
            self._code.strict = strict
        for other in (
            bindings_of(statement).keys() - before - {name}
        ):  # each has its own turn, and may have another value
            self.__dict__.pop(other, None)

    def _is_plain(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a statement only computes: it calls nothing that could train, read, write or prompt."""
        return all(self._may_call(call, seen) for call in ast.walk(node) if isinstance(call, ast.Call))

    def _may_call(self, call: ast.Call, seen: frozenset[str]) -> bool:
        attributes = {node.attr for node in ast.walk(call.func) if isinstance(node, ast.Attribute)}
        if attributes & HARMFUL:
            return False
        name = root_of(call.func)
        if name is None or name in seen:  # a method of a literal, such as ", ".join
            return True
        statements = self._file.bindings.get(name)
        if statements is None:  # a builtin, or a name of a function's own
            return name in HARMLESS or not hasattr(builtins, name) or name.endswith(("Error", "Warning"))
        return all(statement is not None and self._is_harmless(statement, seen | {name}) for statement in statements)

    def _is_harmless(self, statement: ast.stmt, seen: frozenset[str]) -> bool:
        if isinstance(statement, ast.Import):
            return statement.names[0].name.split(".")[0] in HARMLESS_PACKAGES
        if isinstance(statement, ast.ImportFrom):
            if not statement.level and (statement.module or "").split(".")[0] in HARMLESS_PACKAGES:
                return not {alias.name for alias in statement.names} & HARMFUL
            module = self._code.local(self, statement.module or "", statement.level)
            there = module._file.bindings.get(statement.names[0].name) if module and module._file else None
            if not module or not there:
                return False
            return all(part is not None and module._is_harmless(part, seen) for part in there)
        return self._is_plain(statement, seen)


class Names(dict):
    """The builtins of one of the author's files: Python looks up names here that the file has not defined yet."""

    def __init__(self, module: AuthorModule):
        super().__init__(vars(builtins))
        self.module = module
        self["__import__"] = self.load
        self["input"] = self["exit"] = self["quit"] = refuse

    def __getitem__(self, name: str) -> Any:
        try:
            return self.module._make(name)
        except KeyError:
            return super().__getitem__(name)

    def load(
        self, name: str, globals: object = None, locals: object = None, fromlist: tuple[str, ...] = (), level: int = 0
    ) -> Any:
        return self.module._code.load(self.module, name, fromlist or (), level)


class AuthorCode:
    """The author's files, and the values that were found for names which the files leave open.

    Args:
        root: the folder they lie in; packages are looked for from here, and beside each file.
        values: name → value, instead of what the files say.
        can_propose: whether something can be said about an open name, so that it is asked for and not its dependants.
        sources: files that are parsed already, by path.
    """

    def __init__(
        self,
        root: Path,
        values: Mapping[str, object],
        can_propose: Callable[[str], bool],
        sources: dict[Path, AuthorFile],
    ):
        self.root, self.values, self.can_propose, self.sources = root.resolve(), values, can_propose, sources
        self.modules: dict[Path, AuthorModule] = {}
        self.used: dict[str, object] = {}
        self.strict = False

    def open(self, path: Path) -> AuthorModule:
        path = path.resolve()
        if path not in self.modules:
            if path not in self.sources:
                self.sources[path] = read_file(path)
            self.modules[path] = AuthorModule(self, self.sources[path], path.parent)
        return self.modules[path]

    def module_at(self, place: Path) -> AuthorModule | None:
        """The module `place.py`, or the package in the folder `place`."""
        for path in (place / "__init__.py", place.parent / f"{place.name}.py", place.parent / f"{place.name}.ipynb"):
            if path.is_file():
                return self.open(path)
        if place.is_dir() and any(place.glob("**/*.py")):
            return self.modules.setdefault(place.resolve(), AuthorModule(self, None, place))
        return None

    def local(self, importer: AuthorModule, name: str, level: int = 0, anywhere: bool = False) -> AuthorModule | None:
        """The author's own module that an import statement refers to, or `None`."""
        folder, parts = importer._folder.resolve(), [part for part in name.split(".") if part]
        if level:
            return self.module_at((folder, *folder.parents)[level - 1].joinpath(*parts))
        inside = [base for base in (folder, *folder.parents) if base.is_relative_to(self.root)]
        bases = [*folder.parents[:3]] if anywhere else inside
        for base in bases:
            if found := self.module_at(base.joinpath(*parts)):
                return found
        wanted = [part.lower() for part in parts]
        for path in self.sources if anywhere else ():  # a root that only their PYTHONPATH knows, or Models for models
            for place in (path.with_suffix(""), path.parent):
                if [part.lower() for part in place.parts[-len(wanted) :]] == wanted:
                    return self.module_at(place)
        return None

    def load(self, importer: AuthorModule, name: str, fromlist: tuple[str, ...], level: int) -> Any:
        """`import name`, in one of the author's files."""
        found: Any = self.local(importer, name, level)
        if found is None and not level:
            try:
                return self._outside(name, fromlist)
            except Exception as error:  # not installed, or installed and broken
                found = self.local(importer, name, anywhere=True)
                if found is None and self.strict:
                    raise ModuleNotFoundError(name) from error
        if found is None:
            found = StandIn(name)
        if fromlist or isinstance(found, StandIn) or "." not in name:
            return found
        return self.local(importer, name.split(".")[0]) or self.local(importer, name.split(".")[0], anywhere=True)

    def _outside(self, name: str, fromlist: tuple[str, ...]) -> types.ModuleType:
        module = ARGPARSE if name == "argparse" else importlib.import_module(name)
        if not fromlist:
            return module if module is ARGPARSE else sys.modules[name.split(".")[0]]
        for part in fromlist:
            if part != "*" and not hasattr(module, part):
                importlib.import_module(f"{name}.{part}")
        return module


def _is_assignment(statement: ast.stmt | None, name: str) -> bool:
    """Whether a statement may give a name a number; a package that it imports is none."""
    return not isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and not _is_imported(statement, name)


def _is_imported(statement: ast.stmt | None, name: str) -> bool:
    """Whether a statement, or a part of it, is `import name` or `import … as name`."""
    imports = [node for node in ast.walk(statement) if isinstance(node, ast.Import)] if statement else []
    return any(name in bindings_of(node) for node in imports)


def _says_none(statement: ast.Assign) -> bool:
    return isinstance(statement.value, ast.Constant) and statement.value.value is None
