"""Searches the values of a constructor's arguments until the module has the checkpoint's shapes.

The module is built on the meta device with the values that are stated or proposed. Whatever does not give the
checkpoint's shapes is changed until it does.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

from torch import Tensor, nn

from fledge.checkpoints.author.kinds import HEADS, kind_of
from fledge.checkpoints.author.stand_ins import OpenName
from fledge.checkpoints.author.statements import Rank, Said

MOST_BUILDS = 500

GUESS = "a guess from the shapes"


@dataclass
class Slot:
    """One value that the module's code needs: the statements about it, most reliable first, and the shapes' proposals.

    The first `likely` proposals are those for its kind.
    """

    name: str
    stated: list[Said] = field(default_factory=list)
    proposed: list = field(default_factory=list)
    likely: int = 0

    def values(self) -> list[tuple[object, str]]:
        """Each value once, with its source, in the order in which they are tried."""
        kept: dict[tuple, tuple[object, str]] = {}
        proposed = [(value, GUESS) for value in self.proposed]
        for value, source in [*((said.value, said.source) for said in self.stated), *proposed]:
            kept.setdefault((type(value), value), (value, source))  # True is not 1
        return list(kept.values())

    def states(self, value: object) -> bool:
        return any(said.value == value for said in self.stated)

    def only_in_code(self) -> bool:
        """Whether no flag, no config and no call of the code states it."""
        return all(said.rank >= Rank.CODE for said in self.stated)

    def is_sure(self, value: object) -> bool:
        """Whether the most reliable statements all give this value."""
        first = min((said.rank for said in self.stated), default=None)
        return first is not None and {said.value for said in self.stated if said.rank == first} == {value}


@dataclass
class Solution:
    """Values that give a module the checkpoint's shapes, or come closest to them."""

    values: dict[str, object]
    sources: dict[str, str]
    score: tuple
    error: str = ""


class Solver:
    """Searches the values of slots. `build(values)` makes the module on the meta device, or raises."""

    def __init__(
        self, build: Callable[[dict], nn.Module], make_slot: Callable[[OpenName], Slot], tensors: Mapping[str, Tensor]
    ):
        self.build, self.make_slot, self.tensors = build, make_slot, tensors
        self.slots: dict[str, Slot] = {}
        self.builds = 0
        self.names_missing = False
        self.sizes = ("vocabulary", "width", "context", "layers", "heads", "inner width")

    def score(self, values: dict[str, object]) -> tuple[tuple, str]:
        """0 is right. A name that turns out to be needed becomes a slot with its first value."""
        while True:
            self.builds += 1
            try:
                return (0, *mismatch(self.build(values), self.tensors)), ""
            except OpenName as error:
                if error.name in values:
                    return (2, 0, 0), f"{error.name} is open"
                slot = self.slots.setdefault(error.name, self.make_slot(error))
                if not slot.values():
                    return (2, 0, 0), f"nothing shows what {error.name} is"
                values[error.name] = slot.values()[0][0]
            except (Exception, SystemExit) as error:  # whatever the author's code does
                return (1, 0, 0), f"{type(error).__name__}: {' '.join(str(error).split())}"

    def solve(self, start: dict[str, object]) -> Solution:
        """Changes one value at a time, then two, always to values that are closer to the checkpoint."""
        values = dict(start)
        best, error = self.score(values)
        while any(best) and self.builds < MOST_BUILDS:
            self.names_missing = best[0] == 0 and best[1] > 0
            for changes in self._changes(values):
                tried = values | changes
                reached, why = self.score(tried)
                if reached < best:
                    values, best, error = tried, reached, why
                    break
                if self.builds >= MOST_BUILDS:
                    break
            else:
                break
        if not any(best):
            values = self._restored(values)
        return Solution(values, {name: self.source(name, value) for name, value in values.items()}, best, error)

    def _restored(self, values: dict[str, object]) -> dict[str, object]:
        """The values with the most reliable statement restored wherever the shapes allow it."""
        for name in values:
            first = self.slots[name].values()[0][0] if name in self.slots else values[name]
            if first != values[name] and not any(self.score(values | {name: first})[0]):
                values = values | {name: first}
        heads = {
            name: self.slots[name].values()[:6] for name in values if name in self.slots and kind_of(name) in HEADS
        }
        ranks = sorted(product(*(range(len(choices)) for choices in heads.values())), key=sum)
        for rank in ranks if len(heads) > 1 else ():  # how many share a key says nothing alone
            tried = {name: heads[name][i][0] for name, i in zip(heads, rank, strict=True)}
            if not any(self.score(values | tried)[0]):
                return values | tried
        return values

    def _changes(self, values: dict[str, object]) -> Iterator[dict[str, object]]:
        others = {
            name: [value for value, _ in self.slots[name].values() if value != values[name]]
            for name in values
            if name in self.slots
        }
        # What no tensor shows is likely to be another version's: all such values change together first.
        likely = {name: self.slots[name].proposed[:1] for name in others if kind_of(name) in self.sizes}
        likely = {n: v for n, v in likely.items() if values[n] not in self.slots[n].proposed[: self.slots[n].likely]}
        yield {name: value[0] for name, value in likely.items() if value}
        first = [
            (name, value) for name, choices in others.items() for value in choices if value in likely.get(name, ())
        ]
        rest = [(name, value) for name, choices in others.items() for value in choices if (name, value) not in first]
        yield from ({name: value} for name, value in [*first, *rest])
        if self.names_missing:  # no two sizes mend a missing name
            return
        for one, two in combinations(others, 2):
            for pair in product(others[one][:6], others[two][:6]):
                yield dict(zip((one, two), pair, strict=True))

    def source(self, name: str, value: object) -> str:
        slot = self.slots.get(name)
        return next((source for v, source in slot.values() if v == value), "given") if slot else "given"


def mismatch(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """How far a module's state dict is from a checkpoint: (names missing on either side, dimensions that differ)."""
    own, prefix = module.state_dict(keep_vars=True), prefix_of(module, tensors)
    wanted = {prefix + name: tensor for name, tensor in tensors.items()}
    held = {id(own[name]) for name in own if name in wanted}
    missing = [
        name for name, p in own.items() if name not in wanted and isinstance(p, nn.Parameter) and id(p) not in held
    ]
    unknown = wanted.keys() - own.keys()
    differing = 0
    for name in wanted.keys() & own.keys():
        here, there = tuple(own[name].shape), tuple(wanted[name].shape)
        differing += sum(a != b for a, b in zip(here, there, strict=False)) + abs(len(here) - len(there))
    return len(missing) + len(unknown), differing


def prefix_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The prefix of the module's names before the checkpoint's names, such as `model.` in a wrapper."""
    own = list(module.state_dict(keep_vars=True))
    if not own or any(name in tensors for name in own):
        return ""
    first = own[0].split(".")
    starts = (".".join(first[:depth]) + "." for depth in range(1, len(first)))
    return next((s for s in starts if all(n.startswith(s) for n in own) and own[0].removeprefix(s) in tensors), "")
