"""One layer: its norms, the projections of its attention, and then the MLP."""

import re
from collections import Counter, defaultdict

from fledge.checkpoints.guessing.ends import assign_slopes
from fledge.checkpoints.guessing.mlp import guess_experts, guess_mlp
from fledge.checkpoints.modules import Module, listed
from fledge.checkpoints.orientation import ORIENTED, stored_in_out
from fledge.checkpoints.structure import Structure
from fledge.checkpoints.words import AFTER, EXPERT, MLP, MLP_IN, NORM, NORM_1, NORM_2, OUTPUT, POSITION, PROJECTIONS

PARTS_OF = {"query": "q", "key": "k", "value": "v"}


def guess_block(structure: Structure, n: int, modules: list[Module], width: int) -> None:
    """Gives the modules of layer `n` their roles."""
    block = f"blocks.{n}"
    taken = structure.taken(f"{block}.")
    modules = assign_slopes(structure, structure.without_role(modules))
    if len(attentions := _attentions(modules)) > 1:
        structure.refusals.append(
            f"Layer {n} has {len(attentions)} attentions ({', '.join(attentions)}), and a GPT's has one; a decoder "
            "that also reads the output of an encoder, as nn.TransformerDecoderLayer does, is no GPT."
        )
        return
    _guess_vectors(structure, block, modules, width)
    matrices = [module for module in modules if len(module.shape) == 2]
    # pos_ffn is the MLP that works on each position.
    if extra := [module for module in matrices if module.count(POSITION) and not module.count(MLP)]:
        structure.refusals.append(f"{listed(extra)}: an embedding inside a layer, which no class of transformers has.")
    matrices = [module for module in matrices if module not in extra]

    projections = _guess_projections(structure, block, matrices, width)
    if projections is None:
        structure.problems.append(f"Layer {n} has no tensor that is known as query, key and value.")
        return
    rest = guess_experts(structure, block, [module for module in matrices if module not in projections], width)
    if "output" not in taken and (output := _attention_output(structure, projections, rest, width)):
        structure.assign(output, f"{block}.output")
        rest.remove(output)
    roles = {module.name: structure.roles[module.name].split(".")[2] for module in matrices if module not in rest}
    unknown = [module for module in matrices if module in rest or roles[module.name] in ORIENTED]
    transposed = stored_in_out([module for module in unknown if module.name not in structure.oriented], roles, width)
    only_experts = f"{block}.router.weight" in structure.roles.values() and not rest
    if not {"mlp_in", "mlp_out"} & taken and not only_experts:
        guess_mlp(structure, block, rest, width, bool(transposed & {module.names["weight"] for module in rest}))
    structure.transposed |= transposed


def _attentions(modules: list[Module]) -> list[str]:
    """The places in a layer that hold a query, a key and a value each; numbers of heads do not count as places."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        if len(module.shape) == 2 and module.projection:
            home = module.path.replace("/", ".").rpartition(".")[0]
            found[re.sub(r"(^|\.)\d+(?=\.|$)", "", home)] |= {*PARTS_OF.get(module.projection, "qkv")}
    return [home for home, letters in found.items() if letters == {*"qkv"}]


def _guess_vectors(structure: Structure, block: str, modules: list[Module], width: int) -> None:
    """The norms of queries and keys, by their words, and the norms of the block."""
    taken = structure.taken(f"{block}.")
    vectors = [module for module in modules if len(module.shape) == 1]
    inner = [module for module in vectors if module.projection in ("query", "key")]
    for module in inner:
        structure.assign(module, f"{block}.{module.projection}_norm")
    norms = [module for module in vectors if module not in inner]
    named = [module for module in norms if module.count(NORM)]
    gains = [module for module in norms if module not in named and module.shape == (width,)]
    if len(named) == len(gains) == 2:  # LayerScale
        first, second = sorted(gains, key=_norm_order)
        if _norm_order(first) == _norm_order(second):
            structure.problems.append(f"{listed(gains)}: which of them scales what attention gives?")
        structure.assign(first, f"{block}.attention_gain")
        structure.assign(second, f"{block}.mlp_gain")
        norms = named
    if not {"norm_1", "norm_2"} & taken:
        _guess_norms(structure, block, norms, width)


def _guess_norms(structure: Structure, block: str, norms: list[Module], width: int) -> None:
    """One norm, two (before attention and MLP), or four (before and after each)."""
    if other := [module for module in norms if module.shape != (width,)]:
        structure.problems.append(f"{listed(other)}: a vector that is not as wide as the model, with no role in a GPT.")
    elif len(norms) == 1:
        structure.assign(norms[0], f"{block}.norm_1")
    elif len(norms) == 2:
        first, second = sorted(norms, key=_norm_order)
        if _norm_order(first) == _norm_order(second):
            structure.proposed.add("norm_order")
        structure.assign(first, f"{block}.norm_1")
        structure.assign(second, f"{block}.norm_2")
    elif len(norms) == 4:
        if any(module.count(MLP) for module in norms):
            norms = sorted(norms, key=lambda module: (bool(module.count(MLP)), module.count(AFTER)))
        for role, module in zip(("norm_1", "norm_1_after", "norm_2", "norm_2_after"), norms, strict=True):
            structure.assign(module, f"{block}.{role}")
    elif norms:
        structure.problems.append(f"{block} has {len(norms)} norms, and a block one, two or four ({listed(norms)}).")


def _norm_order(module: Module) -> tuple[int, list[int]]:
    """A sort key: the norm of the attention comes before that of the MLP.

    post_attention_layernorm has words of both and input_layernorm only of the first, so that the difference counts.
    """
    return module.count(NORM_2) - module.count(NORM_1), module.numbers


def _guess_projections(structure: Structure, block: str, matrices: list[Module], width: int) -> list[Module] | None:
    """The matrices of query, key and value: by words, by a fused shape, by order; None if nothing tells."""
    taken = structure.taken(f"{block}.")
    projections = [module for module in matrices if module.projection and module.projection not in taken]
    projections = [module for module in projections if not module.count(EXPERT)]
    alike = Counter(module.projection for module in projections)
    for module in projections:
        # heads.3.key: the last number in the path of a projection counts the heads. It does not in 0.key, which is
        # the attention of ModuleList([attention, mlp]).
        counted = alike[module.projection] > 1 or module.count({"head", "heads"})
        is_numbered = re.search(r"[./]\d+([./]|$)", f".{module.path}")
        head = f".{module.numbers[-1]}" if counted and is_numbered else ""
        structure.assign(module, f"{block}.{module.projection}{head}")
    if projections or taken & {*PROJECTIONS.values()}:
        return projections
    fused = [module for module in matrices if sorted(module.shape) == [width, 3 * width]]
    if len(fused) == 1:
        structure.assign(fused[0], f"{block}.qkv")
        return fused
    return _propose_projections(structure, block, matrices, width)


def _propose_projections(structure: Structure, block: str, matrices: list[Module], width: int) -> list[Module] | None:
    """Takes three matrices of one shape for query, key and value in their order of definition; None without such."""
    groups = _first_three(matrices, width)
    if groups is None:
        return None
    structure.proposed.add("qkv_order")
    for part, modules in zip(("query", "key", "value"), groups, strict=True):
        for h, module in enumerate(modules):
            structure.assign(module, f"{block}.{part}.{h}" if len(modules) > 1 else f"{block}.{part}")
    return [module for modules in groups for module in modules]


def _first_three(matrices: list[Module], width: int) -> list[list[Module]] | None:
    """The first three matrices of one shape that stand in one place, or three such of every head, as defined."""
    places: defaultdict[tuple, defaultdict[str, list[Module]]] = defaultdict(lambda: defaultdict(list))
    for module in matrices:
        home, _, name = module.path.replace("/", ".").rpartition(".")
        by_head = re.fullmatch(r"(.*?)\.?(\d+)", home) if module.shape[0] < width == module.shape[1] else None
        place, name = (by_head[1], name) if by_head else (home, module.path)
        places[place, module.shape][name].append(module)
    for (_, shape), found in places.items():
        groups = list(found.values())
        square = shape == (width, width) and len(groups) in (3, 4) and all(len(group) == 1 for group in groups)
        heads = shape[0] * len(groups[0]) == width and len(groups) == 3 and len({len(group) for group in groups}) == 1
        if square or heads:
            return groups[:3]
    return None


def _attention_output(structure: Structure, projections: list[Module], rest: list[Module], width: int) -> Module | None:
    """The output projection among the matrices that are not query, key or value, or None.

    It is square, unless the heads together are not as wide as the model. If the MLP is as wide as the model, its
    matrices are square too: then the one beside the projections is taken, or the one whose words say so.
    """
    square = [module for module in rest if module.shape[0] == module.shape[1]]
    homes = {module.path.split(".")[0] for module in projections if "." in module.path}
    if not square and len(rest) > 2 and (heads := _width_of_heads(projections, width)):
        fitting = [module for module in rest if sorted(module.shape) == sorted((heads, width))]
        beside = [module for module in fitting if module.path.split(".")[0] in homes]
        said = [module for module in fitting if module.count(OUTPUT) and not module.count(MLP_IN)]
        return next((found[0] for found in (beside, said, fitting) if len(found) == 1), None)
    if len(rest) - len(square) < 2:
        beside = [module for module in square if module.path.split(".")[0] in homes]
        if 0 < len(beside) < len(rest):
            square = beside
        elif len(rest) == 2:
            square = []
        else:
            square = [module for module in square if module.count(OUTPUT) and not module.count(MLP_IN)]
    if len(square) > 1:
        structure.problems.append(f"{listed(square)}: which is the attention's output projection?")
    return square[0] if square else None


def _width_of_heads(projections: list[Module], width: int) -> int | None:
    """How wide the queries of all heads are together; None if nothing shows it."""
    queries = [module for module in projections if module.projection == "query" or len(module.projection or "") == 3]
    sides = [max(module.shape, key=lambda side: side != width) for module in queries if len(module.shape) == 2]
    fused = any(module.projection != "query" for module in queries)
    return (sum(sides) // 3 if fused else sum(sides)) or None
