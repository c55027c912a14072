"""What a constructor needs, solved from the shapes of a checkpoint's tensors.

Vocabulary, width, heads, layers and context have a hundred names. A name's words propose values, the module is built
with them on the meta device, and whatever does not give the checkpoint's shapes is changed until it does.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

from torch import Tensor, nn

from fledge.checkpoints.author_code import OpenName, Source

MOST_BUILDS = 500
LONG = 2048
"""A context length where no tensor shows one."""
KINDS = {
    "vocabulary itself": r"^(vocab|vocabulary|stoi|itos|tokenizer|tok|chars|enc)$",
    "device": r"device",
    "dropout": r"drop|(^|_)p$|(^|_)rate$|prob",
    "padding": r"pad",
    "epsilon": r"(^|_)eps",
    "theta": r"theta|(^|_)base$",
    "flag": r"bias|(^|_)ti(e|ed|ying)|flash|causal|verbose|checkpointing|^(use|is)_",
    "activation": r"(^|_)act(ivation)?",
    "vocabulary": r"vocab|n_?tokens?$|num_tokens|token_size|n_?chars|num_embeddings|(char|alphabet|dict)\w*_(size|len)",
    "context": r"block_?size|context|ctx|max_?(seq|len|pos|tok|t$)|seq|position|window|length|^t$|chunk",
    "key heads": r"kv|groups?$",
    "head width": r"head_?(size|dim|width)|(size|dim|width)_?(per_)?head|^d_?[kqvh]$|d_head|d_key|key_dim",
    "heads": r"head|^h$",
    "layers": r"layer|block|depth|^n$|^l$|stack",
    "inner width": r"ff|inner|intermediate|mlp|feed|expan|mult|ratio|hidden_dim|fwd",
    "width": r"emb|dim|d_?model|hidden|width|channel|units|size|state|^c$|^d$",
}
"""What a name's words mean, in the order in which they are tried."""
SAME = {"activation": ("gelu", "relu", "silu"), "flag": (False, True), "epsilon": (1e-5, 1e-6, 1e-8)}
SAME |= {"device": ("cpu",), "dropout": (0.0,), "padding": (0,), "theta": (10_000.0,)}
HEADS = ("heads", "key heads")
OMITTED = object()
"""In place of an argument that a call leaves to its default."""
PLAIN = (int, float, str, bool, type(None))
GUESS = "a guess from the shapes"
ANYTHING = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


def kind_of(name: str) -> str | None:
    """Which of `KINDS` a name of an argument, a global or a config's field is, if its words tell."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), None)


class Vocabulary(dict):
    """A vocabulary of the right length, for code that only asks how many tokens there are."""

    def __init__(self, size: int):
        super().__init__({str(number): number for number in range(size)})
        self.vocab_size = self.n_vocab = size

    def get_vocab_size(self) -> int:
        return len(self)

    def __hash__(self) -> int:
        return len(self)

    def __repr__(self) -> str:
        return f"with {len(self)} tokens"


@dataclass
class Shapes:
    """Numbers that a checkpoint's tensors show, by kind, the likeliest first."""

    by_kind: dict[str, list]
    everything: list[int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Shapes":
        matrices = {name: tuple(t.shape) for name, t in tensors.items() if t.dim() == 2}
        dims = sorted({dim for tensor in tensors.values() for dim in tensor.shape}, reverse=True)
        words = re.compile(r"pos|pe\b|wpe")
        tables = [s for n, s in matrices.items() if re.search("emb|tok|wte|vocab|lookup", n) and not words.search(n)]
        vocabulary, width = next(iter(tables), max(matrices.values(), default=(1, 1)))
        context = [dim for name, t in tensors.items() if words.search(name) for dim in t.shape if dim not in (1, width)]
        stacks: dict[str, int] = {}
        for name in tensors:
            for match in re.finditer(r"\.(\d+)(?=\.)", "." + name):
                stack = re.sub(r"\d+", "#", name[: match.start()])
                stacks[stack] = max(stacks.get(stack, 0), int(match[1]) + 1)
        outer = [count for stack, count in stacks.items() if "#" not in stack]
        inner = [count for stack, count in stacks.items() if "#" in stack]
        divisors = [n for n in range(1, width + 1) if width % n == 0 and width // n > 1]
        usual = sorted(divisors, key=lambda n: (width // n not in (64, 32, 128, 16), abs(width // n - 64)))
        wide = [dim for dim in dims if dim != vocabulary and dim > width]
        ratios = [dim // width for dim in wide if dim % width == 0]
        heads = [n for n in inner if n in divisors] + usual
        by_kind = {
            "vocabulary": [vocabulary], "width": [width], "context": context or [LONG], "layers": outer + inner,
            "heads": heads, "key heads": heads, "head width": [width // n for n in heads],
            "vocabulary itself": [Vocabulary(vocabulary), vocabulary],
            "inner width": [*sorted(wide, key=lambda dim: dim == 3 * width), *ratios],
        }  # fmt: skip
        return cls({kind: list(dict.fromkeys(values)) for kind, values in by_kind.items()}, dims)

    def propose(self, name: str) -> list:
        kind = kind_of(name)
        return [*SAME.get(kind, ()), *self.by_kind.get(kind, ())]


@dataclass
class Slot:
    """One value that the module's code needs: who said what, the surest first, and what the shapes propose.

    The first `likely` proposals are those for its kind. Each statement is a value, its source, and a rank; statements
    of one rank are equally sure.
    """

    name: str
    stated: list[tuple[object, str, int]] = field(default_factory=list)
    proposed: list = field(default_factory=list)
    likely: int = 0

    def values(self) -> list[tuple[object, str]]:
        """Each value once, with its source, in the order in which they are tried."""
        kept = {}
        for value, source in [*(s[:2] for s in self.stated), *((value, GUESS) for value in self.proposed)]:
            kept.setdefault((type(value), value), (value, source))
        return list(kept.values())

    def is_sure(self, value: object) -> bool:
        """Whether the surest who state anything state this, and nothing else."""
        first = min((rank for _, _, rank in self.stated), default=None)
        return first is not None and {said for said, _, rank in self.stated if rank == first} == {value}


def constants(sources: list[Source]) -> dict[str, list[tuple[object, str]]]:
    """Numbers, words and flags that the code gives to names: assignments, keywords, dicts, defaults, options."""
    found: dict[str, list[tuple[object, str]]] = {}

    def add(name: str | None, value: ast.expr | None, source: Source) -> None:
        try:
            plain = ast.literal_eval(value) if isinstance(value, (ast.Constant, ast.UnaryOp)) else None
        except ValueError:
            return
        if (
            name
            and isinstance(value, (ast.Constant, ast.UnaryOp))
            and isinstance(plain, PLAIN)
            and not (isinstance(plain, str) and len(plain) > 40)
        ):
            found.setdefault(name, []).append((plain, source.path.name))

    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    add(getattr(target, "id", getattr(target, "attr", None)), node.value, source)
            elif isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args]
                for argument, value in zip(arguments[::-1], node.args.defaults[::-1], strict=False):
                    add(argument.arg, value, source)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    add(
                        key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None,
                        value,
                        source,
                    )
            elif isinstance(node, ast.Call):
                for keyword in node.keywords:
                    add(keyword.arg, keyword.value, source)
                if getattr(node.func, "attr", "") == "add_argument" and node.args:
                    default = next((k.value for k in node.keywords if k.arg == "default"), None)
                    add(str(getattr(node.args[-1], "value", "")).lstrip("-").replace("-", "_"), default, source)
    return found


def calls_of(name: str, parameters: list[str], sources: list[Source], said: Mapping) -> list[dict[str, tuple]]:
    """The arguments with which the code itself makes a `name`, as far as they are constants or names of constants.

    Each is a value (None if it is neither), its source, and its rank: a name is not as sure as a constant.
    """

    def value_of(node: ast.expr) -> object:
        if isinstance(node, ast.Constant):
            return node.value
        key = getattr(node, "id", getattr(node, "attr", None))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
        values = [value for value, _ in said.get(key, ())] if isinstance(key, str) else []
        return values[0] if len(set(values)) == 1 else None

    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == name:
                given = dict(zip(parameters, node.args, strict=False))
                given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg in parameters}
                where = f"{name}(…) in {source.path.name}"
                ranks = {key: 2 if isinstance(value, ast.Constant) else 3 for key, value in given.items()}
                said_here = {key: (value_of(value), where, ranks[key]) for key, value in given.items()}
                open_ended = any(isinstance(a, ast.Starred) for a in node.args) or None in {
                    k.arg for k in node.keywords
                }
                omitted = {} if open_ended else {key: (OMITTED, where, 2) for key in parameters if key not in given}
                found.append(omitted | said_here)
    return found


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
    """What stands before the checkpoint's names in the module's own, `model.` in one that wraps another."""
    own = list(module.state_dict(keep_vars=True))
    if not own or any(name in tensors for name in own):
        return ""
    first = own[0].split(".")
    starts = (".".join(first[:depth]) + "." for depth in range(1, len(first)))
    return next((s for s in starts if all(n.startswith(s) for n in own) and own[0].removeprefix(s) in tensors), "")


@dataclass
class Solution:
    """Values under which a module has the checkpoint's shapes, or comes nearest to it."""

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
        """Changes one value at a time, then two, always to what is nearer to the checkpoint."""
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
        """With the surest statement back wherever the shapes allow it."""
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
