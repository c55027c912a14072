"""Facts: what a model computes beyond what its tensors show, each with its status and its source."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeGuard

from fledge.checkpoints.assembly import POSITIONS, QKV_ORDERS
from fledge.checkpoints.canonical import ACTIVATIONS, NORMS, PLACEMENTS, QK_NORMS, ROTATIONS, SCALED, SPANS
from fledge.checkpoints.structure import SQUARES, SWAPS
from fledge.errors import UserError


class Status(StrEnum):
    """How a fact is known: shown by the tensors, settled by evidence or by a statement, or assumed."""

    SHOWN = "shown"
    SETTLED = "settled"
    ASSUMED = "assumed"


class Source(StrEnum):
    """The source of a fact: what shows or states it, or why it is assumed. The value is its name in reports."""

    # Shown by the checkpoint.
    TENSORS = "tensors"
    NAMES = "names of tensors"
    NO_NAMES = "no layout has these names"
    # Stated by the user.
    FLAG = "a flag"
    MAPPING = "--mapping"
    LAYOUT_FLAG = "--layout"
    # Settled by what is known of the checkpoint.
    CONFIG = "checkpoint config"
    PICKLED = "attribute of the pickled module"
    AUTHORS = "every known author"
    TORCH_ATTENTION = "nn.MultiheadAttention"
    TORCH_NORM = "names of nn.LayerNorm"
    ALIKE = "the other weights of its layer"
    # Settled by evidence.
    REFERENCE = "--reference"
    PROBE_TEXT = "--probe_text"
    NO_EFFECT = "no effect"
    UNTOLD = "usual practice, which the text does not contradict"
    # Assumed until evidence settles it.
    DEFAULT = "layout default"
    PRACTICE = "usual practice"
    GUESS = "a guess"


STATUSES = {
    Source.TENSORS: Status.SHOWN,
    Source.NAMES: Status.SHOWN,
    Source.NO_NAMES: Status.SHOWN,
    Source.DEFAULT: Status.ASSUMED,
    Source.PRACTICE: Status.ASSUMED,
    Source.GUESS: Status.ASSUMED,
}
"""The status of a fact by its source, before any evidence; every other source settles its fact."""


@dataclass
class Fact:
    """A fact that the proof rests on.

    `source` says who states it or which evidence settles it, and `detail` how certain that is. `layout` is the layout
    whose authors the source `AUTHORS` means.
    """

    name: str
    value: Any
    status: Status
    source: Source
    detail: str = ""
    layout: str = ""

    @classmethod
    def of(cls, name: str, value: Any, source: Source) -> "Fact":
        """A fact with the status that its source gives it."""
        return cls(name, value, STATUSES.get(source, Status.SETTLED), source)

    def settle(self, source: Source, detail: str = "") -> None:
        """Records the evidence that settles the fact."""
        self.status, self.source, self.detail = Status.SETTLED, source, detail

    @property
    def assumed(self) -> bool:
        return self.status is Status.ASSUMED

    @property
    def stated(self) -> bool:
        """Whether the user said so, in a flag or a mapping."""
        return self.source in (Source.FLAG, Source.MAPPING)

    @property
    def said_by(self) -> str:
        """The source as reports name it: `--n_head`, `every known author of nanogpt`."""
        if self.source is Source.FLAG:
            return f"--{self.name}"
        return f"{self.source} of {self.layout}" if self.source is Source.AUTHORS else str(self.source)

    def as_dict(self) -> dict[str, object]:
        """The fact as `conversion.json` holds it."""
        return {
            "name": self.name,
            "value": self.value,
            "status": self.status,
            "source": self.said_by,
            "detail": self.detail,
        }

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name} none"
        return f"{self.name} {self.value:.6g}" if isinstance(self.value, float) else f"{self.name} {self.value}"


CONFIG_KEYS = {
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead"),
    "activation": ("activation", "activation_function", "hidden_act"),
    "norm_placement": ("norm_placement",),
    "norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "eps"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token", "n_expert_per_token", "top_k", "topk"),
    "renormalise_experts": ("norm_topk_prob",),
    "rope_theta": ("rope_theta", "rope_base"),
    "context_length": (
        "context_length",
        "max_seq_len",
        "max_seqlen",
        "block_size",
        "n_positions",
        "max_position_embeddings",
        "max_len",
        "sequence_len",
        "sequence_length",
        "seq_len",
        "max_seq_length",
        "max_sequence_length",
        "n_ctx",
        "ctx",
        "ctx_len",
        "context",
        "context_size",
        "context_window",
    ),
}
CONFIG_ACTIVATIONS = {
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_tanh"), "gelu_tanh"),
    "relu": "relu",
    "relu2": "relu2",
    **dict.fromkeys(("silu", "swish"), "silu"),
}

SWITCHES: tuple[str, ...] = (
    "qkv_by_head",
    "causal",
    "parallel",
    "final_norm",
    "embedding_norm",
    "alibi",
    "qk_norm_after_rope",
)
SWITCHES += ("renormalise_experts", "norm_unbiased", "norm_eps_outside", *SWAPS, *SQUARES)
ALLOWED = {
    "activation": tuple(ACTIVATIONS),
    "norm": NORMS,
    "rope": ROTATIONS,
    "norm_placement": PLACEMENTS,
    "norm_offset": (0.0, 1.0),
    "rope_direction": (1, -1),
    "rope_span": SPANS,
    "residual_scaled": SCALED,
    "qk_norm": QK_NORMS,
    "qk_norm_type": NORMS,
    "qkv_order": QKV_ORDERS,
    "positions": POSITIONS,
    **dict.fromkeys(SWITCHES, (True, False)),
}
CAPS = ("attention_cap", "logit_cap", "window", "rope_width", "final_norm_eps", "qk_norm_eps", "window_pattern")
"""Numeric facts that may be absent: None is a value too."""
TOLD: tuple[str, ...] = (
    "n_head",
    "activation",
    "attention_scale",
    "norm_eps",
    "norm",
    "rope",
    "rope_theta",
    "context_length",
)
TOLD += ("embedding_scale", "norm_placement", "norm_offset", "rope_direction", "qk_norm", "qk_norm_type")
TOLD += (
    "residual_scale",
    "residual_scaled",
    "logit_scale",
    "position_offset",
    "rope_span",
    "value_gate_factor",
    "backout_layer",
    "experts_per_token",
    "qkv_order",
    "positions",
    *CAPS,
    *SWITCHES,
)
"""The facts that flags and `--mapping` may state."""
WHOLE = ("n_head", "context_length", "window", "rope_width", "experts_per_token", "backout_layer", "position_offset")
"""Facts with a whole number."""
LARGEST = 1e12
"""Every number that a fact can have is smaller."""


def config_key(config: Mapping[str, object], name: str) -> str | None:
    """The key under which a config says a fact."""
    return next((key for key in CONFIG_KEYS[name] if key in config), None)


def from_config(config: Mapping[str, object], name: str) -> object:
    """The value of a fact in the checkpoint's own config, or None."""
    value = config.get(config_key(config, name) or "")
    if name == "activation":
        return CONFIG_ACTIVATIONS.get(str(value).lower())
    if name == "norm_placement":
        return value if value in PLACEMENTS else None
    if name == "renormalise_experts":
        return value if isinstance(value, bool) else None
    return value if _is_number(value, (int, float)) else None


def check_fact(fact: Fact) -> Any:
    """Returns the fact's value if the fact can have it; a number is made a float unless it must be whole.

    Raises:
        UserError: the fact cannot have this value.
    """
    if fact.name in ALLOWED:
        if fact.value not in ALLOWED[fact.name]:
            allowed = ", ".join(str(value).lower() for value in ALLOWED[fact.name])
            raise UserError(f"{fact.name} {fact.value} ({fact.said_by}) is unknown; choose one of {allowed}.")
        return fact.value
    if fact.value is None and fact.name in CAPS:
        return None
    if fact.name == "window_pattern":
        if not re.fullmatch("[SL]+", str(fact.value)):
            raise UserError(f"window_pattern {fact.value} ({fact.said_by}) must be a letter S or L for each block.")
        return fact.value
    whole = fact.name in WHOLE
    least = -1 if fact.name in ("backout_layer", "position_offset") else 0  # blocks and rows are counted from 0
    in_range = _is_number(fact.value, int if whole else (int, float)) and least < fact.value < LARGEST
    # A guessed context length of 0 means that nothing says how long it is.
    if not in_range and not (fact.source is Source.GUESS and fact.value == 0):
        raise UserError(f"{fact.name} {fact.value} ({fact.said_by}) must be a positive {'whole ' * whole}number.")
    if not whole:
        fact.value = float(fact.value)
    return fact.value


def _is_number(value: object, kind: type | tuple[type, ...]) -> TypeGuard[float]:
    return isinstance(value, kind) and not isinstance(value, bool)
