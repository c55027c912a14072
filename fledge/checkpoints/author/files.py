"""The author's files, and what they and the checkpoint say about the values that a module needs."""

import ast
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import nn

from fledge.checkpoints.author.call import Author
from fledge.checkpoints.author.candidates import names_in, outermost_names, ranked_classes
from fledge.checkpoints.author.construct import config_of, config_type, read_fields, value_of
from fledge.checkpoints.author.kinds import Shapes, kind_of
from fledge.checkpoints.author.modules import AuthorCode, AuthorModule
from fledge.checkpoints.author.sandbox import author_runs
from fledge.checkpoints.author.search import GUESS, Slot, Solution, Solver
from fledge.checkpoints.author.source import AuthorFile, find_files, read_file
from fledge.checkpoints.author.stand_ins import OpenName
from fledge.checkpoints.author.statements import OMITTED, PLAIN, Constants, Rank, Said, calls_of, constants
from fledge.checkpoints.facts import CONFIG_KEYS
from fledge.checkpoints.loading import Checkpoint
from fledge.errors import UserError

MOST_CLASSES = 12
ANYTHING = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
"""Numbers to try if nothing states a value."""


@dataclass
class Found:
    """One of the author's classes, with the values that bring it closest to the checkpoint."""

    source: AuthorFile
    name: str
    solver: Solver
    solution: Solution
    files: "Files"

    def build(self, values: Mapping[str, object], device: str) -> nn.Module:
        return self.files.build(self.source, self.name, values, device)

    def __str__(self) -> str:
        return f"{self.files.label(self.source)}:{self.name}"


class Files:
    """The author's files, and what they and the checkpoint say about the values that a module needs."""

    def __init__(self, spec: str, given: dict, checkpoint: Checkpoint, told: Mapping[str, object]):
        self.spec, self.given, self.checkpoint, self.told = spec, given, checkpoint, told
        path, name = Path(spec), None
        if not path.exists() and ":" in spec:
            file, _, name = spec.rpartition(":")
            path = Path(file)
        if (not name and not path.exists()) or (name and not path.is_file()) or not spec:
            raise UserError(
                f"--reference {spec} must be FILE, FILE:CLASS or a folder, and there is no file or folder {path}."
            )
        self.class_name, self.file = name, path if path.is_file() else None
        self.root = (path.parent if path.is_file() else path).resolve()
        everything = find_files(self.root) if path.is_dir() else []
        self.parsed = {source.path.resolve(): source for source in everything}
        if self.file:
            self.parsed[path.resolve()] = read_file(path)
        self.shapes = Shapes.of(checkpoint.tensors)

    def label(self, source: AuthorFile) -> str:
        path = source.path.resolve()
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def candidates(self) -> list[tuple[AuthorFile, str]]:
        """Classes that may be the checkpoint's, those first that have all names of its outermost modules."""
        if self.class_name:
            source = self.parsed[Path(str(self.file)).resolve()]
            if self.class_name not in source.bindings and not source.stars:
                raise UserError(f"{self.file} defines no {self.class_name}; it has {names_in(source)}.")
            return [(source, self.class_name)]
        if self.file:
            self._follow_imports(self.file)
        ranked = ranked_classes([*self.parsed.values()], self.checkpoint)
        if not ranked:
            seen = sorted({cls.name for source in self.parsed.values() for cls in source.classes()})
            wanted = sorted(outermost_names(self.checkpoint))[:5]
            raise UserError(
                f"--reference {self.spec}: no class there sets {', '.join(wanted)} as the file has "
                f"them; found were {', '.join(seen[:8]) or 'no classes'}; name the file of the model{self.broken()}."
            )
        full = [item for item in ranked if item[0] == 1]
        return [(source, name) for _, source, name in (full or ranked[:3])[:MOST_CLASSES]]

    def _follow_imports(self, file: Path) -> None:
        """Adds the author's files that the named one imports, and those that they import."""
        code, todo = AuthorCode(self.root, {}, bool, self.parsed), [self.parsed[file.resolve()]]
        seen = set()
        while todo:
            source = todo.pop()
            seen.add(source.path.resolve())
            module = code.open(source.path)
            for node in ast.walk(source.tree):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    level = getattr(node, "level", 0)
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    for name in names:
                        found = code.local(module, name, level) if name or level else None
                        if found and found._file and found._file.path.resolve() not in seen:
                            todo.append(found._file)

    def solve(self, source: AuthorFile, name: str) -> Found:
        said = constants(list(self.parsed.values()))
        code = self._code({})
        try:
            with author_runs("cpu"):
                author = getattr(code.open(source.path), name)
            signature = dict(inspect.signature(author).parameters)
        except OpenName:
            signature = {}
        except (Exception, SystemExit) as error:  # whatever the author's code does
            solver = Solver(_nothing, _nothing, {})
            return Found(source, name, solver, Solution({}, {}, (2, 0, 0), f"{type(error).__name__}: {error}"), self)
        calls = calls_of(name, list(signature), list(self.parsed.values()), said)
        used: dict[str, object] = {}

        def build(values: dict) -> nn.Module:
            try:
                return self.build(source, name, values, "meta", used)
            except (RuntimeError, TypeError) as error:
                if "meta" not in str(error):
                    raise
                return self.build(source, name, values, "cpu", used)  # a table that is computed number by number

        def make_slot(wanted: OpenName) -> Slot:
            default = signature[wanted.name].default if wanted.name in signature else wanted.default
            more = calls_of(wanted.owner, wanted.fields, list(self.parsed.values()), said) if wanted.owner else []
            return self.slot(wanted.name, default, calls + more, said)

        solver = Solver(build, make_slot, self.checkpoint.tensors)
        start: dict[str, object] = {}
        solver.score(start)
        for key, value in used.items():  # what the files say of themselves may be changed last of all
            if isinstance(value, (int, float)) and key not in solver.slots and kind_of(key):
                slot = self.slot(key, inspect.Parameter.empty, [], {})
                slot.stated.insert(0, Said(value, "its own file", Rank.OWN_FILE))
                solver.slots[key] = slot
                start[key] = slot.values()[0][0]
        return Found(source, name, solver, solver.solve(start), self)

    def slot(self, name: str, default: object, calls: list[dict[str, Said]], said: Constants) -> Slot:
        """The sources of a value, most reliable first: a flag, the checkpoint, the code, and then the shapes."""
        if name in self.given:
            return Slot(name, [Said(self.given[name], "--reference_kwargs", Rank.FLAG)])
        kind = kind_of(name)
        stated = [*self._said_outside(name, kind), *_said_in_code(name, kind, default, calls, said)]
        slot = Slot(name, sorted((one for one in stated if isinstance(one.value, Hashable)), key=lambda one: one.rank))
        slot.proposed = self.shapes.propose(name)
        slot.likely = len(slot.proposed)
        if kind not in ("dropout", "device", "flag", "activation", "epsilon", "theta"):
            slot.proposed += [*self.shapes.everything[:12], *self.shapes.by_kind["layers"], *ANYTHING]
        return slot

    def _said_outside(self, name: str, kind: str | None) -> Iterator[Said]:
        """What flags and the checkpoint's config say."""
        config = self.checkpoint.config
        for key, value in self.told.items():
            if kind == kind_of(key) and isinstance(value, PLAIN):
                yield Said(value, f"--{key}", Rank.FLAG)
        if name in config:
            yield Said(config[name], self._origin(name), Rank.CONFIG)
        elif kind:
            for key, value in config.items():
                if kind_of(str(key)) == kind and isinstance(value, PLAIN):
                    yield Said(value, f"{self._origin(key)}, {key}", Rank.CONFIG)

    def _origin(self, key: str) -> str:
        return self.checkpoint.origins.get(key, "checkpoint config")

    def broken(self) -> str:
        """The parts of the author's scripts that could not be parsed, as the end of a sentence."""
        left_out = [
            f"{self.label(s)} ({s.broken})" for s in self.parsed.values() if s.broken and s.path.suffix == ".py"
        ]
        return f"; not read, because it is no Python: {', '.join(left_out[:3])}" if left_out else ""

    def context_length(self, author: Author) -> tuple[int, str] | None:
        """The context length in the author's code, and where it stands: a value of a call, else a constant."""
        built = {name: [value] for name, value in author.values.items() if value[1] != GUESS}
        said = constants(list(self.parsed.values()))
        of_kind = [name for name in built if kind_of(name) == "context" and not re.search("window|chunk", name, re.I)]
        keys = CONFIG_KEYS["context_length"]
        in_code = [name for key in keys for name in said if name.lower() == key]
        for names, wanted in ((built, keys), (built, of_kind), (said, in_code)):
            for name in wanted:
                found = {value: source for value, source in names.get(name, ()) if type(value) is int and value > 1}
                if len(found) == 1:
                    ((length, source),) = found.items()
                    return length, f"{name}, {source}"
        return None

    def _code(self, values: Mapping[str, object]) -> AuthorCode:
        return AuthorCode(self.root, values, lambda name: bool(kind_of(name)), self.parsed)

    def build(self, source: AuthorFile, name: str, values: Mapping, device: str, used: dict | None = None) -> nn.Module:
        """The module under these values.

        Raises:
            OpenName: one more is needed.
        """
        code = self._code(values)
        try:
            with author_runs(device):
                module = code.open(source.path)
                author = getattr(module, name)
                positional, keywords = self._bind(author, name, values, module)
                made = author(*positional, **keywords)
        finally:
            if used is not None:
                used.update(code.used)
        if not isinstance(made, nn.Module):
            raise UserError(f"--reference {self.spec}: {name} is a {type(made).__name__} and no torch.nn.Module.")
        return made

    def _bind(self, author: Callable, name: str, values: Mapping, module: AuthorModule) -> tuple[list, dict]:
        positional: list[object] = []
        keywords: dict[str, object] = {}
        read = {field for part in module.definitions(name) for field in read_fields(part)}
        for key, parameter in inspect.signature(author).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                taken = inspect.signature(author).parameters
                known = self.given if len(taken) > 1 else self._all(values)
                keywords |= {other: value for other, value in known.items() if other not in taken}
                continue
            kind = config_type(parameter, module, read)
            value = config_of(kind, self._all(values)) if kind else value_of(key, values)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[key] = value
            else:
                positional.append(value)
        return positional, keywords

    def _all(self, values: Mapping[str, object]) -> dict[str, object]:
        return {**self.checkpoint.config, **self.given, **values}


def _nothing(*args: object) -> NoReturn:
    raise OpenName("")


def _said_in_code(
    name: str, kind: str | None, default: object, calls: list[dict[str, Said]], said: Constants
) -> Iterator[Said]:
    """What the code says: its calls, the default, constants of this name, and constants of a name of this kind."""
    for call in calls:
        if name in call:
            value = default if call[name].value is OMITTED else call[name].value
            if isinstance(value, PLAIN) and value is not None:
                yield call[name]._replace(value=value)
    if isinstance(default, PLAIN):
        yield Said(default, "its default", Rank.CODE)
    for value, source in said.get(name, ()):
        yield Said(value, source, Rank.CODE)
    for key, values in said.items():
        if kind and kind_of(key) == kind:
            for value, source in values:
                if not isinstance(value, str) or kind in ("activation", "device"):
                    yield Said(value, source, Rank.SAME_KIND)
