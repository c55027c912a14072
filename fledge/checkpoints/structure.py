"""The structure of a checkpoint: which tensor plays which role, and how matrices are stored."""

from dataclasses import dataclass, field

from fledge.checkpoints.modules import Module

SWAPS = {
    "ends_order": ("token_embedding", "head"),
    "norm_order": ("norm_1", "norm_2"),
    "mlp_order": ("mlp_in", "mlp_out"),
    "gate_order": ("mlp_gate", "mlp_in"),
}
"""Facts that say which of two tensors of one shape is which."""
SQUARES: dict[str, tuple[str, ...]] = {
    "qkv_in_out": ("query", "key", "value"),
    "output_in_out": ("output",),
    "mlp_in_out": ("mlp_gate", "mlp_in", "mlp_out"),
}
"""Facts that say whether square matrices, whose shape does not show it, are stored (in, out), and of which roles."""


@dataclass
class Structure:
    """The roles of a checkpoint's tensors, as far as they are known.

    `roles` maps the source's names to canonical ones: `blocks.0.query.weight`, or `blocks.0.query.3.weight` for one
    head of it, or `blocks.0.qkv.weight` for a fused projection, whose letters stand in the order of its rows.

    `transposed` holds the source's names that are stored (in, out), and `oriented` those that are known to be stored
    (out, in) before anything is guessed. `proposed` holds what only the order of definition
    tells, by the name of the fact: `qkv_order` or a key of `SWAPS`. `problems` says in sentences which roles could not
    be told, and `refusals` which feature of the source the canonical GPT does not have.
    """

    roles: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    oriented: frozenset[str] = frozenset()
    proposed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def assign(self, module: Module, role: str) -> None:
        """Gives a module's tensors a role; those that have one keep it."""
        for kind, name in module.names.items():
            self.roles.setdefault(name, f"{role}.{kind}")

    def without_role(self, modules: list[Module]) -> list[Module]:
        return [module for module in modules if not {*module.names.values()} <= self.roles.keys()]

    def taken(self, place: str = "") -> set[str]:
        """The roles that are given at the ends of the model, or in a place such as `blocks.0.`."""
        return {role.removeprefix(place).split(".")[0] for role in self.roles.values() if role.startswith(place)}
