"""The ends of the model: token embedding, positions, head, and the norms outside of the layers."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from fledge.checkpoints.modules import Module, listed
from fledge.checkpoints.orientation import head_is_stored_in_out
from fledge.checkpoints.structure import Structure
from fledge.checkpoints.words import EARLY, EMBEDDING, HEAD, POSITION, SLOPES


def guess_ends(
    structure: Structure, tensors: Mapping[str, Tensor], modules: list[Module], width: int, before: list[str]
) -> None:
    """Gives the modules outside of the layers their roles; `before` names the tensors that precede the first layer."""
    modules = structure.without_role(modules)
    _guess_matrices(structure, tensors, modules, width)
    for module in modules:  # safetensors keeps only the bias of a tied head
        if module.names.keys() == {"bias"} and module.count(HEAD):
            structure.roles[module.names["bias"]] = "head.bias"
    assign_slopes(structure, modules)
    norms = [module for module in modules if module.shape == (width,) and not module.count(SLOPES)]
    if norms and "final_norm" not in structure.taken():
        _guess_norms(structure, norms, before)


def assign_slopes(structure: Structure, modules: list[Module]) -> list[Module]:
    """Gives ALiBi's slopes their role, which are often saved in every layer; returns the other modules."""
    slopes = [module for module in modules if module.count(SLOPES)]
    for module in slopes:
        structure.roles |= dict.fromkeys(module.names.values(), "alibi.slopes")
    return [module for module in modules if module not in slopes]


def _guess_matrices(structure: Structure, tensors: Mapping[str, Tensor], modules: list[Module], width: int) -> None:
    taken = structure.taken()
    matrices = [module for module in modules if len(module.shape) == 2 and width in module.shape]
    positions, tables = _positions(matrices, width)
    if "position_embedding" not in taken and positions:
        structure.assign(positions.pop(0), "position_embedding")
    if "token_embedding" not in taken and tables:
        tables.sort(key=_ends_order)
        _check_ends(structure, tensors, tables)
        structure.assign(tables.pop(0), "token_embedding")
    if "head" not in taken and tables:
        head = tables.pop()
        structure.assign(head, "head")
        if head_is_stored_in_out(head, width):
            structure.transposed.add(head.names["weight"])
    if positions or tables:
        structure.problems.append(f"{listed(positions + tables)}: one embedding more than a GPT has.")


def _positions(matrices: list[Module], width: int) -> tuple[list[Module], list[Module]]:
    """Tables of positions and the other matrices: by their words, or one of three that has another number of rows."""
    positions = [module for module in matrices if module.count(POSITION)]
    tables = [module for module in matrices if module not in positions]
    rows = Counter(_rows(module, width) for module in tables)
    if len(tables) == 3 and not positions and sorted(rows.values()) == [1, 2]:
        positions = [module for module in tables if rows[_rows(module, width)] == 1]
        tables = [module for module in tables if module not in positions]
    return positions, tables


def _rows(module: Module, width: int) -> int:
    return module.shape[1] if module.shape[0] == width else module.shape[0]


def _ends_order(module: Module) -> tuple[int, bool]:
    """A sort key: the token embedding comes before the head.

    A name like embed_out has words of both, and is the head if the other name has fewer words of the head.
    """
    return module.count(HEAD) - module.count(EMBEDDING), "bias" in module.names


def _check_ends(structure: Structure, tensors: Mapping[str, Tensor], tables: list[Module]) -> None:
    """Notes that words do not tell the token embedding from the head, unless both are the same matrix."""
    if len(tables) < 2 or _ends_order(tables[0]) != _ends_order(tables[1]):
        return
    if len(tables) > 2:
        structure.problems.append(f"{listed(tables[:2])}: which is the token embedding and which the head?")
    elif not torch.equal(*(tensors[module.names["weight"]] for module in tables)):
        structure.proposed.add("ends_order")


def _guess_norms(structure: Structure, norms: list[Module], before: list[str]) -> None:
    """Assigns the norms: that of the embeddings says so or precedes the layers; the other is the final norm."""
    early = [module for module in norms if module.count(EARLY) and _says_norm(module)]  # in_f may be ln_f too
    early = early or [module for module in norms if len(norms) > 1 and module.name in before]
    late = [module for module in norms if module not in early]
    for role, found in (("embedding_norm", early), ("final_norm", late)):
        if len(found) > 1:
            structure.problems.append(f"{listed(found)}: which of them is the final norm?")
        elif found and (role == "final_norm" or _says_norm(found[0])):
            structure.assign(found[0], role)


def _says_norm(module: Module) -> bool:
    return any("norm" in word or word.startswith("ln") for word in module.words)
