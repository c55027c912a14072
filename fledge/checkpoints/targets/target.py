"""What a class of transformers is, for the conversion: its features, the names of its modules, and its config."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.targets.needs import biased

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
QKV = ("query", "key", "value")
ATTENTION = frozenset({*QKV, "output"})
MLP = frozenset({"mlp_in", "mlp_gate", "mlp_out"})
NORMS = frozenset({"norm_1", "norm_2", "final_norm"})

Config = dict[str, Any]
Names = dict[str | tuple[str, ...], str]
"""The module of each role; {n} is the layer. Several roles under one name are stacked."""

USUAL = frozenset({"pre-norm blocks", "final norm", "weights in norms", "embeddings without a norm"})
PLAIN = frozenset({"attention without a norm of queries and keys"})
ROPE_RMS = frozenset({"rotary positions", "RMSNorm"})
QK_RMS = frozenset({"RMSNorm of each head's queries and keys", "weights in a norm of queries and keys"})
OWN_HEADS = frozenset({"heads of another width than the model's share"})
WINDOW = frozenset({"sliding window"})
WINDOWS = WINDOW | {"sliding window in some of its blocks"}


@dataclass(frozen=True)
class Target:
    """A class of transformers."""

    config: Callable[[CanonicalGPT, Config], PreTrainedConfig]
    """Makes the config from the model and from the keys that every config has (vocabulary, token ids, tied head)."""

    names: Names

    holds: frozenset[str]
    """What the class has, in the words of `needs`."""

    always: frozenset[str] = frozenset()
    """The roles that have a bias in any case."""

    grouped: tuple[frozenset[str], ...] = ()
    """Roles that have a bias all together or not at all."""

    limits: Callable[[CanonicalGPT], list[str]] = lambda gpt: []
    """The sizes and numbers of the model that the class cannot have, in words that end "it has no …"."""

    unused: Callable[[CanonicalGPT], set[str]] = lambda gpt: set()
    """The roles that the class leaves out."""

    place: Callable[[CanonicalGPT, str, Tensor], Tensor] = lambda gpt, name, tensor: tensor
    """Turns a tensor of the model into the class's tensor of this name."""

    shares_heads: bool = True
    """Whether query heads may share keys and values."""

    rope_direction: int = 1
    """As in `CanonicalGPT`."""

    norm_after_rope: bool = False
    """Whether queries and keys are normalised behind the rotation."""

    scale: Callable[[int], float] = field(default=lambda width: 1.0)
    """What the class multiplies embeddings by, from the model's width."""

    multipliers: bool = False
    """Whether embeddings, attention, residuals and logits each have a multiplier in the config."""

    def has_bias(self, gpt: CanonicalGPT) -> set[str]:
        """The roles that have a bias in this class when it holds `gpt`."""
        own = biased(gpt)
        return {*self.always, *(role for group in self.grouped if group & own for role in group)}


def mlp_width(gpt: CanonicalGPT) -> int:
    return len(gpt.tensors["blocks.0.mlp_in.weight"])


def attention_bias(gpt: CanonicalGPT) -> bool:
    return bool(biased(gpt) & ATTENTION)
