"""Which tensor plays which role, told from shapes and from the words in names, whatever the author called them.

The layer stack is the numbered part of the names that holds most tensors. Outside of it lie the embeddings, the final
norm and the head; inside, each layer holds its norms, the attention projections and the MLP. Words decide where shapes
cannot, and shapes win where both speak. Where neither tells, the order of definition proposes, and what it proposed is
an open question. What stays ambiguous is reported as a problem, never guessed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.checkpoints.modules import (
    EMBEDDING,
    POSITION,
    PROJECTIONS,
    Module,
    layer_stack,
    modules_of,
    prefixes,
    split_ending,
)

HEAD = {"head", "output", "out", "logits", "unembed", "unembedding", "decoder", "generator", "classifier", "lm"}
HEAD |= {"proj", "projection", "vocab", "fc", "linear", "final", "to"}
OUTPUT = {"o", "out", "output", "wo", "proj", "projection", "cproj", "dense", "unify", "unifyheads"}
MLP_IN = {"in", "up", "expand", "fc", "cfc", "input", "hidden", "intermediate", "densehto4h"}
MLP_OUT = {"out", "down", "shrink", "contract", "proj", "cproj", "output", "dense4htoh"}
MLP = {"mlp", "ff", "ffn", "ffwd", "feed", "forward", "feedforward"}
NORM_1 = {"a", "attn", "attention", "att", "sa", "mha", "input", "in", "pre", "first"}
NORM_2 = {"b", "post", "second"} | MLP
GATE = {"gate", "gating"}
EXPERT = {"expert", "experts"}
SLOPES = {"slopes", "alibi"}
ROUTER = {"router", "gate", "gating", "switch"}
FOREIGN = {
    **dict.fromkeys(("lambda", "lambdas"), "learned weights of the residual stream"),
    **dict.fromkeys(("ve", "valueembeds", "valueembed"), "value embeddings"),
    "smear": "a mix of each token with the one before it",
}
"""What newer research code has and no role here stands for."""


@dataclass
class Structure:
    """Roles by source name in canonical words (`blocks.0.query.weight`, one head of it: `blocks.0.query.3.weight`,
    fused projections: `blocks.0.qkv.weight` or in another order of the letters).

    `transposed` names the sources stored (in, out). `proposed` holds what only the order of definition tells, by the
    name of the fact: `qkv_order` or one of `SWAPS`. In full sentences, `problems` says what could not be told and
    `refusals` which feature stands in the way that the canonical GPT does not have.
    """

    roles: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    proposed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


SWAPS = {
    "ends_order": ("token_embedding", "head"),
    "norm_order": ("norm_1", "norm_2"),
    "mlp_order": ("mlp_in", "mlp_out"),
    "gate_order": ("mlp_gate", "mlp_in"),
}
"""Facts that say which of two tensors of one shape is which."""


def detect(tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> Structure:
    """Gives each tensor a role; `named` fixes some of them beforehand (source module → canonical module)."""
    structure = _detect(tensors, named, layer_stack(tensors), numbered=True)
    if structure.problems and not named:
        # A single layer may have no number; then what is numbered are heads, or the steps of an MLP.
        for prefix in prefixes(tensors):
            single = _detect(tensors, named, prefix, numbered=False)
            if not single.problems and not single.refusals:
                return single
    return structure


def _detect(tensors: Mapping[str, Tensor], named: Mapping[str, str], stack: str | None, numbered: bool) -> Structure:
    structure = Structure()
    _name_by_hand(structure, tensors, named)
    if structure.problems or (tensors and structure.roles.keys() == tensors.keys()):
        return structure
    outer, blocks = modules_of(tensors, stack, numbered)
    for module in [*outer, *(module for modules in blocks.values() for module in modules)]:
        if foreign := next((FOREIGN[word] for word in module.words if word in FOREIGN), None):
            structure.refusals.append(f"{_listed([module])}: {foreign}, which no class of transformers has.")
    if structure.refusals:
        return structure
    width = _width(structure, outer, blocks)
    if width is None:
        structure.problems.append("No numbered layers with norms as wide as an embedding were found.")
        return structure
    first = [next(iter(module.names.values())) for modules in blocks.values() for module in modules][:1]
    _detect_outer(structure, tensors, outer, width, [*tensors].index(first[0]))
    for n, modules in sorted(blocks.items()):
        _detect_block(structure, n, modules, width)
    unknown = [name for name in tensors if name not in structure.roles]
    if unknown and not structure.problems and not structure.refusals:
        structure.problems.append(f"{unknown[0]} has no role in a GPT ({len(unknown)} such tensors in all).")
    return structure


def _width(structure: Structure, outer: list[Module], blocks: Mapping[int, list[Module]]) -> int | None:
    """The model's width: that of the norms, or, where they have no weights, what embeddings and layers share most."""
    first = blocks[min(blocks)] if blocks else []
    vectors = Counter(module.shape[0] for module in first if len(module.shape) == 1)
    sides = Counter(side for module in first for side in module.shape if len(module.shape) == 2)
    for sizes in (vectors, sides):
        widths = [size for size, _ in sizes.most_common() if any(size in module.shape[-2:] for module in outer)]
        if widths:
            return widths[0]
    return None


def _name_by_hand(structure: Structure, tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> None:
    """Resolves `layers.{n}.attn.q` → `blocks.{n}.query` for every tensor; `{h}` stands for a head."""
    for source, role in named.items():
        pattern = re.escape(source).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{h\}", r"(?P<h>\d+)")
        matches = {name: re.fullmatch(pattern, split_ending(name)[0]) for name in tensors}
        if not any(matches.values()):
            structure.problems.append(f"No tensor is called {source}.weight or {source}.bias ({role} in the mapping).")
        for name, found in matches.items():
            if found:
                structure.roles[name] = f"{role.format(**found.groupdict())}.{split_ending(name)[1]}"


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


def _detect_outer(
    structure: Structure, tensors: Mapping[str, Tensor], modules: list[Module], width: int, before: int
) -> None:
    """The ends of the model; `before` is how many tensors stand before the first layer's."""
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
        tables.sort(key=_ends_order)
        said = [_ends_order(module) for module in tables]
        same = len(tables) == 2 and torch.equal(*(tensors[module.names["weight"]] for module in tables))
        if len(tables) == 2 and said[0] == said[1] and not same:
            structure.proposed.add("ends_order")
        elif len(tables) > 2 and said[0] == said[1]:
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
    norms = [module for module in modules if module.shape == (width,) and not module.count(SLOPES)]
    _assign_slopes(structure, [module for module in modules if module.count(SLOPES)])
    if "final_norm" in taken or not norms:
        return
    order = [*tensors]
    early = [m for m in norms if m.count(EMBEDDING | {"in", "input", "pre"}) and _says_norm(m)]  # in_f is ln_f too
    early = early or [m for m in norms if len(norms) > 1 and order.index(next(iter(m.names.values()))) < before]
    late = [module for module in norms if module not in early]
    for role, found in (("embedding_norm", early), ("final_norm", late)):
        if len(found) > 1:
            structure.problems.append(f"{_listed(found)}: which of them is the final norm?")
        elif found and (role == "final_norm" or _says_norm(found[0])):
            _assign(structure, found[0], role)


def _says_norm(module: Module) -> bool:
    return any("norm" in word or word.startswith("ln") for word in module.words)


def _ends_order(module: Module) -> tuple[int, bool]:
    return module.count(HEAD) - module.count(EMBEDDING), "bias" in module.names


def _assign_slopes(structure: Structure, modules: list[Module]) -> None:
    """ALiBi's slopes, which are often saved in every layer."""
    for module in modules:
        structure.roles |= dict.fromkeys(module.names.values(), "alibi.slopes")


def _rows(module: Module, width: int) -> int:
    return module.shape[1] if module.shape[0] == width else module.shape[0]


def _detect_block(structure: Structure, n: int, modules: list[Module], width: int) -> None:
    block = f"blocks.{n}"
    taken, modules = _taken(structure, f"{block}."), _open(structure, modules)
    slopes = [module for module in modules if module.count(SLOPES)]
    _assign_slopes(structure, slopes)
    vectors = [module for module in modules if len(module.shape) == 1 and module not in slopes]
    inner = [module for module in vectors if module.projection in ("query", "key")]
    for module in inner:
        _assign(structure, module, f"{block}.{module.projection}_norm")
    if not {"norm_1", "norm_2"} & taken:
        _detect_norms(structure, block, [module for module in vectors if module not in inner], width)
    matrices = [module for module in modules if len(module.shape) == 2]
    if extra := [module for module in matrices if module.count(POSITION)]:
        structure.refusals.append(f"{_listed(extra)}: an embedding inside a layer, which no class of transformers has.")
    matrices = [module for module in matrices if module not in extra]

    projections = _detect_projections(structure, block, n, matrices, width)
    if projections is None:
        return
    rest = [module for module in matrices if module not in projections]
    rest = _detect_experts(structure, block, rest, width)
    if "output" not in taken:
        output = _attention_output(structure.problems, projections, rest)
        if output is not None:
            _assign(structure, output, f"{block}.output")
            rest.remove(output)
    transposed = _stored_in_out(projections, rest, width)
    if not {"mlp_in", "mlp_out"} & taken and not (f"{block}.router.weight" in structure.roles.values() and not rest):
        _detect_mlp(structure, block, rest, width, transposed)
    if transposed:
        structure.transposed |= {module.names["weight"] for module in matrices}


def _detect_projections(
    structure: Structure, block: str, n: int, matrices: list[Module], width: int
) -> list[Module] | None:
    """The matrices of query, key and value, by their words, else by their shapes; None if neither tells."""
    taken = _taken(structure, f"{block}.")
    projections = [module for module in matrices if module.projection and module.projection not in taken]
    projections = [module for module in projections if not module.count(EXPERT)]
    alike = Counter(module.projection for module in projections)
    for module in projections:
        # heads.3.key: the last number in the path of a projection counts the heads. It does not in 0.key, which is
        # the attention of ModuleList([attention, mlp]).
        counted = alike[module.projection] > 1 or module.count({"head", "heads"})
        head = f".{module.numbers[-1]}" if counted and re.search(r"[./]\d+([./]|$)", f".{module.path}") else ""
        _assign(structure, module, f"{block}.{module.projection}{head}")
    if projections or taken & set(PROJECTIONS.values()):
        return projections
    fused = [module for module in matrices if sorted(module.shape) == [width, 3 * width]]
    if len(fused) == 1:
        _assign(structure, fused[0], f"{block}.qkv")
        return fused
    if proposed := _in_order(matrices, width):
        structure.proposed.add("qkv_order")
        for part, modules in zip(("query", "key", "value"), proposed, strict=True):
            for h, module in enumerate(modules):
                _assign(structure, module, f"{block}.{part}.{h}" if len(modules) > 1 else f"{block}.{part}")
        return [module for modules in proposed for module in modules]
    structure.problems.append(f"Layer {n} has no tensor that is known as query, key and value.")
    return None


def _in_order(matrices: list[Module], width: int) -> list[list[Module]] | None:
    """The first three matrices of one shape that stand in one place, or three such of every head, as defined."""
    places = defaultdict(list)
    for module in matrices:
        home, _, name = module.path.replace("/", ".").rpartition(".")
        by_head = re.fullmatch(r"(.*?)\.?(\d+)", home) if module.shape[0] < width == module.shape[1] else None
        places[by_head[1] if by_head else home, module.shape].append((name if by_head else module.path, module))
    for (_, shape), found in places.items():
        groups = defaultdict(list)
        for name, module in found:
            groups[name].append(module)
        groups = list(groups.values())
        square = shape == (width, width) and len(groups) in (3, 4) and all(len(group) == 1 for group in groups)
        heads = shape[0] * len(groups[0]) == width and len(groups) == 3 and len({len(group) for group in groups}) == 1
        if square or heads:
            return groups[:3]
    return None


def _detect_experts(structure: Structure, block: str, rest: list[Module], width: int) -> list[Module]:
    """Experts, what they share, and the router among matrices that are no attention's. Returns the other ones."""
    experts = [module for module in rest if module.count(EXPERT) and module.numbers and not module.count({"shared"})]
    if not experts:
        return rest
    shared = [module for module in rest if module.count({"shared"}) and width in module.shape and 1 not in module.shape]
    gates = [module for module in rest if module.count({"shared"}) and 1 in module.shape]
    for module in gates:
        _assign(structure, module, f"{block}.shared_gate")
    by_number = defaultdict(list)
    for module in experts:
        after = re.search(r"experts?\D*(\d+)", module.path)
        by_number[int(after[1]) if after else module.numbers[0]].append(module)
    for e, modules in by_number.items():
        _detect_mlp(structure, f"{block}.experts.{e}", modules, width, transposed=False)
    if shared:
        _detect_mlp(structure, f"{block}.shared", shared, width, transposed=False)
    rest = [module for module in rest if module not in (*experts, *shared, *gates)]
    routers = [module for module in rest if module.shape == (len(by_number), width)]
    routers = [module for module in routers if module.count(ROUTER)] or routers
    if len(routers) != 1:
        structure.problems.append(f"{block} has {len(by_number)} experts and {len(routers)} routers for them.")
        return rest
    _assign(structure, routers[0], f"{block}.router")
    return [module for module in rest if module is not routers[0]]


def _detect_norms(structure: Structure, block: str, norms: list[Module], width: int) -> None:
    if other := [module for module in norms if module.shape != (width,)]:
        structure.problems.append(
            f"{_listed(other)}: a vector that is not as wide as the model, with no role in a GPT."
        )
    elif len(norms) == 1:
        _assign(structure, norms[0], f"{block}.norm_1")
    elif len(norms) == 2:
        # post_attention_layernorm speaks of both, input_layernorm only of the first: what counts is who says more.
        first, second = sorted(norms, key=_norm_order)
        if _norm_order(first) == _norm_order(second):
            structure.proposed.add("norm_order")
        _assign(structure, first, f"{block}.norm_1")
        _assign(structure, second, f"{block}.norm_2")
    elif len(norms) == 4:
        in_order = sorted(norms, key=lambda module: (bool(module.count(MLP)), module.count({"post", "after"})))
        in_order = norms if not any(module.count(MLP) for module in norms) else in_order
        for role, module in zip(("norm_1", "norm_1_after", "norm_2", "norm_2_after"), in_order, strict=True):
            _assign(structure, module, f"{block}.{role}")
    elif norms:
        structure.problems.append(f"{block} has {len(norms)} norms, and a block one, two or four ({_listed(norms)}).")


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


def _detect_mlp(structure: Structure, place: str, mlp: list[Module], width: int, transposed: bool) -> None:
    """The matrices of one MLP: two, three with a gate, or a single square one."""
    if len(mlp) == 1 and mlp[0].shape == (width, width):
        _assign(structure, mlp[0], f"{place}.mlp_in")
        return
    if len(mlp) not in (2, 3):
        structure.problems.append(f"{place} has {len(mlp)} matrices besides the attention's, and an MLP two or three.")
        return
    opening = [module for module in mlp if module.shape[not transposed] == width != module.shape[transposed]]
    if len(opening) == len(mlp) - 1:
        closing = next(module for module in mlp if module not in opening)
    elif len(mlp) == 2:  # as wide as the model, so that only names tell
        opening, closing = [min(mlp, key=_mlp_order)], max(reversed(mlp), key=_mlp_order)
        if _mlp_order(opening[0]) == _mlp_order(closing):
            structure.proposed.add("mlp_order")
    elif len(closing := [module for module in mlp if module.count(MLP_OUT)]) == 1:
        closing = closing[0]
        opening = [module for module in mlp if module is not closing]
    else:
        structure.problems.append(f"{_listed(mlp)}: which of them leads back to the model's width?")
        return
    _assign(structure, closing, f"{place}.mlp_out")
    if len(opening) == 2:
        # LLaMA's w1 and w3, fc1 and fc2: without a word, the gate has the lower number.
        gate, up = sorted(opening, key=lambda module: (not module.count(GATE), module.numbers))
        if not gate.count(GATE):
            structure.proposed.add("gate_order")
        _assign(structure, gate, f"{place}.mlp_gate")
        opening = [up]
    _assign(structure, opening[0], f"{place}.mlp_in")
