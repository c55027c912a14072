"""The facts that tensors leave open, their possible values, and the model that each value gives."""

import re
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoints.assembly import ORDERS, POSITIONS, QKV_ORDERS, reordered, with_positions, within_table
from fledge.checkpoints.canonical import ACTIVATIONS, NORMS, ROTATIONS, SCALED, SPANS, CanonicalGPT, canonical_logits
from fledge.checkpoints.facts import SWITCHES, Fact, Source, Status

SCALES = {
    "head": lambda gpt: gpt.usual_scale,
    "width": lambda gpt: gpt.width**-0.5,
    "none": lambda gpt: 1.0,
    "head, 1.15": lambda gpt: 1.15**2 * gpt.usual_scale,
    "head, 1.2": lambda gpt: 1.2**2 * gpt.usual_scale,
}
"""Attention scales that authors use, as rules: the width of a head may be open too. The last two are nanochat's, which
multiplies queries and keys, normalised, by such a number."""
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)  # the last two: BERT's, and that of F.rms_norm
THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
CAPS = (None, 15.0, 20.0, 30.0, 50.0)
RARE: dict[str, object] = {
    "window": None,
    "window_pattern": None,
    "attention_cap": None,
    "logit_cap": None,
    "final_norm_eps": None,
    "qk_norm_eps": None,
    "rope_span": "head",
    "residual_scale": 1.0,
    "residual_scaled": "both",
    "logit_scale": 1.0,
    "position_offset": 0,
    "norm_offset": 0.0,
}
"""Facts that nearly all authors have alike, and how. No other fact is changed together with them, and where no text
could tell their values apart, usual practice settles them."""
LAST = {*RARE, "value_gate_factor"}
"""Facts that text looks at last."""
OFFSETS = (0, 1, 2)
"""Rows of a table of positions that are left unread before the first one; fairseq's padding has one of two."""
MATTERS = 1e-4
"""A fact is open only if another value changes a logit by more than this share of the largest one."""

Values = dict[str, Any]
"""The values of facts, by name."""
Key = frozenset[tuple[str, object]]
"""The values of facts as a key of a dict."""


def key_of(values: Values) -> Key:
    return frozenset(values.items())


def is_usual(fact: Fact) -> bool:
    """Whether a fact is one of `RARE` and is what nearly all authors have."""
    return fact.name in RARE and fact.value == RARE[fact.name]


def is_rare(changes: Values) -> bool:
    """Whether what changes is then what few authors have."""
    return any(name in RARE and value != RARE[name] for name, value in changes.items())


def is_louder(changes: Values) -> bool:
    """Whether the changes make a part of the model louder or softer, which is what unfinished training does too."""
    return bool(changes.keys() & {"residual_scale", "logit_scale"}) or changes.get("norm_placement") == "replace"


def asked(gpt: CanonicalGPT) -> Values:
    """The facts that tensors like these leave open, each with the value of most authors."""
    tensors = gpt.tensors
    names: Values = {"attention_scale": gpt.usual_scale, "activation": "silu" if gpt.gated else "gelu"}
    names |= {
        "norm_eps": 1e-5,
        "embedding_scale": 1.0,
        "causal": True,
        "window": None,
        "attention_cap": None,
        "logit_cap": None,
        "residual_scale": 1.0,
        "residual_scaled": "both",
        "logit_scale": 1.0,
    }
    if gpt.n_layer > 1:
        names["window_pattern"] = None
    if "position_embedding.weight" in tensors:
        names["position_offset"] = 0
    if "final_norm.weight" in tensors or gpt.final_norm:
        names["final_norm_eps"] = None
    if not {"blocks.0.norm_1_after.weight", "blocks.0.norm_1_after.bias"} & tensors.keys():
        names["norm_placement"] = "pre"
        if "blocks.0.norm_1.weight" in tensors:
            names["parallel"] = False
    if not any(name.endswith("norm.bias") or ".norm_1.bias" in name for name in tensors):
        names["norm"] = "layernorm" if "position_embedding.weight" in tensors else "rmsnorm"
    if any(re.search(r"norm\w*\.weight$", name) for name in tensors):
        names["norm_offset"] = 0.0
    if _untrained_final_norm(gpt) or "final_norm.weight" not in tensors:
        names["final_norm"] = False
    if gpt.qk_norm and "blocks.0.query_norm.bias" not in tensors:
        names["qk_norm_type"] = gpt.norm
    if gpt.qk_norm == "head" and gpt.rope:
        names["qk_norm_after_rope"] = False
    if gpt.qk_norm:
        names["qk_norm_eps"] = None
    if any(name.endswith(".value_gate.weight") for name in tensors):
        narrow = any(name.endswith(".value_gate.weight") and tensors[name].shape[1] == 12 for name in tensors)
        names["value_gate_factor"] = 3.0 if narrow else 2.0
    if "backout_lambda.weight" in tensors:
        names["backout_layer"] = gpt.n_layer // 2
    if gpt.n_expert:
        names["renormalise_experts"] = True
    if gpt.rope:
        names |= {"rope": gpt.rope, "rope_theta": 10_000.0, "rope_direction": 1, "rope_width": None}
        names |= {"rope_span": "head"} if gpt.n_head > 1 else {}
        if "blocks.0.query_norm.weight" not in tensors:
            names["qk_norm"] = None
    if gpt.rope and "blocks.0.norm_1.weight" not in tensors:
        names["embedding_norm"] = False
    return names


def _untrained_final_norm(gpt: CanonicalGPT) -> bool:
    """Whether no gradient ever reached the final norm: it still has its initial values, and those of blocks do not."""

    def as_made(norm: str) -> bool:
        weight, bias = gpt.tensors.get(f"{norm}.weight"), gpt.tensors.get(f"{norm}.bias")
        return weight is not None and bool((weight == 1).all()) and (bias is None or not bias.any())

    return as_made("final_norm") and not as_made("blocks.0.norm_1")


def choices(gpt: CanonicalGPT, name: str) -> list:
    """Every value that evidence tries for a fact; for the attention scale they are names of rules in `SCALES`."""
    half = gpt.head_width // 2
    values = {
        "activation": ("silu", "gelu", "gelu_tanh", "relu") if gpt.gated else tuple(ACTIVATIONS),
        "attention_scale": tuple(SCALES) if gpt.qk_norm else tuple(SCALES)[:3],
        "norm": NORMS,
        "qk_norm_type": NORMS,
        "norm_eps": EPSILONS,
        "norm_offset": (0.0, 1.0),
        "norm_placement": ("pre", "post", "sublayer", "replace"),
        "embedding_scale": (1.0, gpt.width**0.5),
        "residual_scale": residual_scales(gpt.n_layer),
        "residual_scaled": SCALED,
        "logit_scale": (1.0, gpt.width**-0.5),
        "position_offset": [n for n in OFFSETS if n < len(gpt.tensors.get("position_embedding.weight", ()))],
        "rope": ROTATIONS,
        "rope_theta": THETAS,
        "rope_direction": (1, -1),
        "rope_span": SPANS,
        "final_norm_eps": (None, *EPSILONS),
        "qk_norm_eps": (None, *EPSILONS),
        "window": (None, *windows(gpt.context_length)),
        "window_pattern": (None, *window_patterns(gpt.n_layer)),
        "attention_cap": CAPS,
        "value_gate_factor": (1.0, 2.0, 3.0),
        "backout_layer": range(gpt.n_layer),
        "rope_width": (None, *(width for width in (half, half // 2) if width and not width % 2)),
        "qk_norm": (None, "head"),
        "logit_cap": CAPS,
        "qkv_order": QKV_ORDERS,
        "positions": POSITIONS,
        "experts_per_token": range(1, gpt.n_expert + 1),
        **dict.fromkeys(SWITCHES, (False, True)),
    }
    if name == "n_head":
        queries, keys = (len(gpt.tensors[f"blocks.0.{part}.weight"]) for part in ("query", "key"))
        return [n for n in range(1, queries // 4 + 1) if heads_fit(n, queries, keys, bool(gpt.rope))]
    return list(values.get(name, ()))


def residual_scales(n_layer: int) -> list[float]:
    """Scales of the residual stream that authors choose, with L layers: 1/√L, 1/√(2L), MiniCPM's, DeepNorm's.

    One that is within a tenth of none is left out: text would choose between them by chance.
    """
    depths = (n_layer**-0.5, (2 * n_layer) ** -0.5, 1.4 * n_layer**-0.5, (2 * n_layer) ** 0.25)
    return [1.0, *dict.fromkeys(scale for scale in depths if abs(scale - 1) > 0.1)]


def windows(context_length: int) -> list[int]:
    """Windows that authors choose: a part of the context, or a power of two; nanochat counts the tokens before."""
    parts = {context_length // part for part in (2, 3, 4)}
    parts |= {context_length // 2 + 1, *(-(-part // 128) * 128 + 1 for part in parts)}
    powers = {2**n for n in range(1, 13) if 2**n * 8 >= context_length}
    return sorted(n for n in parts | powers if 1 < n < context_length)


def window_patterns(n_layer: int) -> list[str]:
    """Patterns of blocks with a window: a repeated pattern, in which the last block may be an exception (nanochat)."""
    repeated = [(pattern * n_layer)[:n_layer] for pattern in ("S", "SL", "LS", "SSL", "SSSL", "LSS", "LSSS")]
    patterns = [*repeated, *(pattern[:-1] + "L" for pattern in repeated)]
    return [*dict.fromkeys(pattern for pattern in patterns if {*pattern} == {*"SL"})]


def heads_fit(n_head: int, width: int, key_rows: int, rotary: bool) -> bool:
    """Whether `n_head` heads fill all queries' width and the keys, in pairs of coordinates if they are rotated."""
    head_width, left = divmod(width, n_head)
    return not (left or key_rows % head_width or width % key_rows or (rotary and head_width % 2))


def regroup(gpt: CanonicalGPT, into_thirds: bool = False) -> CanonicalGPT:
    """Reads fused projections the other way: by key head, its queries, its key, its value; or back."""
    tensors, shared, groups = dict(gpt.tensors), gpt.n_head // gpt.n_kv_head, gpt.n_kv_head
    for n in range(gpt.n_layer):
        for kind in ("weight", "bias"):
            names = [f"blocks.{n}.{part}.{kind}" for part in ("query", "key", "value")]
            if names[0] not in tensors:
                continue
            parts = [tensors[name] for name in names]
            if into_thirds:
                by_group = [part.unflatten(0, (groups, -1, gpt.head_width)) for part in parts]
                parts = torch.cat(by_group, dim=1).flatten(0, 2).split([len(part) for part in parts])
            else:
                by_group = torch.cat(parts).unflatten(0, (groups, shared + 2, -1))
                parts = [part.flatten(0, 2) for part in by_group.split([shared, 1, 1], dim=1)]
            tensors |= dict(zip(names, parts, strict=True))
    return replace(gpt, tensors=tensors)


@dataclass
class Questions:
    """A recognised model, and the other possible values of its facts.

    `now` holds the present value of every fact that evidence may change, `open` the names of those that are assumed;
    what a layout or a config settled is tried as well, one fact at a time.
    """

    gpt: CanonicalGPT
    facts: list[Fact]
    now: Values = field(init=False)
    choices: dict[str, list] = field(init=False)
    open: set[str] = field(init=False)

    def __post_init__(self) -> None:
        by_name = {fact.name: fact for fact in self.facts}
        free = {name for name, fact in by_name.items() if fact.status is not Status.SHOWN and not fact.stated}
        self.choices = {name: values for name in by_name if name in free and (values := choices(self.gpt, name))}
        self.now = {name: by_name[name].value for name in self.choices}
        self.open = {name for name in self.choices if by_name[name].assumed}
        self.orders = {name: by_name[name].value for name in ORDERS if name in by_name}
        self.by_head = bool(by_name["qkv_by_head"].value) if "qkv_by_head" in by_name else False
        scale = by_name.get("attention_scale")
        self.usual_scale = scale is None or (not scale.stated and scale.value == self.gpt.usual_scale)
        if "attention_scale" in self.now:
            rules = [rule for rule, value in SCALES.items() if value(self.gpt) == self.gpt.attention_scale]
            self.now["attention_scale"] = rules[0] if rules else self.gpt.attention_scale

    def reading(self, values: Values) -> CanonicalGPT:
        """The model under these values."""
        values = dict(values)
        n_head, by_head = values.pop("n_head", self.gpt.n_head), values.pop("qkv_by_head", self.by_head)
        scale = values.pop("attention_scale", "head" if self.usual_scale else self.gpt.attention_scale)
        gpt = self.gpt
        if (n_head, by_head) != (gpt.n_head, self.by_head):
            gpt = regroup(gpt, into_thirds=True) if self.by_head else gpt
            key_rows, rows = (len(gpt.tensors[f"blocks.0.{part}.weight"]) for part in ("key", "query"))
            gpt = replace(gpt, n_head=n_head, n_kv_head=key_rows * n_head // rows)
            gpt = regroup(gpt) if by_head else gpt
        for fact, now in self.orders.items():
            if (value := values.pop(fact, now)) != now:
                gpt = reordered(reordered(gpt, fact, now, undo=True), fact, value)
        positions = values.pop("positions", None)
        gpt = within_table(replace(gpt, **values))
        gpt = with_positions(gpt, positions) if positions else gpt
        return replace(gpt, attention_scale=SCALES[scale](gpt) if scale in SCALES else scale)

    @property
    def length(self) -> int:
        """How long a text may be under every reading."""
        return max(1, self.gpt.context_length - max(self.choices.get("position_offset", [0])))

    def singles(self, values: Values) -> list[Values]:
        """Every change of one fact; heads also change together with how projections are fused."""
        return [changes for changes in self._changes(values) if self.differs(values, changes)]

    def pairs(self, values: Values) -> list[Values]:
        """Every change of two facts that are both assumed."""
        singles = [changes for changes in self._changes(values) if changes.keys() <= self.open - LAST]
        both = [a | b for a, b in combinations(singles, 2) if not a.keys() & b.keys()]
        return [changes for changes in both if self.differs(values, changes)]

    def _changes(self, values: Values) -> list[Values]:
        found = [{name: value} for name in self.choices for value in self.choices[name] if value != values[name]]
        # Both facts together say which rows of a fused projection are one head's.
        if {"n_head", "qkv_by_head"} <= self.choices.keys():
            other = not values["qkv_by_head"]
            found += [{"n_head": n, "qkv_by_head": other} for n in self.choices["n_head"] if n != values["n_head"]]
        if {"residual_scale", "residual_scaled"} <= self.choices.keys():
            places = [place for place in SCALED if place != values["residual_scaled"]]
            scales = [scale for scale in self.choices["residual_scale"] if scale != values["residual_scale"]]
            found += [{"residual_scale": s, "residual_scaled": place} for s in scales for place in places]
        return found

    def differs(self, values: Values, changes: Values) -> bool:
        """Whether the changes are possible and can change the logits.

        Parallel blocks are pre-norm, RoPE turns no more than a head, and one head has one scale.
        """
        after = values | changes
        if after.get("parallel") and after.get("norm_placement", "pre") != "pre":
            return False
        head_width = len(self.gpt.tensors["blocks.0.query.weight"]) // after.get("n_head", self.gpt.n_head)
        if (after.get("rope_width") or 0) > head_width or (
            after.get("rope_width") and after.get("rope_span") == "width"
        ):
            return False
        if any(
            name in changes and changes[name] == after.get("norm_eps") for name in ("final_norm_eps", "qk_norm_eps")
        ):
            return False
        scale, place = (after.get(name, getattr(self.gpt, name)) for name in ("residual_scale", "residual_scaled"))
        if scale != 1 and {"residual_scale", "residual_scaled"} & changes.keys() and (scale > 1) != (place == "stream"):
            return False  # what is added is made smaller, and the stream larger
        if changes.keys() == {"residual_scaled"} and scale == 1:
            return False
        if "window_pattern" in changes and not after.get("window", self.gpt.window):
            return False
        if "attention_scale" in changes and len(changes) == 1:
            now, then = self.reading(values), self.reading(after)
            return now.attention_scale != then.attention_scale
        return True

    def adopt(self, values: Values, source: Source) -> CanonicalGPT:
        """Writes the values into the facts; those that change rest on `source` from now on."""
        gpt = self.reading(values)
        for fact in self.facts:
            if fact.name in values:
                # An attention scale is written as a number; what is no field of the model is only among the values.
                value = vars(gpt).get(fact.name, values[fact.name])
                if value != fact.value:
                    fact.value, fact.source = value, source
        return gpt


def without_unused(gpt: CanonicalGPT) -> CanonicalGPT:
    """The model without a final norm that its forward pass leaves out."""
    if gpt.final_norm:
        return gpt
    kept = {name: tensor for name, tensor in gpt.tensors.items() if not name.startswith("final_norm.")}
    return replace(gpt, tensors=kept)


def settle_what_cannot_matter(gpt: CanonicalGPT, facts: list[Fact]) -> dict[str, list[object]]:
    """Settles each assumed fact whose other values all give the same logits.

    Returns:
        For each fact that is still assumed, the values that change a logit by more than `MATTERS` of the largest one.
    """
    questions = Questions(gpt, facts)
    ids = torch.randint(gpt.vocab_size, (2, min(32, questions.length)), generator=torch.Generator().manual_seed(0))
    logits = canonical_logits(gpt, ids)
    rivals = {}
    for fact in facts:
        if not fact.assumed:
            continue
        changes = [changes for changes in questions.singles(questions.now) if changes.keys() == {fact.name}]
        matter = []
        for change in changes:
            if fact.name == "window":  # whatever is shorter than the context matters to a text that is as long
                matter.append(change["window"])
                continue
            other = canonical_logits(questions.reading(questions.now | change), ids)
            if change_of(logits, other) > MATTERS:
                matter.append(change[fact.name])
        if matter:
            rivals[fact.name] = matter
        else:
            fact.settle(Source.NO_EFFECT, "every value gives the same logits")
    return rivals


def change_of(logits: Tensor, other: Tensor) -> float:
    """Largest |Δ logit| as a share of the largest |logit|."""
    return ((logits - other).abs().max() / logits.abs().max().clamp_min(1e-30)).nan_to_num(1.0).item()
