"""Which tensor plays which role, told from shapes and from the words in names, whatever the author called them.

The layer stack is the numbered part of the names that holds most tensors. Outside of it lie the embeddings, the final
norm and the head; inside, each layer holds two norms, the attention projections and the MLP. Words decide where shapes
cannot, and shapes win where both speak. What stays ambiguous is reported as a problem, never guessed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

ENDINGS = {
    **dict.fromkeys(("weight", "scale", "gamma", "gain", "alpha", "g", "a_2", "w"), "weight"),
    **dict.fromkeys(("bias", "shift", "beta", "offset", "b", "b_2"), "bias"),
}
POSITION = {"pos", "position", "positions", "positional", "wpe", "pe"}
EMBEDDING = {"emb", "embed", "embedding", "embeddings", "wte", "tok", "token", "tokens", "word", "words"}
HEAD = {"head", "output", "out", "logits", "unembed", "unembedding", "decoder", "generator", "classifier", "lm"}
HEAD |= {"proj", "projection", "vocab", "fc", "linear", "final", "to"}
PROJECTIONS = {
    **dict.fromkeys(("q", "query", "queries", "wq"), "query"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "key"),
    **dict.fromkeys(("v", "value", "values", "val", "wv"), "value"),
    **dict.fromkeys(("wqkv", "cattn", "inproj", "querykeyvalue"), "qkv"),
    **{"".join(order): "".join(order) for order in permutations("qkv")},
}
OUTPUT = {"o", "out", "output", "wo", "proj", "projection", "cproj", "dense"}
MLP_IN = {"in", "up", "expand", "fc", "cfc", "input", "hidden", "intermediate", "densehto4h"}
MLP_OUT = {"out", "down", "shrink", "contract", "proj", "cproj", "output", "dense4htoh"}
NORM_1 = {"a", "attn", "attention", "att", "sa", "mha", "input", "in", "pre", "first"}
NORM_2 = {"b", "mlp", "ff", "ffn", "ffwd", "feed", "forward", "feedforward", "post", "second"}


@dataclass
class Structure:
    """Roles by source name in canonical words (`blocks.0.query.weight`, one head of it: `blocks.0.query.3.weight`,
    fused projections: `blocks.0.qkv.weight` or in another order of the letters).

    `transposed` names the sources stored (in, out). In full sentences, `problems` says what could not be told and
    `refusals` which feature stands in the way that no target has.
    """

    roles: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


@dataclass
class Module:
    """One module of the source, with the names and shapes of what it holds under `weight` and `bias`."""

    path: str
    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes.get("weight", ())

    @property
    def words(self) -> list[str]:
        """Lower-case words of the path, the last first; of a spelling such as `c_attn`, also the joined word."""
        words = []
        for part in reversed(re.split(r"[./]", self.path)):
            pieces = [piece.lower() for piece in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
            words += dict.fromkeys([re.sub(r"[^a-z0-9]", "", part.lower()), *reversed(pieces)])
        return words

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", self.path)]

    def count(self, words: set[str]) -> int:
        return sum(word in words for word in self.words)

    @property
    def projection(self) -> str | None:
        return next((PROJECTIONS[word] for word in self.words if word in PROJECTIONS), None)


def detect(tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> Structure:
    """Gives each tensor a role; `named` fixes some of them beforehand (source module → canonical module)."""
    structure = Structure()
    _name_by_hand(structure, tensors, named)
    if structure.problems:
        return structure
    if tensors and structure.roles.keys() == tensors.keys():
        return structure
    outer, blocks = _modules(tensors)
    first = blocks[min(blocks)] if blocks else []
    sizes = Counter(module.shape[0] for module in first if len(module.shape) == 1)
    widths = [size for size, _ in sizes.most_common() if any(size in module.shape[-2:] for module in outer)]
    if not widths:
        structure.problems.append("No numbered layers with norms as wide as an embedding were found.")
        return structure
    _detect_outer(structure, tensors, outer, widths[0])
    for n, modules in sorted(blocks.items()):
        _detect_block(structure, n, modules, widths[0])
    unknown = [name for name in tensors if name not in structure.roles]
    if unknown and not structure.problems and not structure.refusals:
        structure.problems.append(f"{unknown[0]} has no role in a GPT ({len(unknown)} such tensors in all).")
    return structure


def _name_by_hand(structure: Structure, tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> None:
    """Resolves `layers.{n}.attn.q` → `blocks.{n}.query` for every tensor; `{h}` stands for a head."""
    for source, role in named.items():
        pattern = re.escape(source).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{h\}", r"(?P<h>\d+)")
        matches = {name: re.fullmatch(pattern, _split_ending(name)[0]) for name in tensors}
        if not any(matches.values()):
            structure.problems.append(f"No tensor is called {source}.weight or {source}.bias ({role} in the mapping).")
        for name, found in matches.items():
            if found:
                structure.roles[name] = f"{role.format(**found.groupdict())}.{_split_ending(name)[1]}"


def _modules(tensors: Mapping[str, Tensor]) -> tuple[list[Module], dict[int, list[Module]]]:
    """Modules outside the layer stack, and those of each layer by its number."""
    stack, outer, blocks = _layer_stack(tensors), {}, defaultdict(dict)
    for name, tensor in tensors.items():
        found = re.fullmatch(re.escape(stack) + r"(\d+)[./](.*)", name) if stack is not None else None
        path, kind = _split_ending(found[2] if found else name)
        module = (blocks[int(found[1])] if found else outer).setdefault(path, Module(path))
        module.names[kind] = name
        # A table of positions is often saved as (1, T, D) or (T, 1, D).
        module.shapes[kind] = tuple(tensor.shape if tensor.dim() < 3 else tensor.squeeze().shape)
    return list(outer.values()), {n: list(modules.values()) for n, modules in blocks.items()}


def _layer_stack(tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the layer number: the numbered part of the names that covers most of them."""
    suffixes = defaultdict(lambda: defaultdict(set))
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


def _split_ending(name: str) -> tuple[str, str]:
    path, _, last = name.replace("/", ".").rpartition(".")
    if last in ENDINGS and path:
        return path, ENDINGS[last]
    for ending in ("weight", "bias"):
        if name.endswith(f"_{ending}"):  # nn.MultiheadAttention: in_proj_weight
            return name.removesuffix(f"_{ending}"), ending
    return name, "weight"


def _assign(structure: Structure, module: Module, role: str) -> None:
    for kind, name in module.names.items():
        structure.roles.setdefault(name, f"{role}.{kind}")


def _open(structure: Structure, modules: list[Module]) -> list[Module]:
    """The modules that `--mapping` has not named."""
    return [module for module in modules if not set(module.names.values()) <= structure.roles.keys()]


def _taken(structure: Structure, prefix: str = "") -> set[str]:
    return {role.removeprefix(prefix).split(".")[0] for role in structure.roles.values() if role.startswith(prefix)}


def _listed(modules: list[Module]) -> str:
    return ", ".join(next(iter(module.names.values())) for module in modules)


def _detect_outer(structure: Structure, tensors: Mapping[str, Tensor], modules: list[Module], width: int) -> None:
    problems, taken, modules = structure.problems, _taken(structure), _open(structure, modules)
    matrices = [module for module in modules if len(module.shape) == 2 and width in module.shape]
    positions = [module for module in matrices if module.count(POSITION)]
    tables = [module for module in matrices if module not in positions]
    rows = Counter(_rows(module, width) for module in tables)
    if len(tables) == 3 and not positions and sorted(rows.values()) == [1, 2]:
        positions = [module for module in tables if rows[_rows(module, width)] == 1]
        tables = [module for module in tables if module not in positions]
    if "position_embedding" not in taken and positions:
        _assign(structure, positions.pop(0), "position_embedding")
    if "token_embedding" not in taken and tables:
        # A name like embed_out speaks of both; it is the head if the other one speaks of it less.
        tables.sort(key=lambda module: module.count(HEAD) - module.count(EMBEDDING))
        said = [module.count(HEAD) - module.count(EMBEDDING) for module in tables]
        same = len(tables) == 2 and torch.equal(*(tensors[module.names["weight"]] for module in tables))
        if len(tables) > 1 and said[0] == said[1] and not same:
            problems.append(f"{_listed(tables[:2])}: which is the token embedding and which the head?")
        _assign(structure, tables.pop(0), "token_embedding")
    if "head" not in taken and tables:
        head = tables.pop()
        _assign(structure, head, "head")
        if head.shape[0] == width != head.shape[1]:
            structure.transposed.add(head.names["weight"])
    if positions or tables:
        problems.append(f"{_listed(positions + tables)}: one embedding more than a GPT has.")

    for module in modules:  # of a tied head, safetensors keeps the bias alone
        if module.names.keys() == {"bias"} and module.count(HEAD):
            structure.roles[module.names["bias"]] = "head.bias"
    norms = [module for module in modules if module.shape == (width,)]
    if "final_norm" in taken:
        return
    if len(norms) > 1:
        norms.sort(key=lambda module: module.count(EMBEDDING | {"in", "input", "pre"}))
        structure.refusals.append(f"{_listed(norms[1:])}: a norm besides the final one, which no target has.")
    if norms:
        _assign(structure, norms[0], "final_norm")
    else:
        structure.refusals.append(
            "There is no final norm: the last block goes into the head as it is, as in post-norm models, and every "
            "target normalises there."
        )


def _rows(module: Module, width: int) -> int:
    return module.shape[1] if module.shape[0] == width else module.shape[0]


def _detect_block(structure: Structure, n: int, modules: list[Module], width: int) -> None:
    problems, block = structure.problems, f"blocks.{n}"
    taken, modules = _taken(structure, f"{block}."), _open(structure, modules)
    norms = [module for module in modules if len(module.shape) == 1]
    matrices = [module for module in modules if len(module.shape) == 2]
    if not {"norm_1", "norm_2"} & taken:
        _detect_norms(structure, block, norms, width)

    projections = [module for module in matrices if module.projection and module.projection not in taken]
    alike = Counter(module.projection for module in projections)
    for module in projections:
        # heads.3.key: the last number in the path of a projection counts the heads. It does not in 0.key, which is
        # the attention of ModuleList([attention, mlp]).
        counted = alike[module.projection] > 1 or module.count({"head", "heads"})
        head = f".{module.numbers[-1]}" if counted and re.search(r"[./]\d+([./]|$)", f".{module.path}") else ""
        _assign(structure, module, f"{block}.{module.projection}{head}")
    if not projections and not taken & set(PROJECTIONS.values()):
        fused = [module for module in matrices if sorted(module.shape) == [width, 3 * width]]
        if len(fused) != 1:
            problems.append(f"Layer {n} has no tensor that is known as query, key and value.")
            return
        _assign(structure, fused[0], f"{block}.qkv")
        projections = fused
    rest = [module for module in matrices if module not in projections]

    if "output" not in taken:
        output = _attention_output(problems, projections, rest)
        if output is not None:
            _assign(structure, output, f"{block}.output")
            rest.remove(output)
    mlp = [module for module in rest if not module.count(POSITION)]
    if len(mlp) < len(rest):
        extra = [module for module in rest if module not in mlp]
        structure.refusals.append(f"{_listed(extra)}: an embedding inside a layer, which no target has.")
    transposed = _stored_in_out(projections, mlp, width)
    if not {"mlp_in", "mlp_out"} & taken:
        _detect_mlp(structure, block, mlp, width, transposed)
    if transposed:
        structure.transposed |= {module.names["weight"] for module in matrices}


def _detect_norms(structure: Structure, block: str, norms: list[Module], width: int) -> None:
    if slopes := [module for module in norms if module.count({"slopes", "alibi"})]:
        structure.refusals.append(f"{_listed(slopes)}: ALiBi adds a bias to attention scores, which no target does.")
        return
    if other := [module for module in norms if module.shape != (width,)]:
        structure.refusals.append(f"{_listed(other)}: a norm inside the attention, which no target has.")
        return
    if len(norms) != 2:
        why = {1: ": attention and MLP side by side (parallel blocks)", 4: ": one before and one after each part"}
        structure.refusals.append(
            f"{block} has {len(norms)} norms and a pre-norm block two{why.get(len(norms), '')} ({_listed(norms)})."
        )
        return
    # post_attention_layernorm speaks of both, input_layernorm only of the first: what counts is who says more.
    first, second = sorted(norms, key=_norm_order)
    if _norm_order(first) == _norm_order(second):
        structure.problems.append(f"{_listed(norms)}: which norm comes before the attention?")
    _assign(structure, first, f"{block}.norm_1")
    _assign(structure, second, f"{block}.norm_2")


def _norm_order(module: Module) -> tuple[int, list[int]]:
    return module.count(NORM_2) - module.count(NORM_1), module.numbers


def _attention_output(problems: list[str], projections: list[Module], rest: list[Module]) -> Module | None:
    """The output projection among the matrices that are no q/k/v: it is square, and an MLP as wide as the model too."""
    square = [module for module in rest if module.shape[0] == module.shape[1]]
    if len(rest) - len(square) < 2:
        homes = {module.path.split(".")[0] for module in projections if "." in module.path}
        beside = [module for module in square if module.path.split(".")[0] in homes]
        if 0 < len(beside) < len(rest):
            square = beside
        elif len(rest) == 2:
            square = []
        else:
            square = [module for module in square if module.count(OUTPUT) and not module.count(MLP_IN)]
    if len(square) > 1:
        problems.append(f"{_listed(square)}: which is the attention's output projection?")
    return square[0] if square else None


def _stored_in_out(projections: list[Module], mlp: list[Module], width: int) -> bool:
    """Whether a layer stores its matrices as (in, out), as GPT-2's Conv1D does, and not as nn.Linear's (out, in).

    A bias is as long as the output, and fused projections are three widths long on the output's side. Where neither
    tells, the MLP does if the words of its names are clear.
    """
    for module in [*projections, *mlp]:
        rows, columns = module.shape
        if rows != columns and "bias" in module.shapes:
            return module.shapes["bias"] == (columns,)
    for module in projections:
        if sorted(module.shape) == [width, 3 * width]:
            return module.shape[0] == width
    wide = [module for module in mlp if module.shape[0] != module.shape[1]]
    if len(wide) < 2:
        return False
    first, *_, last = sorted(wide, key=_mlp_order)
    return _mlp_order(first) < _mlp_order(last) and first.shape[0] == width != last.shape[0]


def _mlp_order(module: Module) -> tuple[int, list[int]]:
    return module.count(MLP_OUT) - module.count(MLP_IN), module.numbers


def _detect_mlp(structure: Structure, block: str, mlp: list[Module], width: int, transposed: bool) -> None:
    if len(mlp) not in (2, 3):
        structure.problems.append(f"{block} has {len(mlp)} matrices besides the attention's, and an MLP two or three.")
        return
    opening = [module for module in mlp if module.shape[not transposed] == width != module.shape[transposed]]
    if len(opening) == len(mlp) - 1:
        closing = next(module for module in mlp if module not in opening)
    elif len(mlp) == 2:  # as wide as the model, so that only names tell
        opening, closing = [min(mlp, key=_mlp_order)], max(mlp, key=_mlp_order)
        if _mlp_order(opening[0]) == _mlp_order(closing):
            structure.problems.append(f"{_listed(mlp)}: which is the MLP's first matrix?")
    else:
        structure.problems.append(f"{_listed(mlp)}: which of them leads back to the model's width?")
        return
    _assign(structure, closing, f"{block}.mlp_out")
    if len(opening) == 2:
        # LLaMA's w1 and w3, fc1 and fc2: without a word, the gate has the lower number.
        gate, up = sorted(opening, key=lambda module: (not module.count({"gate", "gating"}), module.numbers))
        if not gate.count({"gate", "gating"}) and gate.numbers == up.numbers:
            structure.problems.append(f"{_listed(opening)}: which of them is the MLP's gate?")
        _assign(structure, gate, f"{block}.mlp_gate")
        opening = [up]
    _assign(structure, opening[0], f"{block}.mlp_in")
