"""The author's own files → their classes and functions, without running their scripts.

People keep a model in the script that trains it. Importing such a file would train, or open files that are not there.
So a name is made only when somebody asks for it, from the statements that define it: classes, functions, imports, and
assignments that compute from other such names. Nothing else in a file runs.
"""

import __future__

import argparse
import ast
import builtins
import contextlib
import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fledge.cli import UserError

SUFFIXES = (".py", ".ipynb")
SKIPPED = {"node_modules", "site-packages", "__pycache__", "venv", "env", "build", "dist"}
MOST_FILES = 2000
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
IN_PLACE = ("add_argument", "update", "setdefault")


class Defaults(argparse.ArgumentParser):
    """What a script's options are when nobody gives any; a required one is None."""

    def parse_args(self, *args, **kwargs):
        return argparse.Namespace(**{action.dest: action.default for action in self._actions if action.dest != "help"})

    def parse_known_args(self, *args, **kwargs):
        return self.parse_args(), []


ARGPARSE = types.ModuleType("argparse")
ARGPARSE.__dict__.update(vars(argparse), ArgumentParser=Defaults)
PLACE = types.SimpleNamespace(device="cpu")
"""Where tensors are made while the author's code runs; what a file computes for itself is always real."""


class OpenName(Exception):
    """A name whose value only the author's data or command line would show, or that may be another than its default.

    `owner` and `fields` say of which class, with which fields, it is one.
    """

    def __init__(
        self, name: str, default: object = inspect.Parameter.empty, owner: str = "", fields: list | None = None
    ):
        super().__init__(name)
        self.name, self.default, self.owner, self.fields = name, default, owner, fields or []


class StandIn:
    """Takes the place of a package that is not installed, and fails only when it is used."""

    def __init__(self, name: str):
        self._name = name
        self.__name__ = name

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and isinstance(args[0], (type, types.FunctionType)):  # a decorator
            return args[0]
        raise ImportError(f"{self._name} is not installed")

    def __getitem__(self, key):  # an annotation
        return self

    __or__ = __ror__ = __getitem__

    def __mro_entries__(self, bases: tuple) -> tuple:  # a base class, such as lightning's
        return (nn.Module,) if "Module" in self._name and nn.Module not in bases else ()


@dataclass(eq=False)
class Source:
    """A file, parsed: which statements bind a name, and which modules it takes every name of.

    `broken` names the first line that is no Python; the statement that holds it is left out.
    """

    path: Path
    tree: ast.Module
    flags: int
    bindings: dict[str, list[ast.stmt | None]] = field(default_factory=dict)
    stars: list[ast.ImportFrom] = field(default_factory=list)
    compiled: dict[int, types.CodeType] = field(default_factory=dict)
    broken: str = ""

    def code(self, statement: ast.stmt) -> types.CodeType:
        if id(statement) not in self.compiled:
            tree = ast.fix_missing_locations(ast.Module(body=[statement], type_ignores=[]))
            with warnings.catch_warnings():  # of "\s" in an author's string
                warnings.simplefilter("ignore")
                compiled = compile(tree, str(self.path), "exec", flags=self.flags, dont_inherit=True)
            self.compiled[id(statement)] = compiled
        return self.compiled[id(statement)]

    def classes(self) -> list[ast.ClassDef]:
        """The classes at its top level; of two of one name the later, as at the end of a run."""
        last = [statements[-1] for statements in self.bindings.values()]
        return [statement for statement in last if isinstance(statement, ast.ClassDef)]


def read_source(path: Path) -> Source:
    """Parses a script or the code cells of a notebook.

    A statement that this Python cannot parse (a notebook's `!pip`, an f-string of a later Python) is left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if path.suffix == ".ipynb":
            cells = [cell for cell in json.loads(text)["cells"] if cell.get("cell_type") == "code"]
            text = "\n\n".join("".join(cell["source"]) for cell in cells)
            text = re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as Python ({type(error).__name__}: {error}).") from error
    tree, broken = _parse(text.replace("\x00", ""))
    annotations = any(
        isinstance(node, ast.ImportFrom) and node.module == "__future__" and node.names[0].name == "annotations"
        for node in tree.body
    )
    source = Source(path, tree, __future__.annotations.compiler_flag if annotations else 0, broken=broken)
    for statement in _flat(tree.body):
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            source.stars.append(statement)
        for name, part in _bound(statement).items():
            source.bindings.setdefault(name, []).append(part)
    return source


def find_sources(root: Path, most: int = MOST_FILES) -> list[Source]:
    """Every script and notebook under a folder, those nearest to it first; folders that cannot be read are left out.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    found, folders = [], [root]
    while folders and len(found) < most:
        try:
            entries = sorted(folders.pop(0).iterdir())
        except OSError:
            continue
        found += [entry for entry in entries if entry.suffix in SUFFIXES and entry.is_file()]
        folders += [
            entry for entry in entries
            if entry.is_dir() and not entry.is_symlink() and entry.name not in SKIPPED and entry.name[0] not in "._"
        ]  # fmt: skip
    if not found:
        raise UserError(f"--reference {root} holds no .py or .ipynb file; name the file that defines the model.")
    sources = []
    for path in found[:most]:
        with contextlib.suppress(UserError):  # one broken notebook beside the model's file
            sources.append(read_source(path))
    return sources


def _parse(text: str) -> tuple[ast.Module, str]:
    """The statements that can be parsed, and the first line that cannot."""
    lines, broken = text.split("\n"), ""
    for _ in range(200):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse("\n".join(lines)), broken
        except SyntaxError as error:
            at = min(max((error.lineno or 1) - 1, 0), len(lines) - 1)
            # The tokenizer may stop at the end of an unfinished merge, whose beginning says what it is.
            first = next((i for i, line in enumerate(lines) if line.startswith("<<<<<<< ")), at)
            broken = broken or f"line {first + 1}, {' '.join(lines[first].split())[:40]}"
        except (ValueError, RecursionError, MemoryError):
            break
        # Blank the statement at the left margin that holds the line.
        begins = [i for i, line in enumerate(lines) if line[:1].strip() and line[0] not in "#)]}@"]
        begins = [i for i in begins if not re.match(r"(else|elif|except|finally)\b", lines[i])]
        begin = max((i for i in begins if i <= at), default=0)
        end = min((i for i in begins if i > max(at, begin)), default=len(lines))
        lines[begin:end] = [""] * (end - begin)
    return ast.parse(""), broken


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a file, with those of `if __name__ == "__main__"` in their place."""
    for statement in body:
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            yield from _flat(statement.body)
        else:
            yield statement


def _bound(statement: ast.stmt) -> dict[str, ast.stmt | None]:
    """What a statement binds or fills in place, each with the part of it that does; None is a part not to be run."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name: statement}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {
            alias.asname or alias.name.split(".")[0]: _one_import(statement, alias)
            for alias in statement.names
            if alias.name != "*"
        }
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {name: statement for target in targets for name in _stored(target)}
    if isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
        filled = isinstance(call.func, ast.Attribute) and call.func.attr in IN_PLACE and _root(call.func)
        return {filled: statement} if filled else {}
    if isinstance(statement, ast.If):
        bodies = [{}, {}]
        for bound, body in zip(bodies, (statement.body, statement.orelse), strict=True):
            for part in body:
                for name, kept in _bound(part).items():
                    bound.setdefault(name, []).append(kept)
        return {name: _one_branch(statement, *(b.get(name, []) for b in bodies)) for name in bodies[0] | bodies[1]}
    if isinstance(statement, ast.Try):
        inside = [*statement.body, *(part for handler in statement.handlers for part in handler.body)]
        return dict.fromkeys((name for part in inside for name in _bound(part)), statement)
    if isinstance(statement, (ast.With, ast.For, ast.While)):
        return dict.fromkeys(name for part in statement.body for name in _bound(part))
    return {}


def _one_import(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(statement, ast.Import):
        return ast.copy_location(ast.Import(names=[alias]), statement)
    return ast.copy_location(ast.ImportFrom(statement.module, [alias], statement.level), statement)


def _one_branch(statement: ast.If, then: list, otherwise: list) -> ast.stmt | None:
    if None in then or None in otherwise:
        return None
    nothing = [ast.copy_location(ast.Pass(), statement)]
    return ast.copy_location(ast.If(statement.test, then or nothing, otherwise), statement)


def _stored(target: ast.expr) -> list[str]:
    if isinstance(target, (ast.Attribute, ast.Subscript)):  # config.vocab_size = 65
        return [root] if (root := _root(target)) else []
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


class AuthorModule(types.ModuleType):
    """One of the author's files, whose names are made when they are first asked for."""

    def __init__(self, code: "AuthorCode", source: Source | None, folder: Path):
        name = "fledge_reference." + (source.path if source else folder).resolve().as_posix().replace(".", "_")
        super().__init__(name)
        self.__dict__.update(
            _code=code, _source=source, _folder=folder, _making=set(), __file__=str(source.path if source else folder)
        )
        if source is None or source.path.stem == "__init__":
            self.__path__ = [str(folder)]
        self.__builtins__ = Names(self)
        sys.modules[name] = self  # where dataclasses and pickle look for it

    def __getattr__(self, name: str):
        try:
            return self._make(name)
        except KeyError:
            found = self._code.module_at(self._folder / name) if "__path__" in self.__dict__ else None
        if found is None:
            raise AttributeError(f"{self.__file__} defines no {name}")
        return found

    def _make(self, name: str):
        """The value of a name that the file defines.

        Raises:
            KeyError: it defines no such name.
            OpenName: it does, from something that is not at hand.
        """
        if name in self.__dict__:
            return self.__dict__[name]
        if self._source is None or name in self._making:
            raise KeyError(name)
        if name in self._code.values and any(map(_is_assignment, self._source.bindings.get(name, []))):
            self.__dict__[name] = self._code.values[name]
            return self.__dict__[name]
        if name not in self._source.bindings:
            return self._make_from_stars(name)
        self._making.add(name)
        device, PLACE.device = PLACE.device, "cpu"
        try:
            with torch.device("cpu"):
                for statement in self._source.bindings[name]:
                    self._run(statement, name)
        finally:
            PLACE.device = device
            self._making.discard(name)
        value = self.__dict__.get(name)
        if value is None and not any(isinstance(s, ast.Assign) and _says_none(s) for s in self._source.bindings[name]):
            self.__dict__.pop(name, None)
            raise OpenName(name)
        if not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            self._code.used[name] = self.__dict__[name] = on_cpu(value)
        return self.__dict__[name]

    def _make_from_stars(self, name: str):
        for star in reversed(self._source.stars):
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
            exec(self._source.code(statement), self.__dict__)
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
        for other in _bound(statement).keys() - before - {name}:  # each has its own turn, and may have another value
            self.__dict__.pop(other, None)

    def _is_plain(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a statement only computes: it calls nothing that could train, read, write or ask."""
        return all(self._may_call(call, seen) for call in ast.walk(node) if isinstance(call, ast.Call))

    def _may_call(self, call: ast.Call, seen: frozenset[str]) -> bool:
        attributes = {node.attr for node in ast.walk(call.func) if isinstance(node, ast.Attribute)}
        if attributes & HARMFUL:
            return False
        name = _root(call.func)
        if name is None or name in seen:  # a method of a literal, such as ", ".join
            return True
        statements = self._source.bindings.get(name)
        if statements is None:  # a builtin, or a name of a function's own
            return name in HARMLESS or not hasattr(builtins, name) or name.endswith(("Error", "Warning"))
        return all(statement is not None and self._is_harmless(statement, seen | {name}) for statement in statements)

    def _is_harmless(self, statement: ast.stmt, seen: frozenset[str]) -> bool:
        if isinstance(statement, ast.Import):
            return statement.names[0].name.split(".")[0] in HARMLESS_PACKAGES
        if isinstance(statement, ast.ImportFrom):
            if not statement.level and statement.module.split(".")[0] in HARMLESS_PACKAGES:
                return not {alias.name for alias in statement.names} & HARMFUL
            module = self._code.local(self, statement.module or "", statement.level)
            there = module._source.bindings.get(statement.names[0].name) if module and module._source else None
            return bool(there) and all(part is not None and module._is_harmless(part, seen) for part in there)
        return self._is_plain(statement, seen)


class Names(dict):
    """The builtins of one of the author's files: Python looks here for what the file has not made yet."""

    def __init__(self, module: AuthorModule):
        super().__init__(vars(builtins))
        self.module = module
        self["__import__"] = self.load
        self["input"] = self["exit"] = self["quit"] = _refuse

    def __getitem__(self, name: str):
        try:
            return self.module._make(name)
        except KeyError:
            return super().__getitem__(name)

    def load(self, name, globals=None, locals=None, fromlist=(), level=0):
        return self.module._code.load(self.module, name, fromlist or (), level)


def _refuse(*args):
    raise RuntimeError("the model's code asks for input or wants to end the program")


class AuthorCode:
    """The author's files, and the values that were found for names which the files leave open.

    Args:
        root: the folder they lie in; packages are looked for from here, and beside each file.
        values: name → value, instead of what the files say.
        can_propose: whether something can be said about an open name, so that it is asked for and not its dependants.
        sources: files that are parsed already, by path.
    """

    def __init__(
        self, root: Path, values: Mapping[str, object], can_propose: Callable[[str], bool], sources: dict[Path, Source]
    ):
        self.root, self.values, self.can_propose, self.sources = root.resolve(), values, can_propose, sources
        self.modules: dict[Path, AuthorModule] = {}
        self.used: dict[str, object] = {}
        self.strict = False

    def open(self, path: Path) -> AuthorModule:
        path = path.resolve()
        if path not in self.modules:
            if path not in self.sources:
                self.sources[path] = read_source(path)
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
        """The author's own module that an import statement means, or None."""
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

    def load(self, importer: AuthorModule, name: str, fromlist: tuple, level: int):
        """`import name`, in one of the author's files."""
        found = self.local(importer, name, level)
        if found is None and not level:
            try:
                return self._outside(name, fromlist)
            except Exception as error:  # not installed, or installed and broken
                found = self.local(importer, name, anywhere=True)
                if found is None and self.strict:
                    raise ImportError(name) from error
        if found is None:
            found = StandIn(name)
        if fromlist or isinstance(found, StandIn) or "." not in name:
            return found
        return self.local(importer, name.split(".")[0]) or self.local(importer, name.split(".")[0], anywhere=True)

    def _outside(self, name: str, fromlist: tuple):
        module = ARGPARSE if name == "argparse" else importlib.import_module(name)
        if not fromlist:
            return module if module is ARGPARSE else sys.modules[name.split(".")[0]]
        for part in fromlist:
            if part != "*" and not hasattr(module, part):
                importlib.import_module(f"{name}.{part}")
        return module


def on_cpu(value: object) -> object:
    """The same, or the CPU instead of another device."""
    if isinstance(value, str) and re.fullmatch(r"(cuda|mps|xpu)(:\d+)?", value):
        return "cpu"
    if isinstance(value, torch.device) and value.type not in ("cpu", "meta"):
        return torch.device("cpu")
    return value


def _is_assignment(statement: ast.stmt | None) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return not isinstance(statement, kinds) or isinstance(statement, ast.ImportFrom)


def _says_none(statement: ast.Assign) -> bool:
    return isinstance(statement.value, ast.Constant) and statement.value.value is None
