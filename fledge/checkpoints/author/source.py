"""Parses the author's scripts and notebooks: which statements define which names. No code is run here."""

import __future__

import ast
import contextlib
import json
import re
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fledge.errors import UserError

SUFFIXES = (".py", ".ipynb")

SKIPPED = {"node_modules", "site-packages", "__pycache__", "venv", "env", "build", "dist"}

MOST_FILES = 2000

IN_PLACE = ("add_argument", "update", "setdefault")


@dataclass(eq=False)
class AuthorFile:
    """A parsed file: which statements bind a name, and from which modules it imports every name.

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
        """The classes at its top level; of two with the same name the later one, as at the end of a run."""
        last = [statements[-1] for statements in self.bindings.values()]
        return [statement for statement in last if isinstance(statement, ast.ClassDef)]


def read_file(path: Path) -> AuthorFile:
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
    tree, broken = parse_statements(text.replace("\x00", ""))
    annotations = any(
        isinstance(node, ast.ImportFrom) and node.module == "__future__" and node.names[0].name == "annotations"
        for node in tree.body
    )
    source = AuthorFile(path, tree, __future__.annotations.compiler_flag if annotations else 0, broken=broken)
    for statement in _flat(tree.body):
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            source.stars.append(statement)
        for name, part in bindings_of(statement).items():
            source.bindings.setdefault(name, []).append(part)
    return source


def find_files(root: Path, most: int = MOST_FILES) -> list[AuthorFile]:
    """Every script and notebook under a folder, those nearest to it first; folders that cannot be read are left out.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    found: list[Path] = []
    folders = [root]
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
            sources.append(read_file(path))
    return sources


def parse_statements(text: str) -> tuple[ast.Module, str]:
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


def bindings_of(statement: ast.stmt) -> dict[str, ast.stmt | None]:
    """The names that a statement binds or fills in place, each with the part that does so; `None`: not to be run."""
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
        filled = isinstance(call.func, ast.Attribute) and call.func.attr in IN_PLACE and root_of(call.func)
        return {filled: statement} if filled else {}
    if isinstance(statement, ast.If):
        bodies: list[dict[str, list[ast.stmt | None]]] = [{}, {}]
        for bound, body in zip(bodies, (statement.body, statement.orelse), strict=True):
            for part in body:
                for name, kept in bindings_of(part).items():
                    bound.setdefault(name, []).append(kept)
        return {name: _one_branch(statement, *(b.get(name, []) for b in bodies)) for name in bodies[0] | bodies[1]}
    if isinstance(statement, ast.Try):
        inside = [*statement.body, *(part for handler in statement.handlers for part in handler.body)]
        return dict.fromkeys((name for part in inside for name in bindings_of(part)), statement)
    if isinstance(statement, (ast.With, ast.For, ast.While)):
        return dict.fromkeys(name for part in statement.body for name in bindings_of(part))
    return {}


def _one_import(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(statement, ast.Import):
        return ast.copy_location(ast.Import(names=[alias]), statement)
    return ast.copy_location(ast.ImportFrom(statement.module, [alias], statement.level), statement)


def _one_branch(statement: ast.If, then: list, otherwise: list) -> ast.stmt | None:
    if None in then or None in otherwise:
        return None
    nothing: list[ast.stmt] = [ast.copy_location(ast.Pass(), statement)]
    return ast.copy_location(ast.If(statement.test, then or nothing, otherwise), statement)


def _stored(target: ast.expr) -> list[str]:
    if isinstance(target, (ast.Attribute, ast.Subscript)):  # config.vocab_size = 65
        return [root] if (root := root_of(target)) else []
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
