"""What newer research code adds to a GPT's residual stream, recognised by the names of nanochat (2026).

Their shapes show nothing, so other names need `--mapping`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fledge.errors import UserError

ENDS = {
    "resid_lambdas": "residual_lambdas",
    "x0_lambdas": "first_lambdas",
    "v0_lambdas": "value_lambdas",
    "smear_gate": "smear_gate",
    "smear_lambda": "smear_lambda",
    "backout_lambda": "backout_lambda",
}
IN_BLOCKS = {r"value_embeds\.(\d+)": "value_embedding", r"\w+\.(?:\w+\.)?(\d+)\.attn\.ve_gate": "value_gate"}


def mixing_roles(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Source name → canonical name, of what is told; nothing if value embeddings are not those of their own layers."""
    roles = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        for pattern, role in [*ENDS.items(), *IN_BLOCKS.items()]:
            if found := re.fullmatch(rf"(?:transformer\.)?{pattern}", module):
                roles[name] = f"blocks.{found[1]}.{role}.weight" if pattern in IN_BLOCKS else f"{role}.weight"
    layers = {
        part: {role for role in roles.values() if role.endswith(f".{part}.weight")} for part in IN_BLOCKS.values()
    }
    gates = {role.replace("value_gate", "value_embedding") for role in layers["value_gate"]}
    # Others give several layers one embedding, and number the embeddings.
    own = "value_lambdas.weight" in roles.values() if not gates else layers["value_embedding"] == gates
    return roles if own or not layers["value_embedding"] else {}


def by_block(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers for all layers (L,) as two of each layer: of the stream and of its beginning, of value and embedding.

    Raises:
        UserError: numbers for another count of layers than there are.
    """
    tensors = dict(tensors)
    layers = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.query", name))}
    one = torch.ones(len(layers))
    stream, first, value = (
        tensors.pop(f"{name}.weight", None) for name in ("residual_lambdas", "first_lambdas", "value_lambdas")
    )
    pairs = {}
    if stream is not None or first is not None:
        pairs["residual_lambdas"] = one if stream is None else stream, 0 * one if first is None else first
    if value is not None:
        pairs["value_lambdas"] = one, value
    for role, both in pairs.items():
        if any(numbers.shape != one.shape for numbers in both):
            raise UserError(
                f"The {role.replace('_', ' ')} have the shape {tuple(both[-1].shape)}, for {len(one)} layers."
            )
        for n in sorted(layers):
            tensors[f"blocks.{n}.{role}.weight"] = torch.stack([both[0][n].float(), both[1][n].float()])
    return tensors
