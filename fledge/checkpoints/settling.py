"""Settles facts by statements: of the user, the checkpoint's config, the authors of a layout, or usual practice."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.facts import CONFIG_KEYS, Fact, Source, Status, check_fact, config_key, from_config
from fledge.checkpoints.known_layouts import LAYOUTS, UNUSUAL, Layout
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.mixing import mixing_roles
from fledge.checkpoints.structure import Structure
from fledge.errors import UserError


@dataclass(frozen=True)
class KnownLayout:
    """The layout that a checkpoint has.

    `forced` says that --layout names it, and `exact` that all names are the layout's own, so that the facts which its
    known authors share are settled.
    """

    name: str
    layout: Layout
    forced: bool
    exact: bool


def known_layout(
    checkpoint: Checkpoint, structure: Structure, tensors: Mapping[str, Tensor], forced: str | None
) -> KnownLayout | None:
    """The layout that --layout names, or else the first one that the names show; `tensors` have canonical names."""
    names = checkpoint.tensors.keys() - mixing_roles(checkpoint.tensors).keys()
    transposed = bool(structure.transposed)
    fitting = (
        name for name, layout in LAYOUTS.items() if layout.fits(checkpoint.tensors, checkpoint.left_out, transposed)
    )
    name = forced or next(fitting, None)
    if name is None:
        return None
    layout = LAYOUTS[name]
    # An author who left out the final norm of a layout may have changed more of it.
    normed = "final_norm.weight" in tensors or bool(layout.facts.get("final_norm"))
    exact = (not layout.shared or layout.dated in checkpoint.config) and layout.roles(names) is not None
    return KnownLayout(name, layout, bool(forced), exact and normed and _is_usual(checkpoint.config, layout))


def _is_usual(config: Mapping[str, object], layout: Layout) -> bool:
    """Whether nothing in a config says that its author computes something else than the layout's."""
    unusual = [key for key in config if UNUSUAL.fullmatch(str(key)) and key != layout.dated]
    claimed = config.get("architectures")
    names = claimed if isinstance(claimed, list) else [claimed]
    own = claimed is None or not layout.architectures or any(name in layout.architectures for name in names)
    return own and not any(config[key] and config[key] != 1 for key in unusual)


class Settling:
    """The facts of one checkpoint as far as they are known, each with its source.

    Args:
        known: the checkpoint's layout, if it has a known one.
        config: the checkpoint's own config.
        told: facts stated by flags or a mapping, by name.
        by_author: the context length of the author's code, for a checkpoint that shows none.
        origins: where each entry of the config is from.
        stated: facts that the config states in words of its own.
    """

    def __init__(
        self,
        known: KnownLayout | None,
        config: Mapping[str, Any],
        told: Mapping[str, Fact],
        by_author: Fact | None = None,
        origins: Mapping[str, str] | None = None,
        stated: Mapping[str, object] | None = None,
    ):
        self.known, self.config, self.told, self.by_author = known, config, told, by_author
        self.origins, self.stated = origins or {}, stated or {}
        self.facts: dict[str, Fact] = {}
        source = Source.NO_NAMES if known is None else Source.LAYOUT_FLAG if known.forced else Source.NAMES
        self.add(Fact("layout", known and known.name, Status.SHOWN, source))

    def __getitem__(self, name: str) -> Fact:
        return self.facts[name]

    def listed(self) -> list[Fact]:
        return list(self.facts.values())

    def add(self, fact: Fact) -> Any:
        self.facts[fact.name] = fact
        return fact.value

    def show(self, name: str, value: Any) -> Any:
        """Records what the tensors show."""
        return self.add(Fact.of(name, value, Source.TENSORS))

    def settle(self, name: str, default: Any, source: Source = Source.PRACTICE) -> Any:
        """Records the most reliable statement about a fact, or else the `default`, and returns the value.

        Raises:
            UserError: the fact cannot have the value that is said.
        """
        self.add(self._said(name, default, source))
        return check_fact(self.facts[name])

    def _said(self, name: str, default: Any, source: Source) -> Fact:
        """The user comes first, then the config, and then the known authors."""
        if name in self.told:
            return self.told[name]
        if name in self.stated:
            return Fact.of(name, self.stated[name], Source.CONFIG)
        if name in CONFIG_KEYS and (said := from_config(self.config, name)) is not None:
            key = config_key(self.config, name) or ""
            place = self.origins.get(key, "")
            fact = Fact.of(name, said, Source.PICKLED if place == Source.PICKLED else Source.CONFIG)
            fact.detail = key if place in ("", Source.PICKLED) else f"{key}, {place}"
            return fact
        if self.known is None or name in ("n_head", "context_length"):
            return Fact.of(name, default, source)
        return self._by_layout(self.known, name, default, source)

    def _by_layout(self, known: KnownLayout, name: str, default: Any, source: Source) -> Fact:
        layout = known.layout
        value = layout.facts.get(name, default)
        is_shared = known.exact and (name not in layout.open or layout.dated in self.config)
        if not (known.forced or is_shared):
            return Fact.of(name, value, Source.DEFAULT if name in layout.facts else source)
        if name == "final_norm" and known.exact:
            value = True  # it is in the table, and only looks as if it had never been trained
        if known.forced:
            return Fact.of(name, value, Source.LAYOUT_FLAG)
        return Fact(name, value, Status.SETTLED, Source.AUTHORS, layout=known.name)

    def compute(self, gpt: CanonicalGPT) -> None:
        """Works out the facts of the layout that depend on the model's sizes and its config."""
        if self.known and self.known.layout.computed:
            facts = {**self.known.layout.facts, **self.known.layout.computed(gpt, self.config)}
            self.known = replace(self.known, layout=replace(self.known.layout, facts=facts, computed=None))

    def settle_assumed(self, names: Iterable[str], source: Source) -> None:
        """Settles those of the facts that are still assumed."""
        for name in names:
            if name in self.facts and self.facts[name].assumed:
                self.facts[name].settle(source)

    def stated_names(self) -> set[str]:
        """The facts that the user, the config or the layout states."""
        return {*self.told, *self.stated, *(self.known.layout.facts if self.known else ())}

    def check_told(self, fields: Mapping[str, Any]) -> None:
        """Checks that each told fact was asked for, or else agrees with the model's own `fields`.

        Raises:
            UserError: a told fact contradicts what the tensors show.
        """
        for name, fact in self.told.items():
            shown = self.facts[name].value if name in self.facts else fields.get(name, False)
            if fact.value != shown:
                raise UserError(f"{fact.said_by} says {name}: {fact.value}; the tensors show {shown}.")
