"""Roles guessed from shapes and from the words in names, for a layout that nobody listed.

1. The layers are the numbered part of the names that holds most tensors (`modules`). If no roles come of that, the
   model may have a single layer without a number, and every prefix is tried as its name.
2. The width is the size that the layers' norms and an embedding share.
3. Outside the layers lie the embeddings, the final norm and the head (`ends`).
4. Each layer holds its norms, the attention projections and the MLP or the experts (`block`, `mlp`).

Shapes win over words: words decide only between tensors that the shapes cannot tell apart. If neither tells, the order
of definition proposes a role, and the proposal becomes an open fact (`Structure.proposed`) that evidence must settle.
What stays ambiguous is reported as a problem.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fledge.checkpoints.guessing.block import guess_block
from fledge.checkpoints.guessing.ends import guess_ends
from fledge.checkpoints.modules import Module, layer_stack, listed, modules_of, prefixes
from fledge.checkpoints.structure import Structure
from fledge.checkpoints.words import FOREIGN, SLOPES

LORA = re.compile(r"(^|[._])lora([._]|$)", re.IGNORECASE)


def guess_roles(tensors: Mapping[str, Tensor], named: Structure) -> Structure:
    """Gives a role to each tensor that has none in `named`, which stays as it is."""
    structure = _guess(tensors, named, layer_stack(tensors), numbered=True)
    if structure.problems and not named.roles:
        # A single layer may have no number; then what is numbered are heads, or the steps of an MLP.
        for prefix in prefixes(tensors):
            single = _guess(tensors, named, prefix, numbered=False)
            if not single.problems and not single.refusals:
                return single
    return structure


def _guess(tensors: Mapping[str, Tensor], named: Structure, stack: str | None, numbered: bool) -> Structure:
    structure = copy.deepcopy(named)
    if adapter := next((name for name in tensors if LORA.search(name) and name not in structure.roles), None):
        structure.refusals.append(
            f"{adapter}: a LoRA adapter, which changes the matrix beside it; merge it first (W + scale · B A; peft has "
            "merge_and_unload), and convert the merged weights."
        )
        return structure
    outer, blocks = modules_of(tensors, stack, numbered)
    blocks = _in_pairs(blocks)
    inner = [module for modules in blocks.values() for module in modules]
    for module in [*outer, *inner]:
        if foreign := next((FOREIGN[word] for word in module.words if word in FOREIGN), None):
            structure.refusals.append(f"{listed([module])}: {foreign}, which is known by nanochat's names alone.")
    for name, tensor in tensors.items():
        if tensor.numel() == 1 and name not in structure.roles and not Module(name).count(SLOPES):
            structure.refusals.append(
                f"{name}: one learned number, as a tanh in place of a norm has (DyT) or a weight of the residual "
                "stream, and no class of transformers has such a number."
            )
    if structure.refusals:
        return structure
    width = _width(outer, blocks)
    if width is None:
        first = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:4])
        problem = "No numbered layers with norms as wide as an embedding were found."
        structure.problems.append(f"{problem} The first tensors are {first}." if first else problem)
        return structure
    names = [*tensors]
    before = names[: names.index(inner[0].name)]
    guess_ends(structure, tensors, outer, width, before)
    for n, modules in sorted(blocks.items()):
        guess_block(structure, n, modules, width)
    unknown = [name for name in tensors if name not in structure.roles]
    if unknown and not structure.problems and not structure.refusals:
        structure.problems.append(f"{unknown[0]} has no role in a GPT ({len(unknown)} such tensors in all).")
    return structure


def _in_pairs(blocks: dict[int, list[Module]]) -> dict[int, list[Module]]:
    """The layers, where attention and MLP are numbered by themselves, two of these in each."""
    matrices = [[module for module in blocks[n] if len(module.shape) == 2] for n in sorted(blocks)]
    attends = [any(module.projection for module in layer) for layer in matrices]
    others = [sum(not module.projection for module in layer) for layer in matrices]
    pairs = len(blocks) // 2
    if not pairs or attends != [True, False] * pairs or max(others[::2]) > 1:  # one is the output
        return blocks
    parts = zip(sorted(blocks), ("attention", "mlp") * pairs, strict=True)
    halves = [[replace(module, path=f"{part}.{module.path}") for module in blocks[n]] for n, part in parts]
    return {n: halves[2 * n] + halves[2 * n + 1] for n in range(pairs)}


def _width(outer: list[Module], blocks: Mapping[int, list[Module]]) -> int | None:
    """The model's width: that of the norms, or, where they have no weights, what embeddings and layers share most."""
    first = blocks[min(blocks)] if blocks else []
    vectors = Counter(module.shape[0] for module in first if len(module.shape) == 1)
    sides = Counter(side for module in first for side in module.shape if len(module.shape) == 2)
    for sizes in (vectors, sides):
        widths = [size for size, _ in sizes.most_common() if any(size in module.shape[-2:] for module in outer)]
        if widths:
            return widths[0]
    return None
