"""Facts: what a model computes beyond what its tensors show, each with its status and its source."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fledge.checkpoints.assembly import POSITIONS, QKV_ORDERS, SWAPS
from fledge.checkpoints.canonical import ACTIVATIONS, NORMS, PLACEMENTS, QK_NORMS, ROTATIONS
from fledge.cli import UserError


class Status(StrEnum):
    """How a fact is known: the tensors show it, evidence or somebody's word settles it, or it is assumed."""

    SHOWN = "shown"
    SETTLED = "settled"
    ASSUMED = "assumed"


TENSORS, CONFIG, KNOWN = "tensors", "checkpoint config", "layout"
DEFAULT, PRACTICE, GUESS = "layout default", "usual practice", "a guess"
STATUSES = {
    TENSORS: Status.SHOWN,
    CONFIG: Status.SETTLED,
    KNOWN: Status.SETTLED,
    **dict.fromkeys((DEFAULT, PRACTICE, GUESS), Status.ASSUMED),
}
"""Sources of facts before any evidence. A flag or a mapping is a source under its own name, and it settles its fact."""


@dataclass
class Fact:
    """Something the proof rests on. `source` says on whose word, or by which evidence; `detail` how surely."""

    name: str
    value: object
    status: Status
    source: str
    detail: str = ""

    @classmethod
    def of(cls, name: str, value: object, source: str) -> "Fact":
        """A fact with the status that its source gives it."""
        return cls(name, value, STATUSES.get(source, Status.SETTLED), source)

    @property
    def assumed(self) -> bool:
        return self.status is Status.ASSUMED

    @property
    def stated(self) -> bool:
        """Whether the user said so, in a flag or a mapping."""
        return self.source.startswith("--") and self.source not in ("--reference", "--probe_text", "--layout")

    def __str__(self) -> str:
        return f"{self.name} {self.value:.6g}" if isinstance(self.value, float) else f"{self.name} {self.value}"


CONFIG_KEYS = {
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead"),
    "activation": ("activation", "activation_function", "hidden_act"),
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
        "ctx",
    ),
}
CONFIG_ACTIVATIONS = {
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_tanh"), "gelu_tanh"),
    "relu": "relu",
    "relu2": "relu2",
    **dict.fromkeys(("silu", "swish"), "silu"),
}

BY_HEAD = re.compile(r"\.(query|key|value)\.(?:\{h\}|\d+)$")
OUTSIDE = {"token_embedding", "position_embedding", "embedding_norm", "final_norm", "head"}
INSIDE = {"norm_1", "qkv", "query", "key", "value", "output", "norm_2", "mlp_in", "mlp_gate", "mlp_out"}
INSIDE |= {"norm_1_after", "norm_2_after", "query_norm", "key_norm"}
SWITCHES = ("qkv_by_head", "causal", "parallel", "final_norm", "embedding_norm", "alibi", "qk_norm_after_rope")
SWITCHES += ("renormalise_experts", *SWAPS)
ALLOWED = {
    "activation": tuple(ACTIVATIONS),
    "norm": NORMS,
    "rope": ROTATIONS,
    "norm_placement": PLACEMENTS,
    "norm_offset": (0.0, 1.0),
    "rope_direction": (1, -1),
    "qk_norm": QK_NORMS,
    "qk_norm_type": NORMS,
    "qkv_order": QKV_ORDERS,
    "positions": POSITIONS,
    **dict.fromkeys(SWITCHES, (True, False)),
}
CAPS = ("attention_cap", "logit_cap", "window", "rope_width")
"""Numbers that a model may lack."""
TOLD = ("n_head", "activation", "attention_scale", "norm_eps", "norm", "rope", "rope_theta", "context_length")
TOLD += ("embedding_scale", "norm_placement", "norm_offset", "rope_direction", "qk_norm", "qk_norm_type")
TOLD += ("experts_per_token", "qkv_order", "positions", *CAPS, *SWITCHES)
"""The facts that flags and `--mapping` may state."""
WHOLE = ("n_head", "context_length", "window", "rope_width", "experts_per_token")
LARGEST = 1e12
"""No number that a fact can be is as large."""


def read_mapping(file: str) -> tuple[dict[str, str], dict[str, Fact]]:
    """Reads `--mapping FILE.yaml`: canonical module → source module (`{n}` a layer, `{h}` a head), and facts by name.

    Returns:
        source module → canonical module, and the facts.

    Raises:
        UserError: not a YAML mapping, or a key that is neither a role nor a fact.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--mapping {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date with 13 months, or 1000 brackets
        raise UserError(f"--mapping {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--mapping {file} holds a {type(content).__name__}, not `role: source` lines.")
    roles, facts = {}, {}
    for key, value in content.items():
        # Only queries, keys and values are saved by head.
        inside = re.fullmatch(r"blocks\.(?:\{n\}|\d+)\.(\w+)", re.sub(BY_HEAD, r".\1", str(key)))
        if key in TOLD and not (key in OUTSIDE and isinstance(value, str)):
            # YAML 1.1 takes 1e-5 for a word: it wants 1.0e-5.
            exponent = isinstance(value, str) and re.fullmatch(r"[\d.]+e[+-]?\d+", value)
            facts[key] = Fact.of(key, float(value) if exponent else value, "--mapping")
        elif isinstance(value, str) and (key in OUTSIDE or (inside and inside[1] in INSIDE)):
            if sorted(re.findall(r"\{[nh]\}", key)) != sorted(re.findall(r"\{[nh]\}", value)):
                raise UserError(
                    f"--mapping {file} says {key}: {value}; {{n}} and {{h}} stand once in both or in neither."
                )
            roles[value] = key
        else:
            raise UserError(
                f"--mapping {file} says {key}: {value}; a key is one of {', '.join(sorted(OUTSIDE))}, blocks.{{n}}. "
                f"and one of {', '.join(sorted(INSIDE))}, or one of the facts {', '.join(TOLD)}."
            )
    return roles, facts


def from_config(config: Mapping[str, object], name: str) -> object:
    """What the checkpoint's own config says about a fact, or None."""
    value = next((config[key] for key in CONFIG_KEYS[name] if key in config), None)
    if name == "activation":
        return CONFIG_ACTIVATIONS.get(str(value).lower())
    if name == "renormalise_experts":
        return value if isinstance(value, bool) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def check_fact(fact: Fact) -> object:
    """Its value, if it is one that the fact can have.

    Raises:
        UserError: it is none.
    """
    if fact.name in ALLOWED:
        if fact.value not in ALLOWED[fact.name]:
            choices = ", ".join(str(choice).lower() for choice in ALLOWED[fact.name])
            raise UserError(f"{fact.name} {fact.value} ({fact.source}) is unknown; choose one of {choices}.")
    else:
        if fact.value is None and fact.name in CAPS:
            return None
        whole = fact.name in WHOLE
        number = isinstance(fact.value, int if whole else (int, float)) and not isinstance(fact.value, bool)
        if not number or not (0 < fact.value < LARGEST or fact.source == GUESS):
            raise UserError(f"{fact.name} {fact.value} ({fact.source}) must be a positive {'whole ' * whole}number.")
        if not whole:
            fact.value = float(fact.value)
    return fact.value
