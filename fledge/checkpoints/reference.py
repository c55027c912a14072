"""`--reference`: the author's own module with the checkpoint's weights, found and built from his files.

This is the one place where Fledge runs somebody's code, because they asked for it by name.
"""

import ast
import contextlib
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import torch
from torch import nn

from fledge.checkpoints.arguments import (
    ANYTHING,
    GUESS,
    HEADS,
    OMITTED,
    PLAIN,
    Shapes,
    Slot,
    Solution,
    Solver,
    calls_of,
    constants,
    kind_of,
    prefix_of,
)
from fledge.checkpoints.author_code import (
    SUFFIXES,
    AuthorCode,
    AuthorModule,
    OpenName,
    Source,
    StandIn,
    find_sources,
    read_source,
)
from fledge.checkpoints.author_run import Author, author_runs
from fledge.checkpoints.facts import CONFIG_KEYS
from fledge.checkpoints.loading import Checkpoint
from fledge.cli import UserError

MOST_CLASSES = 12
MOST_BESIDE = 300
"""Files that are read, unasked, to see whether the model's code lies beside a checkpoint."""
MOST_CHANGES, MOST_RUNS = 200, 12
HARMLESS_KINDS = ("dropout", "device", "padding", "context", "vocabulary", "vocabulary itself", "width", "layers")
"""What changes no logit while the shapes stay, or changes the shapes."""
OBJECT = re.compile(
    r"(^|_)(config|configuration|cfg|conf|args|hparams|hps?|params|opts?|options|settings)$|config", re.I
)
"""Names of a constructor's argument that holds all others."""


class OpenField(OpenName, AttributeError, KeyError):
    """A field of the config that nobody gave; code that has a default for it never sees this."""


class Config(dict):
    """A config that a constructor may read as `config["emb_dim"]` or as `config.emb_dim`."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __missing__(self, name: str):
        raise OpenField(name)


@dataclass
class Found:
    """One class of the author's, with the values under which it comes nearest to the checkpoint."""

    source: Source
    name: str
    solver: Solver
    solution: Solution
    files: "Files"

    def build(self, values: Mapping[str, object], device: str) -> nn.Module:
        return self.files.build(self.source, self.name, values, device)

    def __str__(self) -> str:
        return f"{self.files.label(self.source)}:{self.name}"


def load_reference(
    spec: str, kwargs: str | None, checkpoint: Checkpoint, told: Mapping[str, object] | None = None
) -> Author:
    """The author's own module with the checkpoint's weights: token ids (B, T) → logits (B, T or 1, V), in float64.

    Args:
        spec: `FILE`, `FILE:CLASS`, or a folder; scripts and notebooks, of which only definitions are run.
        kwargs: JSON of values for names in its code: arguments, fields of its config, globals.
        checkpoint: the loaded file.
        told: what flags say, such as `n_head`.

    Raises:
        UserError: no such file or class, none that has the checkpoint's tensors, a value that nothing shows and on
            which the logits depend, or a forward that fails.
    """
    try:
        given = json.loads(kwargs) if kwargs else {}
    except ValueError as error:
        raise UserError(f"--reference_kwargs is no JSON object: {error}.") from error
    if not isinstance(given, dict):
        raise UserError(f"--reference_kwargs is no JSON object: it is a {type(given).__name__}.")
    files = Files(spec, given, checkpoint, told or {})
    fitting: list[Author] = []
    tried: list[Found] = []
    for source, name in files.candidates():
        print(f"--reference runs {name} of {files.label(source)}, and what it uses.", flush=True)
        found = files.solve(source, name)
        if any(found.solution.score):
            tried.append(found)
            continue
        fitting.append(author_of(found, checkpoint))
        if not fitting[0].agrees_with(fitting[-1]):
            raise UserError(
                f"--reference {spec}: {fitting[0].label} and {fitting[-1].label} both have its tensors and "
                "compute different logits; name the one that trained it as FILE:CLASS."
            )
    if not fitting:
        raise UserError(_why_none(spec, files, tried))
    fitting[0].context_length = files.context_length(fitting[0])
    return fitting[0]


def code_beside(path: str, checkpoint: Checkpoint) -> tuple[Path, str] | None:
    """The folder and `FILE:CLASS` of code that sets all outermost names of a checkpoint, found without running any.

    Looked at are the checkpoint's folder, and the one that holds it if that has code of its own.
    """
    place = Path(path).resolve()
    folder = place if place.is_dir() else place.parent
    has_code = any(file.suffix in SUFFIXES and file.is_file() for file in folder.parent.iterdir())
    for root in (folder, *([folder.parent] if has_code else ())):
        with contextlib.suppress(UserError):
            ranked = ranked_classes(find_sources(root, MOST_BESIDE), checkpoint)
            if ranked and ranked[0][0] == 1:
                _, source, name = ranked[0]
                return root, f"{source.path.relative_to(root)}:{name}"
    return None


def ranked_classes(sources: list[Source], checkpoint: Checkpoint) -> list[tuple[float, Source, str]]:
    """Classes with a forward, each with the share of the checkpoint's outermost names that it sets, the best first."""
    outermost = _outermost(checkpoint)
    by_name = {cls.name: cls for source in sources for cls in source.classes()}
    ranked = []
    for source in sources:
        for cls in source.classes():
            attributes, runs = _attributes(cls, by_name)
            if runs and (shared := len(outermost & attributes) / len(outermost)) > 0.3:
                ranked.append((shared, source, cls.name))
    return sorted(ranked, key=lambda item: (-item[0], item[1].path.suffix == ".ipynb"))


def _outermost(checkpoint: Checkpoint) -> set[str]:
    return {name.split(".")[0] for name in checkpoint.tensors}


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
        everything = find_sources(self.root) if path.is_dir() else []
        self.parsed = {source.path.resolve(): source for source in everything}
        if self.file:
            self.parsed[path.resolve()] = read_source(path)
        self.shapes = Shapes.of(checkpoint.tensors)

    def label(self, source: Source) -> str:
        path = source.path.resolve()
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def candidates(self) -> list[tuple[Source, str]]:
        """Classes that may be the checkpoint's, those first that have all names of its outermost modules."""
        if self.class_name:
            source = self.parsed[self.file.resolve()]
            if self.class_name not in source.bindings and not source.stars:
                raise UserError(f"{self.file} defines no {self.class_name}; it has {_names(source)}.")
            return [(source, self.class_name)]
        if self.file:
            self._follow_imports()
        ranked = ranked_classes([*self.parsed.values()], self.checkpoint)
        if not ranked:
            seen = sorted({cls.name for source in self.parsed.values() for cls in source.classes()})
            wanted = sorted(_outermost(self.checkpoint))[:5]
            raise UserError(
                f"--reference {self.spec}: no class there sets {', '.join(wanted)} as the file has "
                f"them; found were {', '.join(seen[:8]) or 'no classes'}; name the file of the model{self.broken()}."
            )
        full = [item for item in ranked if item[0] == 1]
        return [(source, name) for _, source, name in (full or ranked[:3])[:MOST_CLASSES]]

    def _follow_imports(self) -> None:
        """Adds the author's files that the named one imports, and those that they import."""
        code, todo = AuthorCode(self.root, {}, bool, self.parsed), [self.parsed[self.file.resolve()]]
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
                        if found and found._source and found._source.path.resolve() not in seen:
                            todo.append(found._source)

    def solve(self, source: Source, name: str) -> Found:
        said = constants(list(self.parsed.values()))
        code = self._code({})
        try:
            with author_runs("cpu"):
                author = getattr(code.open(source.path), name)
            signature = inspect.signature(author).parameters
        except OpenName:
            signature = {}
        except (Exception, SystemExit) as error:  # whatever the author's code does
            solver = Solver(_nothing, _nothing, {})
            return Found(source, name, solver, Solution({}, {}, (2, 0, 0), f"{type(error).__name__}: {error}"), self)
        calls = calls_of(name, list(signature), list(self.parsed.values()), said)
        used: dict[str, object] = {}

        def build(values: dict) -> nn.Module:
            return self.build(source, name, values, "meta", used)

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
                slot.stated.insert(0, (value, "its own file", -1))
                solver.slots[key] = slot
                start[key] = slot.values()[0][0]
        return Found(source, name, solver, solver.solve(start), self)

    def slot(self, name: str, default: object, calls: list[dict], said: Mapping) -> Slot:
        """Who says what a value is, the surest first: a flag, the checkpoint, the code, and then the shapes."""
        if name in self.given:
            return Slot(name, [(self.given[name], "--reference_kwargs", 0)])
        kind, config, slot = kind_of(name), self.checkpoint.config, Slot(name)
        slot.stated += [(value, f"--{key}", 0) for key, value in self.told.items() if kind == kind_of(key)]
        if name in config:
            slot.stated.append((config[name], "checkpoint config", 1))
        elif kind:
            slot.stated += [
                (value, f"checkpoint config, {key}", 1) for key, value in config.items() if kind_of(str(key)) == kind
            ]
        passed = [(default if v is OMITTED else v, s, r) for v, s, r in (call[name] for call in calls if name in call)]
        slot.stated += [call for call in passed if call[0] is not None]
        slot.stated += [(default, "its default", 3)] if default is not inspect.Parameter.empty else []
        slot.stated += [(value, source, 3) for value, source in said.get(name, [])]
        alike = [(v, s, 4) for key, values in said.items() if kind and kind_of(key) == kind for v, s in values]
        slot.stated += [item for item in alike if not isinstance(item[0], str) or kind in ("activation", "device")]
        slot.stated.sort(key=lambda item: item[2])
        slot.stated = [item for item in slot.stated if isinstance(item[0], PLAIN) or item[1] == "checkpoint config"]
        slot.stated = [item for item in slot.stated if type(item[0]).__hash__]
        slot.proposed = self.shapes.propose(name)
        slot.likely = len(slot.proposed)
        if kind not in ("dropout", "device", "flag", "activation", "epsilon", "theta"):
            slot.proposed += [*self.shapes.everything[:12], *self.shapes.by_kind["layers"], *ANYTHING]
        return slot

    def broken(self) -> str:
        """What could not be read of the author's scripts, as the end of a sentence."""
        left_out = [
            f"{self.label(s)} ({s.broken})" for s in self.parsed.values() if s.broken and s.path.suffix == ".py"
        ]
        return f"; not read, because it is no Python: {', '.join(left_out[:3])}" if left_out else ""

    def context_length(self, author: Author) -> tuple[int, str] | None:
        """How long the author's code says the context is, and where: a value it was built with, else a constant."""
        said = {name: [value] for name, value in author.values.items() if value[1] != GUESS}
        for names in (said, constants(list(self.parsed.values()))):
            for name in CONFIG_KEYS["context_length"]:
                found = {value: source for value, source in names.get(name, ()) if type(value) is int and value > 1}
                if len(found) == 1:
                    ((length, source),) = found.items()
                    return length, f"{name}, {source}"
        return None

    def _code(self, values: Mapping[str, object]) -> AuthorCode:
        return AuthorCode(self.root, values, lambda name: bool(kind_of(name)), self.parsed)

    def build(self, source: Source, name: str, values: Mapping, device: str, used: dict | None = None) -> nn.Module:
        """The module under these values.

        Raises:
            OpenName: one more is needed.
        """
        code = self._code(values)
        try:
            with author_runs(device):
                module = code.open(source.path)
                author = getattr(module, name)
                positional, keywords = self._bind(author, values, module)
                made = author(*positional, **keywords)
        finally:
            if used is not None:
                used.update(code.used)
        if not isinstance(made, nn.Module):
            raise UserError(f"--reference {self.spec}: {name} is a {type(made).__name__} and no torch.nn.Module.")
        return made

    def _bind(self, author: object, values: Mapping[str, object], module: AuthorModule) -> tuple[list, dict]:
        positional, keywords = [], {}
        for name, parameter in inspect.signature(author).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                taken = inspect.signature(author).parameters
                known = self.given if len(taken) > 1 else self._all(values)
                keywords |= {key: value for key, value in known.items() if key not in taken}
                continue
            kind = _config_type(parameter, module)
            value = _config(kind, self._all(values)) if kind else _value(name, values)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        return positional, keywords

    def _all(self, values: Mapping[str, object]) -> dict[str, object]:
        return {**self.checkpoint.config, **self.given, **values}


def _value(name: str, values: Mapping[str, object]) -> object:
    if name not in values:
        raise OpenName(name)
    return values[name]


def _nothing(*args) -> None:
    raise OpenName("")


def _config_type(parameter: inspect.Parameter, module: AuthorModule) -> type | None:
    """The class of an argument that holds other values: the author's own, or `Config`; None for a plain value."""
    hint = parameter.annotation
    if isinstance(hint, str) and hint.isidentifier():
        with contextlib.suppress(AttributeError, OpenName):
            hint = getattr(module, hint)
    default = parameter.default
    if not isinstance(hint, type) and dataclasses.is_dataclass(type(default)):
        hint = type(default)
    if isinstance(hint, type) and hint is not parameter.empty and hint.__module__.startswith("fledge_reference"):
        return None if issubclass(hint, nn.Module) else hint
    scalar = hint in (int, float, bool, str) or isinstance(default, (int, float, bool))
    return Config if OBJECT.search(parameter.name) and not scalar and not isinstance(hint, StandIn) else None


def _config(kind: type, values: dict[str, object]) -> object:
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
    made = kind(**{name: _value(name, values) for name in names})
    for name, value in values.items():
        if hasattr(made, name) and not callable(getattr(made, name)):
            with contextlib.suppress(AttributeError):  # a property
                setattr(made, name, value)
    return made


def _attributes(cls: ast.ClassDef, by_name: Mapping[str, ast.ClassDef]) -> tuple[set[str], bool]:
    """Names that a class sets on itself or registers, its bases' among them, and whether it has a forward."""
    found, runs = set(), False
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
            "register_buffer", "register_parameter", "add_module", "register_module"
        ):  # fmt: skip
            found.update(str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.FunctionDef) and node.name == "forward":
            runs = True
    for base in cls.bases:
        name = getattr(base, "id", getattr(base, "attr", None))
        if name in by_name and name != cls.name:
            more, also = _attributes(by_name[name], {k: v for k, v in by_name.items() if k != cls.name})
            found, runs = found | more, runs or also
    return found, runs


def _names(source: Source) -> str:
    return ", ".join(cls.name for cls in source.classes()[:8]) or "no classes"


def _why_none(spec: str, files: Files, tried: list[Found]) -> str:
    best = min(tried, key=lambda found: found.solution.score)
    cannot_be_built, *_ = best.solution.score
    values = ", ".join(f"{k}={v}" for k, v in best.solution.values.items() if kind_of(k) not in ("dropout", "device"))
    if cannot_be_built:
        return (
            f"--reference {spec}: {best} cannot be built from {values or 'nothing'} ({best.solution.error}); pass what "
            f"it needs as --reference_kwargs JSON{files.broken()}."
        )
    with contextlib.suppress(Exception):
        module = best.build(best.solution.values, "meta")
        own, wanted = module.state_dict(), best.files.checkpoint.tensors
        prefix = prefix_of(module, wanted)
        own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
        only = [f"{name} (only in the checkpoint)" for name in wanted if name not in own]
        only += [
            f"{name} (only in the code)"
            for name, _ in module.named_parameters()
            if name.removeprefix(prefix) not in wanted
        ]
        shapes = [
            f"{name} {tuple(wanted[name].shape)} and not {tuple(own[name].shape)}"
            for name in wanted
            if name in own and wanted[name].shape != own[name].shape
        ]
        return (
            f"--reference {spec}: no class there has this checkpoint's tensors; {best} comes nearest, with "
            f"{values or 'no values'}, and differs in {', '.join([*only, *shapes][:3])}{files.broken()}; "
            "did this code train it?"
        )
    return f"--reference {spec}: no class there has this checkpoint's tensors{files.broken()}."


def author_of(found: Found, checkpoint: Checkpoint) -> Author:
    """The module with its weights, after asking whether values that no shape shows change what it computes.

    Raises:
        UserError: one does, and nobody states it.
    """
    values, others = found.solution.values, _same_shapes(found)
    runs = [(change, author) for change in others if (author := _running(found, values | change, checkpoint))]
    author = _running(found, values, checkpoint)
    if author is None and runs:  # a guess that has the shapes, and with which the forward fails
        (change, author), *runs = runs
        values |= change
        found.solution.sources.update(dict.fromkeys(change, "the first that runs"))
    author = author or _loaded(found, values, checkpoint)
    different = [change for change, other in runs if not author.agrees_with(other)]
    if different:
        names = list(dict.fromkeys(name for other in different for name in other))
        choices = [", ".join(f"{n} {(values | other)[n]}" for n in names) for other in [{}, *different][:6]]
        said = json.dumps({name: values[name] for name in names})
        raise UserError(
            f"--reference {found} fits the checkpoint's shapes with {'; '.join(dict.fromkeys(choices))}, which compute "
            "different logits, and neither the checkpoint nor the code says which; pass the right one as "
            f"--reference_kwargs '{said}'."
        )
    author.describe(found, {n: (v, found.solution.sources[n]) for n, v in values.items()})
    return author


def _same_shapes(found: Found) -> list[dict[str, object]]:
    """Changes of what nobody clearly states, one value or two together, under which all shapes stay."""
    values, unsure = found.solution.values, {}
    for name, value in values.items():
        slot, kind = found.solver.slots.get(name), kind_of(name)
        if slot and kind not in (*HARMLESS_KINDS, None) and not slot.is_sure(value):
            stated = [v for v, _, _ in slot.stated]
            choices = stated if value in stated else [v for v, _ in slot.values()]
            unsure[name] = [v for v in dict.fromkeys(choices) if v != value][:12]
    changes = [{name: value} for name, choices in unsure.items() for value in choices]
    for one, two in sorted(combinations(unsure, 2), key=lambda pair: -sum(kind_of(name) in HEADS for name in pair)):
        changes += [{one: a, two: b} for a, b in product(unsure[one][:6], unsure[two][:6])]
    fitting = [change for change in changes[:MOST_CHANGES] if not any(found.solver.score(values | change)[0])]
    return fitting[:MOST_RUNS]


def _running(found: Found, values: Mapping[str, object], checkpoint: Checkpoint) -> Author | None:
    try:
        return _loaded(found, values, checkpoint)
    except UserError:
        return None


def _loaded(found: Found, values: Mapping[str, object], checkpoint: Checkpoint) -> Author:
    module = found.build(values, "cpu")
    prefix = prefix_of(module, checkpoint.tensors)
    module.load_state_dict({prefix + name: tensor for name, tensor in checkpoint.tensors.items()}, strict=False)
    own = module.state_dict()
    for name, tensor in checkpoint.tensors.items():
        if not torch.equal(own[prefix + name].to(tensor.dtype), tensor):
            raise UserError(
                f"--reference {found} ties {name} to another tensor, and the checkpoint has two different ones."
            )
    return Author(module.double().eval(), str(found), checkpoint.tensors)
