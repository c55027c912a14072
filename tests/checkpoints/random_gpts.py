"""Canonical GPTs drawn at random, each of a kind that one class of transformers holds."""

from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fledge.checkpoints.canonical import ACTIVATIONS, ROTATIONS, CanonicalGPT
from fledge.checkpoints.targets import to_target

ATTENTION, NORMS = ("query", "key", "value", "output"), ("norm_1", "norm_2", "final_norm")


@dataclass(frozen=True)
class Kind:
    """What the models of one target may have. `biased` may have a bias; `fields` are drawn from their choices."""

    norm: str = "rmsnorm"
    positions: str = "rope"
    gate: bool = True
    experts: bool = False
    shared_expert: bool = False
    placements: tuple[str, ...] = ("pre",)
    final_norm: bool = True
    weights: bool = True
    biased: tuple[str, ...] = ()
    qk_norm: str | None = None
    qk_norm_type: str = "rmsnorm"
    own_heads: bool = False
    fields: dict[str, tuple] = field(default_factory=dict)


LAYERNORM = {"norm": "layernorm", "gate": False}
EVERYWHERE = (*ATTENTION, "mlp_in", "mlp_out", *NORMS)
SCALES = {"attention_scale": (None, 1.0, 0.3)}
WINDOW = {"window": (None, 2, 5)}
ONE_EPS = {"norm_eps": (1e-5,)}
KINDS = {
    "gpt2": Kind(**LAYERNORM, positions="learned", biased=(*EVERYWHERE, "head"), fields=SCALES),
    "stablelm": Kind(
        norm="layernorm",
        biased=("query", "key", "value", *NORMS, "head"),
        fields=SCALES | {"rope_width": (None, 2), "parallel": (False, True)},
    ),
    "llama": Kind(biased=(*ATTENTION, "mlp_gate", "mlp_in", "mlp_out"), own_heads=True, fields=SCALES),
    "granite": Kind(biased=(*ATTENTION, "mlp_gate", "mlp_in", "mlp_out"), fields=SCALES),
    "opt": Kind(
        **LAYERNORM,
        positions="learned",
        placements=("pre", "post"),
        final_norm=False,
        biased=(*EVERYWHERE, "head"),
        fields=SCALES | ONE_EPS,
    ),
    "starcoder2": Kind(**LAYERNORM, biased=(*EVERYWHERE, "head"), fields=SCALES | WINDOW),
    "arcee": Kind(gate=False, biased=(*ATTENTION, "mlp_in", "mlp_out"), own_heads=True, fields=SCALES),
    "mistral": Kind(own_heads=True, fields=SCALES | WINDOW),
    "qwen3": Kind(biased=ATTENTION, qk_norm="head", own_heads=True, fields=SCALES | WINDOW),
    "nanochat": Kind(
        gate=False,
        weights=False,
        biased=ATTENTION,
        qk_norm="head",
        fields={"embedding_norm": (True,), "logit_cap": (None, 3.0)},
    ),
    "gpt_neox": Kind(
        **LAYERNORM,
        biased=(*EVERYWHERE, "head"),
        fields=SCALES | {"rope_width": (None, 2), "parallel": (False, True)},
    ),
    "mpt": Kind(**LAYERNORM, positions="alibi", fields=SCALES | {"activation": ("gelu",)}),
    "gemma2": Kind(
        placements=("both",),
        biased=ATTENTION,
        own_heads=True,
        fields=SCALES | WINDOW | {"attention_cap": (None, 2.0), "logit_cap": (None, 3.0)},
    ),
    "olmo2": Kind(placements=("sublayer",), biased=ATTENTION, qk_norm="width", fields=SCALES),
    "mixtral": Kind(experts=True, own_heads=True, fields=SCALES | WINDOW),
    "qwen3_moe": Kind(
        experts=True, biased=ATTENTION, qk_norm="head", fields=SCALES | WINDOW | {"renormalise_experts": (True, False)}
    ),
    "qwen2_moe": Kind(
        experts=True,
        shared_expert=True,
        biased=("query", "key", "value"),
        fields=SCALES | {"renormalise_experts": (True, False)},
    ),
    "gpt_neo": Kind(
        **LAYERNORM,
        positions="learned",
        biased=("output", "mlp_in", "mlp_out", *NORMS),
        fields=SCALES | {"window": (2,)},
    ),
}


@st.composite
def gpts(draw, kind: Kind, layers: tuple[int, ...] = (1, 2)) -> CanonicalGPT:
    """Small ones, with the sizes that make matrices square drawn as often as the others."""

    def some(*choices):
        return draw(st.sampled_from(choices))

    rope = some(*ROTATIONS) if kind.positions == "rope" else None
    head_width = 2 * draw(st.integers(1, 4)) if rope else draw(st.integers(1, 8))
    head_width = 8 if kind.experts else head_width
    n_kv_head, n_layer, n_expert = draw(st.integers(1, 2)), some(*layers), draw(st.integers(2, 3))
    n_head = n_kv_head * draw(st.integers(1, 2))
    width = n_head * (head_width + (some(0, 0, 2) * (4 if kind.experts else 1) if kind.own_heads else 0))
    vocab_size, context_length = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    placement = some(*kind.placements)
    own = {name: some(*choices) for name, choices in kind.fields.items()}
    roles = _projections(draw, kind, width, head_width, n_head, n_kv_head, n_expert)
    norms = _norms(draw, kind, placement, width, head_width, n_head, n_kv_head)
    if own.get("parallel") and kind.gate:  # StableLM's parallel blocks have one norm
        norms.pop("norm_2", None)
    final_norm = kind.final_norm or (placement == "pre" and some(False, True))
    inside = {f"blocks.{n}.{role}": shape for n in range(n_layer) for role, shape in (roles | norms).items()}
    outside = {"final_norm": (width,)} if final_norm and kind.weights else {}
    tensors = _filled(draw, kind, inside | outside)
    tied = draw(st.booleans())
    tensors["token_embedding.weight"] = random(draw, vocab_size, width)
    tensors["head.weight"] = tensors["token_embedding.weight"] if tied else random(draw, vocab_size, width)
    carried = final_norm or placement == "post" or vocab_size < width - 2
    if "head" in kind.biased and carried and draw(st.booleans()):
        tensors["head.bias"] = random(draw, vocab_size)
    if kind.positions == "learned" and some(True, True, False):
        own["position_offset"] = some(0, 2)
        tensors["position_embedding.weight"] = random(draw, context_length + own["position_offset"], width)
    usual = {"activation": some(*ACTIVATIONS), "norm_eps": some(1e-5, 1e-3), "norm_offset": some(0.0, 1.0)}
    if kind.qk_norm == "head" and "blocks.0.query_norm.weight" not in tensors:
        own["qk_norm_after_rope"] = some(False, True)
    own["attention_scale"] = own.get("attention_scale") or head_width**-0.5
    return CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        context_length=context_length,
        tied=tied,
        norm=kind.norm,
        norm_placement=placement,
        final_norm=final_norm,
        rope=rope,
        rope_theta=some(1e4, 5e5),
        rope_direction=some(1, -1),
        alibi=kind.positions == "alibi",
        qk_norm=kind.qk_norm,
        qk_norm_type=kind.qk_norm_type,
        embedding_scale=some(1.0, 3.0, width**0.5),
        residual_scale=some(1.0, 0.3),
        residual_scaled=some("both", "both", "attention", "mlp") if kind is not KINDS["granite"] else "both",
        logit_scale=some(1.0, 1.0, 0.125),
        experts_per_token=some(1, n_expert) if kind.experts else 0,
        **usual | own,
    )


def _projections(draw, kind, width, head_width, n_head, n_kv_head, n_expert) -> dict[str, tuple[int, ...]]:
    inner = draw(st.sampled_from([8 if kind.experts else 1, width, 4 * width]))
    queries, keys = n_head * head_width, n_kv_head * head_width
    roles = {"query": (queries, width), "key": (keys, width), "value": (keys, width), "output": (width, queries)}
    if queries == width and not draw(st.integers(0, 3)):
        del roles["output"]
    mlp = {"mlp_in": (inner, width), "mlp_out": (width, inner)} | ({"mlp_gate": (inner, width)} if kind.gate else {})
    if not kind.experts:
        if inner == width and draw(st.booleans()):
            del mlp["mlp_out"]
        return roles | mlp
    roles["router"] = (n_expert, width)
    places = [f"experts.{e}" for e in range(n_expert)] + ["shared"] * (kind.shared_expert and draw(st.booleans()))
    if "shared" in places and draw(st.booleans()):
        roles["shared_gate"] = (1, width)
    return roles | {f"{place}.{role}": shape for place in places for role, shape in mlp.items()}


def _norms(draw, kind, placement, width, head_width, n_head, n_kv_head) -> dict[str, tuple[int]]:
    """Those with weights: none of them, the first alone, or all."""
    if not kind.weights or not draw(st.integers(0, 5)):
        return {}
    names = ["norm_1", "norm_2"][: draw(st.integers(1, 2))]
    names += ["norm_1_after", "norm_2_after"] if placement == "both" else []
    norms = dict.fromkeys(names, (width,))
    if kind.qk_norm == "head":
        norms |= dict.fromkeys(("query_norm", "key_norm"), (head_width,))
    if kind.qk_norm == "width":
        norms |= {"query_norm": (n_head * head_width,), "key_norm": (n_kv_head * head_width,)}
    return norms


def _filled(draw, kind: Kind, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    biased = {role for role in kind.biased if draw(st.booleans())}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = random(draw, *shape) + (len(shape) == 1)
        if name.split(".")[-1] in biased:
            tensors[f"{name}.bias"] = random(draw, shape[0])
    return tensors


def random(draw, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def filled(config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = empty(config)
    missing, unexpected = model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, False, assign=True)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


@st.composite
def models(draw, target: str, shortest: int, layers: tuple[int, ...] = (1, 2)) -> PreTrainedModel:
    """A converted model in float32, with a context of `shortest` tokens or more and at least ten tokens."""
    gpt = draw(gpts(KINDS[target], layers))
    assume(gpt.width >= 8 and gpt.vocab_size >= 10 and gpt.context_length >= shortest)
    config, weights, _ = to_target(gpt, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), target)
    return filled(config, weights)
