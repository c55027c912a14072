"""Gives each tensor of a checkpoint its role: named by the user, or by a known layout, or else guessed."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from fledge.checkpoints.guessing import guess_roles
from fledge.checkpoints.known_layouts import LAYOUTS, pattern_of
from fledge.checkpoints.mixing import mixing_roles
from fledge.checkpoints.modules import layer_stack, modules_of, split_ending
from fledge.checkpoints.orientation import ORIENTED, head_is_stored_in_out, stored_in_out
from fledge.checkpoints.structure import SWAPS, Structure


def detect(
    tensors: Mapping[str, Tensor], named: Mapping[str, str], oriented: frozenset[str] = frozenset()
) -> Structure:
    """Gives each tensor a role; `named` fixes some of them beforehand (source module → canonical module).

    Those that are `oriented` are stored (out, in), whatever the others of their layer are.
    """
    mixing = {} if named else mixing_roles(tensors)
    structure = _detect({name: tensor for name, tensor in tensors.items() if name not in mixing}, named, oriented)
    structure.roles |= mixing
    return structure


def _detect(tensors: Mapping[str, Tensor], named: Mapping[str, str], oriented: frozenset[str]) -> Structure:
    structure = name_by_hand(tensors, named)
    structure.oriented = oriented
    if structure.problems:
        return structure
    if tensors and structure.roles.keys() == tensors.keys():
        _orient(structure, tensors)
        return structure
    if not named and (known := name_by_layout(tensors)):
        return known
    return guess_roles(tensors, structure)


def name_by_hand(tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> Structure:
    """Resolves `layers.{n}.attn.q` → `blocks.{n}.query` for every tensor; `{h}` stands for a head."""
    structure = Structure()
    for source, role in named.items():
        pattern = pattern_of(source)
        matches = {name: pattern.fullmatch(split_ending(name)[0]) for name in tensors}
        if not any(matches.values()):
            structure.problems.append(f"No tensor is called {source}.weight or {source}.bias ({role} in the mapping).")
        for name, found in matches.items():
            if found:
                structure.roles[name] = f"{role.format(**found.groupdict())}.{split_ending(name)[1]}"
    return structure


def name_by_layout(tensors: Mapping[str, Tensor]) -> Structure | None:
    """The roles by the table of a known layout that has every name, or None if there is none.

    If a layer lacks its attention or its MLP it is None too, because `guessing` says what is missing.
    """
    for layout in LAYOUTS.values():
        if (roles := layout.roles(tensors)) and _is_whole(roles):
            structure = Structure(roles)
            given = {role.split(".")[-2] for role in roles.values()}
            structure.proposed = {fact for fact in layout.by_order if {*SWAPS[fact]} <= given}
            _orient(structure, tensors)
            return structure
    return None


def _is_whole(roles: Mapping[str, str]) -> bool:
    layers = defaultdict(set)
    for role in roles.values():
        if role.startswith("blocks."):
            _, n, part, *_ = role.split(".")
            layers[n].add(part)
    return bool(layers) and all(
        parts & {"query", "qkv"} and ({"mlp_in", "mlp_out"} <= parts or "experts" in parts) for parts in layers.values()
    )


def _orient(structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Notes which matrices are stored (in, out); the names of a layout do not tell."""
    outer, blocks = modules_of(tensors, layer_stack(tensors))
    embedding = next((name for name, role in structure.roles.items() if role == "token_embedding.weight"), None)
    width = tensors[embedding].shape[-1] if embedding and tensors[embedding].dim() == 2 else 0
    for module in outer:
        if structure.roles[module.name] == "head.weight" and head_is_stored_in_out(module, width):
            structure.transposed.add(module.name)
    for modules in blocks.values():
        parts = {module.name: structure.roles[module.name].split(".")[2] for module in modules}
        matrices = [module for module in modules if len(module.shape) == 2 and parts[module.name] in ORIENTED]
        structure.transposed |= stored_in_out(matrices, parts, width) - structure.oriented
