"""How a layer stores its matrices: (out, in) as nn.Linear does, or (in, out) as GPT-2's Conv1D does."""

from collections.abc import Mapping

from fledge.checkpoints.modules import Module
from fledge.checkpoints.words import MLP_IN, MLP_OUT, PROJECTIONS

WRITING = frozenset({"output", "mlp_out"})
"""Roles whose matrices write the model's width."""
ORIENTED = WRITING | {*PROJECTIONS.values(), "mlp_in", "mlp_gate", "mlp_gate_in"}
"""Roles that one matrix of a layer has, and which may be stored either way."""


def stored_in_out(modules: list[Module], roles: Mapping[str, str], width: int) -> set[str]:
    """The names of a layer's matrices that are stored (in, out).

    Args:
        modules: the matrices of its attention and its MLP.
        roles: source name → role, such as `query`; matrices of the MLP may have none yet.
        width: the model's.

    A matrix with a role shows by its shape on which side the width is, and an MLP by its biases or names. A square
    matrix shows nothing: it is taken to be stored as the others of its kind (weights of modules, which are all stored
    alike, or bare parameters), and a bare one without others as `x @ w` reads it.
    """
    found = set()
    for bare in (False, True):
        alike = [module for module in modules if is_bare(module) == bare]
        mlp = [module for module in alike if module.name not in roles]
        sides = {
            module.name: (module.shape[1] == width) == (roles[module.name] in WRITING)
            for module in alike
            if module not in mlp and module.shape[0] != module.shape[1]
        }
        usual = _biases_show_in_out(mlp)
        if usual is None:  # the shape of a projection is surer than the words of an MLP
            usual = next(iter(sides.values()), None)
        if usual is None:
            usual = _words_show_in_out(mlp, width)
        usual = bare if usual is None else usual
        found |= {module.names["weight"] for module in alike if (sides.get(module.name, usual) if bare else usual)}
    return found


def is_bare(module: Module) -> bool:
    """Whether a matrix is a parameter with a name of its own, and not the weight of a module such as nn.Linear."""
    return not module.names["weight"].endswith("weight")


def _biases_show_in_out(mlp: list[Module]) -> bool | None:
    """Whether an MLP is stored (in, out), by a bias, which is as long as the output; None if it has none."""
    wide = [module for module in mlp if module.shape[0] != module.shape[1] and "bias" in module.shapes]
    return wide[0].shapes["bias"] == (wide[0].shape[1],) if wide else None


def _words_show_in_out(mlp: list[Module], width: int) -> bool | None:
    """Whether an MLP is stored (in, out): its first matrix by the names leads out of the width; None if unsaid."""
    wide = [module for module in mlp if module.shape[0] != module.shape[1]]
    if len(wide) < 2:
        return None
    first, *_, last = sorted(wide, key=order_in_mlp)
    return first.shape[0] == width != last.shape[0] if order_in_mlp(first) < order_in_mlp(last) else None


def head_is_stored_in_out(head: Module, width: int) -> bool:
    return len(head.shape) == 2 and head.shape[0] == width != head.shape[1]


def order_in_mlp(module: Module) -> tuple[int, list[int]]:
    """A sort key: the first matrix of an MLP comes before the last, by its words and then by its numbers."""
    return module.count(MLP_OUT) - module.count(MLP_IN), module.numbers
