"""Known layouts as data, and the one function that reads a state dict through them.

A layout maps a source name to a canonical one; `{n}` stands for a layer index and `{h}` for a head index. Heads that
were saved one by one are concatenated, a fused `qkv` is split. To add a layout, add a `Layout`.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.checkpoints.canonical import ACTIVATIONS, CanonicalGPT
from fledge.checkpoints.loading import Checkpoint
from fledge.cli import UserError


@dataclass(frozen=True)
class Layout:
    """`names` maps source to canonical names without their ending; `endings` says how the source calls those."""

    activation: str
    names: dict[str, str]
    norm_endings: tuple[str, str] = ("weight", "bias")


LAYOUTS = {
    "scratch": Layout(
        activation="gelu_tanh",
        names={
            "token_table": "token_embedding",
            "position_table": "position_embedding",
            "layers.{n}.norm_before_attention": "blocks.{n}.norm_1",
            "layers.{n}.attention.to_query": "blocks.{n}.query",
            "layers.{n}.attention.to_key": "blocks.{n}.key",
            "layers.{n}.attention.to_value": "blocks.{n}.value",
            "layers.{n}.attention.to_out": "blocks.{n}.output",
            "layers.{n}.norm_before_feed_forward": "blocks.{n}.norm_2",
            "layers.{n}.feed_forward.expand": "blocks.{n}.mlp_in",
            "layers.{n}.feed_forward.shrink": "blocks.{n}.mlp_out",
            "norm_at_end": "final_norm",
            "to_vocab": "head",
        },
        norm_endings=("scale", "shift"),
    ),
    "per_head": Layout(
        activation="gelu",
        names={
            "embeddings.token_embedding": "token_embedding",
            "embeddings.pos_embedding": "position_embedding",
            "blocks.{n}.layer_norm1": "blocks.{n}.norm_1",
            "blocks.{n}.mha.heads.{h}.q": "blocks.{n}.query.{h}",
            "blocks.{n}.mha.heads.{h}.k": "blocks.{n}.key.{h}",
            "blocks.{n}.mha.heads.{h}.v": "blocks.{n}.value.{h}",
            "blocks.{n}.mha.out_proj": "blocks.{n}.output",
            "blocks.{n}.layer_norm2": "blocks.{n}.norm_2",
            "blocks.{n}.feed_forward.layers.0": "blocks.{n}.mlp_in",
            "blocks.{n}.feed_forward.layers.2": "blocks.{n}.mlp_out",
            "layer_norm": "final_norm",
            "output_layer": "head",
        },
    ),
    "book": Layout(
        activation="gelu_tanh",
        names={
            "tok_emb": "token_embedding",
            "pos_emb": "position_embedding",
            "trf_blocks.{n}.norm1": "blocks.{n}.norm_1",
            "trf_blocks.{n}.att.W_query": "blocks.{n}.query",
            "trf_blocks.{n}.att.W_key": "blocks.{n}.key",
            "trf_blocks.{n}.att.W_value": "blocks.{n}.value",
            "trf_blocks.{n}.att.out_proj": "blocks.{n}.output",
            "trf_blocks.{n}.norm2": "blocks.{n}.norm_2",
            "trf_blocks.{n}.ff.layers.0": "blocks.{n}.mlp_in",
            "trf_blocks.{n}.ff.layers.2": "blocks.{n}.mlp_out",
            "final_norm": "final_norm",
            "out_head": "head",
        },
        norm_endings=("scale", "shift"),
    ),
    "nanogpt": Layout(
        activation="gelu",
        names={
            "transformer.wte": "token_embedding",
            "transformer.wpe": "position_embedding",
            "transformer.h.{n}.ln_1": "blocks.{n}.norm_1",
            "transformer.h.{n}.attn.c_attn": "blocks.{n}.qkv",
            "transformer.h.{n}.attn.c_proj": "blocks.{n}.output",
            "transformer.h.{n}.ln_2": "blocks.{n}.norm_2",
            "transformer.h.{n}.mlp.c_fc": "blocks.{n}.mlp_in",
            "transformer.h.{n}.mlp.c_proj": "blocks.{n}.mlp_out",
            "transformer.ln_f": "final_norm",
            "lm_head": "head",
        },
    ),
}

REQUIRED = ("token_embedding", "position_embedding", "final_norm")
REQUIRED_IN_BLOCK = ("norm_1", "query", "key", "value", "norm_2", "mlp_in", "mlp_out")
CONFIG_HEADS = ("n_head", "n_heads", "num_heads", "num_attention_heads")


@dataclass
class Fact:
    """Something the proof rests on, and on whose word."""

    name: str
    value: object
    source: str


def recognise(
    checkpoint: Checkpoint,
    layout: str | None = None,
    n_head: int | None = None,
    activation: str | None = None,
    attention_scale: float | None = None,
) -> tuple[CanonicalGPT, list[Fact]]:
    """Reads a checkpoint through the layout that names every one of its tensors.

    Raises:
        UserError: no layout fits (the closest and what it lacks are named), shapes contradict each other, or a fact
            that tensors cannot show is missing.
    """
    name, named = _match(checkpoint.tensors, layout)
    preset = LAYOUTS[name]
    facts = [Fact("layout", name, "--layout" if layout else "tensor names")]
    tensors, heads_seen = _assemble(named)
    n_layer = _check_shapes(tensors)
    width = tensors["token_embedding.weight"].shape[1]

    said = [checkpoint.config.get(key) for key in CONFIG_HEADS]
    from_config = next((value for value in said if isinstance(value, int)), None)
    for value, source in ((heads_seen, "tensors"), (n_head, "--n_head"), (from_config, "checkpoint config")):
        if value:
            facts.append(Fact("n_head", n_head := value, source))
            break
    else:
        raise UserError(
            f"The number of attention heads is in neither the tensors nor the checkpoint's config; pass --n_head "
            f"(a divisor of the width {width})."
        )
    if n_head < 1 or width % n_head:
        raise UserError(f"n_head {n_head} does not divide the width {width}.")

    facts.append(
        Fact("activation", activation or preset.activation, "--activation" if activation else "layout default")
    )
    if facts[-1].value not in ACTIVATIONS:
        raise UserError(f"--activation {activation} is unknown; choose one of {', '.join(ACTIVATIONS)}.")
    usual_scale = (width // n_head) ** -0.5
    facts.append(
        Fact(
            "attention_scale",
            attention_scale or usual_scale,
            "--attention_scale" if attention_scale else "layout default",
        )
    )
    facts.append(Fact("norm_eps", 1e-5, "layout default"))
    facts.append(Fact("norm placement", "pre-norm", "layout default"))
    head, token_embedding = tensors.get("head.weight"), tensors["token_embedding.weight"]
    tied = head is None or (head.shape == token_embedding.shape and torch.equal(head, token_embedding))
    facts.append(Fact("tied head", tied, "tensors"))
    tensors.setdefault("head.weight", token_embedding)
    gpt = CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        activation=facts[2].value,
        attention_scale=facts[3].value,
        norm_eps=1e-5,
        tied=tied,
    )
    return gpt, facts


def _match(tensors: dict[str, Tensor], wanted: str | None) -> tuple[str, dict[str, Tensor]]:
    if wanted and wanted not in LAYOUTS:
        raise UserError(f"--layout {wanted} is unknown; choose one of {', '.join(LAYOUTS)}.")
    attempts = {name: _rename(tensors, LAYOUTS[name]) for name in ([wanted] if wanted else LAYOUTS)}
    name = max(attempts, key=lambda n: len(attempts[n]))
    if len(attempts[name]) < len(tensors):
        known = {source for source, _ in attempts[name].values()}
        unknown = [source for source in tensors if source not in known]
        raise UserError(
            f"No layout names every tensor: the closest, {name}, does not know {len(unknown)} of {len(tensors)}, "
            f"such as {', '.join(unknown[:3])}; the layouts are {', '.join(LAYOUTS)}."
        )
    return name, {target: tensor for target, (_, tensor) in attempts[name].items()}


def _rename(tensors: dict[str, Tensor], layout: Layout) -> dict[str, tuple[str, Tensor]]:
    """Canonical name → (source name, tensor), for the tensors that the layout knows."""
    rules = []
    for source, target in layout.names.items():
        is_norm = "norm" in target
        for ending, canonical in zip(
            layout.norm_endings if is_norm else ("weight", "bias"), ("weight", "bias"), strict=True
        ):
            if target.endswith("embedding") and canonical == "bias":
                continue
            pattern = re.escape(f"{source}.{ending}").replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{h\}", r"(?P<h>\d+)")
            rules.append((re.compile(pattern), f"{target}.{canonical}"))
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, target in rules:
            if found := pattern.fullmatch(name):
                renamed[target.format(**{key: int(index) for key, index in found.groupdict().items()})] = (name, tensor)
                break
    return renamed


def _assemble(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Concatenates heads, splits fused projections, widens to float64; also returns the number of heads seen."""
    tensors, heads = {}, {}
    for name, tensor in named.items():
        if not tensor.dim():
            raise UserError(f"{name} has the shape (), and no weight is a single number.")
    for name, tensor in named.items():
        per_head = re.fullmatch(r"(.*)\.(\d+)\.(weight|bias)", name)
        if per_head and per_head[1].endswith(("query", "key", "value")):
            heads.setdefault(f"{per_head[1]}.{per_head[3]}", {})[int(per_head[2])] = tensor.double()
        elif ".qkv." in name:
            if tensor.shape[0] % 3:
                raise UserError(f"{name} has {tensor.shape[0]} rows, which three projections cannot share.")
            for part, piece in zip(("query", "key", "value"), tensor.double().chunk(3), strict=True):
                tensors[name.replace("qkv", part)] = piece
        else:
            tensors[name] = tensor.double()
    counts = {len(indices) for indices in heads.values()}
    for name, indices in heads.items():
        if sorted(indices) != list(range(max(counts))):
            raise UserError(
                f"The attention heads of {name} are numbered {sorted(indices)}; every block needs them all."
            )
        if len({tensor.shape for tensor in indices.values()}) > 1:
            raise UserError(f"The attention heads of {name} have different shapes.")
        tensors[name] = torch.cat([indices[h] for h in sorted(indices)])
    return tensors, counts.pop() if counts else None


def _check_shapes(tensors: dict[str, Tensor]) -> int:
    """Every block there, every shape as its role demands. Returns the number of blocks."""
    layers = Counter(int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))
    if not layers or sorted(layers) != list(range(len(layers))):
        raise UserError(f"The checkpoint's layers are numbered {sorted(layers)}; they must run from 0 without a gap.")
    required = [*REQUIRED, *(f"blocks.{n}.{role}" for n in sorted(layers) for role in REQUIRED_IN_BLOCK)]
    for role in required:
        if f"{role}.weight" not in tensors:
            raise UserError(f"The checkpoint has no {role}; a pre-norm GPT with learned positions needs one.")
    vocab_size, width = tensors["token_embedding.weight"].shape[0], tensors["token_embedding.weight"].shape[-1]
    mlp_width = tensors["blocks.0.mlp_in.weight"].shape[0]
    shapes = {
        "token_embedding": (vocab_size, width),
        "position_embedding": (tensors["position_embedding.weight"].shape[0], width),
        "head": (vocab_size, width),
        "mlp_in": (mlp_width, width),
        "mlp_out": (width, mlp_width),
        **dict.fromkeys(("query", "key", "value", "output"), (width, width)),
        **dict.fromkeys(("norm_1", "norm_2", "final_norm"), (width,)),
    }
    for name, tensor in tensors.items():
        role, kind = name.split(".")[-2:]
        expected = shapes[role] if kind == "weight" else shapes[role][:1]
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} has the shape {tuple(tensor.shape)}, and the other tensors demand {expected}.")
    return len(layers)
