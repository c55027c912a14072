"""How a layer stores its matrices: (out, in) as nn.Linear does, or (in, out) as GPT-2's Conv1D does."""

from fledge.checkpoints.modules import Module
from fledge.checkpoints.words import MLP_IN, MLP_OUT


def stored_in_out(projections: list[Module], mlp: list[Module], width: int) -> bool:
    """Whether a layer stores its matrices as (in, out).

    Three things tell, in this order: a bias is as long as the output; the output of fused projections is three widths
    long; and the MLP's first matrix, where the words of its names say which one that is, leads out of the width.
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
    first, *_, last = sorted(wide, key=order_in_mlp)
    return order_in_mlp(first) < order_in_mlp(last) and first.shape[0] == width != last.shape[0]


def head_is_stored_in_out(head: Module, width: int) -> bool:
    return len(head.shape) == 2 and head.shape[0] == width != head.shape[1]


def order_in_mlp(module: Module) -> tuple[int, list[int]]:
    """A sort key: the first matrix of an MLP comes before the last, by its words and then by its numbers."""
    return module.count(MLP_OUT) - module.count(MLP_IN), module.numbers
