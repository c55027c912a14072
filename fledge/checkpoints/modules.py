"""The modules of a state dict, by their paths: those of each layer, and those outside of the layers."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fledge.checkpoints.words import FINAL, OUTSIDE_OF_LAYERS, PROJECTIONS, WEIGHT_OR_BIAS


@dataclass
class Module:
    """One module of the source, with the names and shapes of its tensors under the keys `weight` and `bias`."""

    path: str
    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The source's name of its first tensor."""
        return next(iter(self.names.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes.get("weight", ())

    @property
    def words(self) -> list[str]:
        """Lower-case words of the path, the last first; of a spelling such as `c_attn`, also the joined word."""
        words: list[str] = []
        for part in reversed(re.split(r"[./]", self.path)):
            pieces = [piece.lower() for piece in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
            words += dict.fromkeys([re.sub(r"[^a-z0-9]", "", part.lower()), *reversed(pieces)])
        return words

    @property
    def numbers(self) -> list[int]:
        # w12 holds w1 and w2.
        return [int(number) for number in re.findall(r"(?<=w)[12](?=[23](?!\d))|\d+", self.path)]

    def count(self, words: set[str]) -> int:
        """How many of the module's words are among these."""
        return sum(word in words for word in self.words)

    @property
    def projection(self) -> str | None:
        """The role that its words give it in attention: `query`, `key`, `value`, or `qkv` in some order."""
        return next((PROJECTIONS[word] for word in self.words if word in PROJECTIONS), None)


def listed(modules: list[Module]) -> str:
    return ", ".join(module.name for module in modules)


def modules_of(
    tensors: Mapping[str, Tensor], stack: str | None, numbered: bool = True
) -> tuple[list[Module], dict[int, list[Module]]]:
    """Modules outside the layers, and those of each layer by its number, in the order in which they were defined.

    A layer's names begin with `stack` and its number; a model of a single layer may do without the number.
    """
    outer: dict[str, Module] = {}
    blocks: defaultdict[int, dict[str, Module]] = defaultdict(dict)
    pattern = re.escape(stack or "") + (r"(\d+)[./](.*)" if numbered else r"()(.*)")
    for name, tensor in tensors.items():
        found = re.fullmatch(pattern, name) if stack is not None else None
        if found and not numbered and not stack and _is_outside(Module(split_ending(name)[0])):
            found = None
        path, kind = split_ending(found[2] if found else name)
        module = (blocks[int(found[1] or 0)] if found else outer).setdefault(path, Module(path))
        module.names[kind] = name
        # A table of positions is often saved as (1, T, D) or (T, 1, D).
        module.shapes[kind] = tuple(tensor.shape if tensor.dim() < 3 else tensor.squeeze().shape)
    return list(outer.values()), {n: list(modules.values()) for n, modules in blocks.items()}


def _is_outside(module: Module) -> bool:
    """Whether a module without any prefix is an end of the model, and not a part of its one layer."""
    return bool(module.count(OUTSIDE_OF_LAYERS) or FINAL & {*module.words})


def prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Possible prefixes of the names of a single layer without a number, those with the fewest tensors first."""
    counts = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"[./]", name))
    return [*sorted(counts, key=lambda prefix: (counts[prefix], prefix)), ""]


def layer_stack(tensors: Mapping[str, Tensor]) -> str | None:
    """The prefix before the layer number: of the numbered parts of the names, the one that covers most names."""
    suffixes: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        for number in re.finditer(r"(?:(?<=[./])|(?<=^)|(?<=[A-Za-z_]))\d+(?=[./])", name):
            suffixes[name[: number.start()]][number[0]].add(name[number.end() :])
    if not suffixes:
        return None

    def covered(prefix: str) -> tuple[int, int]:
        layers = suffixes[prefix].values()
        alike = len({frozenset(layer) for layer in layers}) == 1
        return sum(map(len, layers)) * (2 if alike else 1), -len(prefix)

    return max(suffixes, key=covered)


def split_ending(name: str) -> tuple[str, str]:
    """The path of a tensor's module, and whether the tensor is its `weight` or its `bias`."""
    path, _, last = name.replace("/", ".").rpartition(".")
    if last in WEIGHT_OR_BIAS and path:
        return path, WEIGHT_OR_BIAS[last]
    for ending in ("weight", "bias"):
        if name.endswith(f"_{ending}"):  # nn.MultiheadAttention: in_proj_weight
            return name.removesuffix(f"_{ending}"), ending
    return name, "weight"
