"""Finds the author's classes that may belong to the checkpoint, by the names that they set. No code is run here."""

import ast
import contextlib
from collections.abc import Mapping
from pathlib import Path

from fledge.checkpoints.author.source import SUFFIXES, AuthorFile, find_files
from fledge.checkpoints.loading import Checkpoint
from fledge.errors import UserError

MOST_BESIDE = 300
"""The largest number of files that are parsed to find the model's code beside a checkpoint."""


def code_beside(path: str, checkpoint: Checkpoint) -> tuple[Path, str] | None:
    """The folder and `FILE:CLASS` of code that sets all outermost names of a checkpoint, found without running any.

    Looked at are the checkpoint's folder, and the one that holds it if that has code of its own.
    """
    place = Path(path).resolve()
    folder = place if place.is_dir() else place.parent
    has_code = any(file.suffix in SUFFIXES and file.is_file() for file in folder.parent.iterdir())
    for root in (folder, *([folder.parent] if has_code else ())):
        with contextlib.suppress(UserError):
            ranked = ranked_classes(find_files(root, MOST_BESIDE), checkpoint)
            if ranked and ranked[0][0] == 1:
                _, source, name = ranked[0]
                return root, f"{source.path.relative_to(root)}:{name}"
    return None


def ranked_classes(sources: list[AuthorFile], checkpoint: Checkpoint) -> list[tuple[float, AuthorFile, str]]:
    """Classes with a forward, each with the share of the checkpoint's outermost names that it sets, the best first."""
    outermost = outermost_names(checkpoint)
    by_name = {cls.name: cls for source in sources for cls in source.classes()}
    ranked = []
    for source in sources:
        for cls in source.classes():
            attributes, runs = _attributes(cls, by_name)
            if runs and (shared := len(outermost & attributes) / len(outermost)) > 0.3:
                ranked.append((shared, source, cls.name))
    return sorted(ranked, key=lambda item: (-item[0], item[1].path.suffix == ".ipynb"))


def outermost_names(checkpoint: Checkpoint) -> set[str]:
    return {name.split(".")[0] for name in checkpoint.tensors}


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
        name = str(getattr(base, "id", getattr(base, "attr", None)))
        if name in by_name and name != cls.name:
            more, also = _attributes(by_name[name], {k: v for k, v in by_name.items() if k != cls.name})
            found, runs = found | more, runs or also
    return found, runs


def names_in(source: AuthorFile) -> str:
    return ", ".join(cls.name for cls in source.classes()[:8]) or "no classes"
