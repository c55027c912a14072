"""The MLP of a layer, or its experts with their router."""

import re
from collections import defaultdict

from fledge.checkpoints.modules import Module, listed
from fledge.checkpoints.orientation import order_in_mlp
from fledge.checkpoints.structure import Structure
from fledge.checkpoints.words import EXPERT, GATE, MLP_OUT, ROUTER, SHARED


def guess_mlp(structure: Structure, place: str, mlp: list[Module], width: int, transposed: bool) -> None:
    """Gives the matrices of one MLP their roles: two, three with a gate, or a single square one.

    A gate may be half of the first of two matrices, which then has twice the rows that the second one reads.
    """
    if len(mlp) == 1 and mlp[0].shape == (width, width):
        structure.assign(mlp[0], f"{place}.mlp_in")
        return
    if len(mlp) not in (2, 3):
        structure.problems.append(f"{place} has {len(mlp)} matrices besides the attention's, and an MLP two or three.")
        return
    closing = _closing(structure, mlp, width, transposed)
    if closing is None:
        structure.problems.append(f"{listed(mlp)}: which of them leads back to the model's width?")
        return
    structure.assign(closing, f"{place}.mlp_out")
    opening = [module for module in mlp if module is not closing]
    outputs, inputs = (1, 0) if transposed else (0, 1)
    if len(opening) == 1 and opening[0].shape[outputs] == 2 * closing.shape[inputs]:
        structure.assign(opening[0], f"{place}.mlp_gate_in")
        structure.proposed.add("gate_order")
        return
    if len(opening) == 2:
        # LLaMA's w1 and w3, fc1 and fc2: without a word, the gate has the lower number.
        opening.sort(key=lambda module: (not module.count(GATE), module.numbers))
        gate = opening.pop(0)
        if not gate.count(GATE):
            structure.proposed.add("gate_order")
        structure.assign(gate, f"{place}.mlp_gate")
    structure.assign(opening[0], f"{place}.mlp_in")


def _closing(structure: Structure, mlp: list[Module], width: int, transposed: bool) -> Module | None:
    """The matrix that leads back to the model's width: by its shape, or by words if the MLP is as wide as the model."""
    inputs, outputs = (0, 1) if transposed else (1, 0)
    opening = [module for module in mlp if module.shape[inputs] == width != module.shape[outputs]]
    if len(opening) == len(mlp) - 1:
        return next(module for module in mlp if module not in opening)
    if len(mlp) == 2:
        first, last = min(mlp, key=order_in_mlp), max(reversed(mlp), key=order_in_mlp)
        if order_in_mlp(first) == order_in_mlp(last):
            structure.proposed.add("mlp_order")
        return last
    said = [module for module in mlp if module.count(MLP_OUT)]
    return said[0] if len(said) == 1 else None


def guess_experts(structure: Structure, block: str, rest: list[Module], width: int) -> list[Module]:
    """Gives the experts, a shared expert and the router their roles; returns the matrices that are none of them."""
    experts = [module for module in rest if module.count(EXPERT) and module.numbers and not module.count(SHARED)]
    if not experts:
        return rest
    beside = [module for module in rest if module.count(SHARED)]
    gates = [module for module in beside if 1 in module.shape]
    shared = [module for module in beside if width in module.shape and module not in gates]
    for module in gates:
        structure.assign(module, f"{block}.shared_gate")
    by_number = defaultdict(list)
    for module in experts:
        after = re.search(r"experts?\D*(\d+)", module.path)
        by_number[int(after[1]) if after else module.numbers[0]].append(module)
    for e, modules in by_number.items():
        guess_mlp(structure, f"{block}.experts.{e}", modules, width, transposed=False)
    if shared:
        guess_mlp(structure, f"{block}.shared", shared, width, transposed=False)
    rest = [module for module in rest if module not in (*experts, *shared, *gates)]
    routers = [module for module in rest if module.shape == (len(by_number), width)]
    routers = [module for module in routers if module.count(ROUTER)] or routers
    if len(routers) != 1:
        structure.problems.append(f"{block} has {len(by_number)} experts and {len(routers)} routers for them.")
        return rest
    structure.assign(routers[0], f"{block}.router")
    return [module for module in rest if module is not routers[0]]
