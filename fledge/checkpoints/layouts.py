"""A checkpoint → the canonical GPT, and the facts that rest on somebody's word because tensors cannot show them.

Roles come from `structure`; a layout listed here only adds what its author is known to compute. To add one, add a
`Layout`: names that only it has, and its defaults.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoints.canonical import ACTIVATIONS, NORMS, PLACEMENTS, QK_NORMS, ROTATIONS, CanonicalGPT
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.structure import Structure, detect
from fledge.cli import UserError


@dataclass(frozen=True)
class Layout:
    """What tells a layout, and what its author computes.

    `names` are parts of tensor names, `beside` entries of the file next to the weights, and `transposed` says that
    matrices are stored (in, out).
    """

    names: tuple[str, ...]
    facts: Mapping[str, object]
    beside: tuple[str, ...] = ()
    transposed: bool = False


LLAMA = {"activation": "silu", "norm": "rmsnorm"}
LAYOUTS = {
    "scratch": Layout(("token_table", "feed_forward.expand"), {"activation": "gelu_tanh"}),
    "book": Layout(("trf_blocks.0.att.",), {"activation": "gelu_tanh"}),
    "per_head": Layout(("mha.heads.0.q.", "feed_forward.layers.0"), {"activation": "gelu"}),
    "gpt2": Layout(("wte.", "h.0.attn.c_attn"), {"activation": "gelu_tanh"}, transposed=True),
    "build_nanogpt": Layout(("wte.", "h.0.attn.c_attn"), {"activation": "gelu_tanh"}, beside=("step", "val_loss")),
    "nanogpt": Layout(("transformer.wte.", "h.0.attn.c_attn", "lm_head"), {"activation": "gelu"}),
    "mingpt": Layout(("tok_emb", "attn.key", "mlp.0", "ln_f"), {"activation": "gelu"}),
    "lecture": Layout(("token_embedding_table", "position_embedding_table"), {"activation": "relu"}),
    "student": Layout(("tok_emb", "attn.qkv", "ffn.0"), {"activation": "gelu"}),
    "story_chat": Layout(("attn.wq", "mlp.w1", "ln_1"), {"activation": "silu", "rope": "interleaved"}),
    "llama2.c": Layout(("tok_embeddings", "attention.wq", "feed_forward.w1"), LLAMA | {"rope": "interleaved"}),
    "llama": Layout(("self_attn.q_proj", "mlp.gate_proj"), LLAMA | {"rope": "half"}),
    "torch": Layout(("self_attn.in_proj_weight", "linear1"), {"activation": "relu", "norm_placement": "post"}),
}
"""In the order in which they are tried."""

CONFIG_KEYS = {
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead"),
    "activation": ("activation", "activation_function", "hidden_act"),
    "norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "eps"),
    "rope_theta": ("rope_theta", "rope_base"),
    "context_length": (
        "context_length",
        "max_seq_len",
        "block_size",
        "n_positions",
        "max_position_embeddings",
        "max_len",
        "ctx",
    ),
}
CONFIG_ACTIVATIONS = {
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_tanh"), "gelu_tanh"),
    "relu": "relu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}

BY_HEAD = re.compile(r"\.(query|key|value)\.(?:\{h\}|\d+)$")
REQUIRED = ("token_embedding", "final_norm")
REQUIRED_IN_BLOCK = ("norm_1", "query", "key", "value", "norm_2", "mlp_in", "mlp_out")
OUTSIDE = {"token_embedding", "position_embedding", "final_norm", "head"}
INSIDE = {"norm_1", "qkv", "query", "key", "value", "output", "norm_2", "mlp_in", "mlp_gate", "mlp_out"}
SWITCHES = ("qkv_by_head", "causal", "parallel", "final_norm", "embedding_norm", "alibi", "qk_norm_after_rope")
SWITCHES += ("renormalise_experts",)
ALLOWED = {
    "activation": tuple(ACTIVATIONS),
    "norm": NORMS,
    "rope": ROTATIONS,
    "norm_placement": PLACEMENTS,
    "norm_offset": (0.0, 1.0),
    "rope_direction": (1, -1),
    "qk_norm": QK_NORMS,
    "qk_norm_type": NORMS,
    **dict.fromkeys(SWITCHES, (True, False)),
}
CAPS = ("attention_cap", "logit_cap", "window", "rope_width")
"""Numbers that a model may lack."""
TOLD = ("n_head", "activation", "attention_scale", "norm_eps", "norm", "rope", "rope_theta", "context_length")
TOLD += ("embedding_scale", "norm_placement", "norm_offset", "rope_direction", "qk_norm", "qk_norm_type")
TOLD += ("experts_per_token", *CAPS, *SWITCHES)
"""The facts that flags and `--mapping` may state."""

ASSUMED = ("layout default", "usual practice", "nobody")
"""Sources of facts that evidence may overrule. What nobody said must be settled before anything is written."""

WHOLE = ("n_head", "context_length", "window", "rope_width", "experts_per_token")

# What no tensor shows, and what most authors do. Each is a field of the canonical GPT.
QUESTIONS = {
    "norm_placement": "pre",
    "parallel": False,
    "embedding_norm": False,
    "qk_norm": None,
    "attention_cap": None,
    "logit_cap": None,
    "window": None,
}
ROTARY_QUESTIONS = {"rope_direction": 1, "rope_width": None}
# Of these a mapping speaks where an author does what few do.
RARE = {"norm_offset", "final_norm", "causal", "alibi", "qk_norm_type", "qk_norm_after_rope", "experts_per_token"}
RARE |= {"renormalise_experts"}
PER_TOKEN = {"token_embedding.weight", "head.weight", "head.bias"}
LARGEST = 1e12
"""No number that a fact can be is as large."""


@dataclass
class Fact:
    """Something the proof rests on, and on whose word."""

    name: str
    value: object
    source: str

    @property
    def open(self) -> bool:
        return self.source in ASSUMED


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
            facts[key] = Fact(key, float(value) if exponent else value, "--mapping")
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


def recognise(
    checkpoint: Checkpoint,
    layout: str | None = None,
    roles: Mapping[str, str] | None = None,
    told: Mapping[str, Fact] | None = None,
) -> tuple[CanonicalGPT, list[Fact]]:
    """The canonical GPT of a checkpoint, with what it rests on.

    Args:
        checkpoint: the loaded file.
        layout: a key of `LAYOUTS` whose defaults to use, instead of telling it by its names.
        roles: source module → canonical module, named by hand.
        told: facts stated by flags or a mapping, by name.

    Raises:
        UserError: a tensor whose role cannot be told, shapes that contradict each other, or a wrong fact.
    """
    if layout and layout not in LAYOUTS:
        raise UserError(f"--layout {layout} is unknown; choose one of {', '.join(LAYOUTS)}.")
    structure = detect(checkpoint.tensors, roles or {})
    if structure.refusals:
        raise UserError(structure.refusals[0])
    if structure.problems:
        raise UserError(
            f"{structure.problems[0]} --inspect shows what every tensor was taken for, and --mapping FILE.yaml names "
            "roles by hand."
        )
    tensors, heads_seen = _assemble(checkpoint.tensors, structure)
    n_layer = _check_shapes(tensors)
    name = layout or next((name for name in LAYOUTS if _fits(LAYOUTS[name], checkpoint, structure)), None)
    preset = LAYOUTS[name].facts if name else {}
    where = "--layout" if layout else "names of tensors" if name else "no layout has these names"
    facts = {"layout": Fact("layout", name, where)}
    width, has_positions = tensors["token_embedding.weight"].shape[1], "position_embedding.weight" in tensors
    key_rows = len(tensors["blocks.0.key.weight"])

    def settle(name: str, default: object, source: str = "usual practice") -> object:
        if told and name in told:
            facts[name] = told[name]
        elif name in CONFIG_KEYS and (said := _from_config(checkpoint.config, name)) is not None:
            facts[name] = Fact(name, said, "checkpoint config")
        elif name in preset:
            facts[name] = Fact(name, preset[name], "layout default")
        else:
            facts[name] = Fact(name, default, source)
        return _check_fact(facts[name])

    if heads_seen:
        facts["n_head"] = Fact("n_head", heads_seen, "tensors")
        if told and "n_head" in told and told["n_head"].value != heads_seen:
            raise UserError(
                f"{told['n_head'].source} says {told['n_head'].value} heads; the tensors show {heads_seen}."
            )
    else:
        settle("n_head", _likely_heads(width, key_rows, not has_positions), "nobody")
    n_head = facts["n_head"].value
    if width % n_head:
        raise UserError(f"n_head {n_head} does not divide the width {width}.")
    head_width = width // n_head
    if not heads_fit(n_head, width, key_rows, rotary=False):
        raise UserError(f"Heads of width {head_width} do not fit keys of width {key_rows}.")
    if head_width % 2 and not has_positions:
        raise UserError(f"Heads of width {head_width}, as n_head {n_head} says, cannot be rotated in pairs.")
    settle("activation", "silu" if "blocks.0.mlp_gate.weight" in tensors else "gelu")
    settle("attention_scale", head_width**-0.5)
    if any(re.search(r"norm.*bias", name) for name in tensors):
        facts["norm"] = Fact("norm", "layernorm", "tensors")
    else:
        settle("norm", "layernorm" if has_positions else "rmsnorm")
    settle("norm_eps", 1e-5)
    if has_positions:
        rope, context_length = None, tensors["position_embedding.weight"].shape[0]
    else:
        rope, theta = _find_rope(checkpoint.left_out, settle), settle("rope_theta", 10_000.0)
        context_length = settle("context_length", 0, "nobody")
        if not context_length:
            raise UserError(
                "There is no table of positions, and no config says how long the context is; say context_length: N in "
                "a --mapping."
            )
    head, token_embedding = tensors.get("head.weight"), tensors["token_embedding.weight"]
    tied = head is None or (head.shape == token_embedding.shape and torch.equal(head, token_embedding))
    facts["tied head"] = Fact("tied head", tied, "tensors")
    if tied:
        tensors["head.weight"] = token_embedding
    questions = QUESTIONS | ({} if has_positions else ROTARY_QUESTIONS) | dict.fromkeys(RARE & {*(told or {})})
    gpt = CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=key_rows // head_width,
        context_length=context_length,
        activation=facts["activation"].value,
        attention_scale=facts["attention_scale"].value,
        norm_eps=facts["norm_eps"].value,
        tied=tied,
        norm=facts["norm"].value,
        rope=rope,
        rope_theta=10_000.0 if has_positions else theta,
        embedding_scale=settle("embedding_scale", 1.0),
        **{name: settle(name, default) for name, default in questions.items()},
    )
    if any(re.fullmatch(r".*\.[qkv]{3}\.weight", role) for role in structure.roles.values()) and (
        gpt.n_head == gpt.n_kv_head
    ):
        gpt = regroup(gpt) if settle("qkv_by_head", False) else gpt
    for name, fact in (told or {}).items():
        shown = facts[name].value if name in facts else vars(gpt).get(name, False)
        if fact.value != shown:
            raise UserError(f"{fact.source} says {name}: {fact.value}; the tensors show {shown}.")
    return gpt, list(facts.values())


def regroup(gpt: CanonicalGPT, into_thirds: bool = False) -> CanonicalGPT:
    """Reads fused projections the other way: (head, q/k/v, row of the head) instead of (q/k/v, head, row), or back."""
    tensors = dict(gpt.tensors)
    for n in range(gpt.n_layer):
        for kind in ("weight", "bias"):
            names = [f"blocks.{n}.{part}.{kind}" for part in ("query", "key", "value")]
            if names[0] in tensors:
                fused = torch.cat([tensors[name] for name in names])
                grouped = fused.unflatten(0, (3, gpt.n_head, -1) if into_thirds else (gpt.n_head, 3, -1))
                tensors |= dict(zip(names, grouped.transpose(0, 1).flatten(0, 2).chunk(3), strict=True))
    return replace(gpt, tensors=tensors)


def require_settled(facts: list[Fact]) -> None:
    """Refuses to go on with a fact that nobody stated and no evidence settled.

    Raises:
        UserError: which one, and what would settle it.
    """
    how = {"n_head": "pass --n_head", "rope": "say rope: interleaved or rope: half in a --mapping"}
    for fact in facts:
        if fact.source == "nobody":
            raise UserError(
                f"The tensors do not show {fact.name} and no config says it; {how[fact.name]}, or --probe_text with "
                "text like that it was trained on."
            )


def fit_vocabulary(gpt: CanonicalGPT, tokens: int, name: str) -> tuple[CanonicalGPT, list[str]]:
    """Cuts rows that only padded the vocabulary to a round number (50,257 to 50,304), and says so.

    Raises:
        UserError: the tokenizer has another number of tokens than the embedding has rows.
    """
    rows = gpt.vocab_size
    if rows == tokens:
        return gpt, []
    if not (tokens < rows < tokens + 128 and rows % 8 == 0):
        raise UserError(
            f"The tokenizer {name} has {tokens} tokens and the checkpoint's embedding has {rows} rows; name the "
            "tokenizer that the model was trained with."
        )
    cut = {key: gpt.tensors[key][:tokens] for key in PER_TOKEN & gpt.tensors.keys()}
    said = f"The last {rows - tokens} of {rows} embedding rows, which pad the vocabulary, are cut off."
    return replace(gpt, tensors={**gpt.tensors, **cut}), [said]


def _fits(layout: Layout, checkpoint: Checkpoint, structure: Structure) -> bool:
    return (
        all(any(part in name for name in checkpoint.tensors) for part in layout.names)
        and all(entry in checkpoint.left_out for entry in layout.beside)
        and layout.transposed == bool(structure.transposed)
    )


def _from_config(config: Mapping[str, object], name: str) -> object:
    value = next((config[key] for key in CONFIG_KEYS[name] if key in config), None)
    if name == "activation":
        return CONFIG_ACTIVATIONS.get(str(value).lower())
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _check_fact(fact: Fact) -> object:
    """Its value, if it is one that the fact can have."""
    if fact.name in ALLOWED:
        if fact.value not in ALLOWED[fact.name]:
            choices = ", ".join(str(choice).lower() for choice in ALLOWED[fact.name])
            raise UserError(f"{fact.name} {fact.value} ({fact.source}) is unknown; choose one of {choices}.")
    else:
        if fact.value is None and fact.name in CAPS:
            return None
        whole = fact.name in WHOLE
        number = isinstance(fact.value, int if whole else (int, float)) and not isinstance(fact.value, bool)
        if not number or not (0 < fact.value < LARGEST or fact.source == "nobody"):
            raise UserError(f"{fact.name} {fact.value} ({fact.source}) must be a positive {'whole ' * whole}number.")
        if not whole:
            fact.value = float(fact.value)
    return fact.value


def _likely_heads(width: int, key_rows: int, rotary: bool) -> int:
    """A start for evidence to improve on: of those that fit, what is next to heads 64 wide, or to four of them."""
    fitting = [n for n in range(1, width + 1) if heads_fit(n, width, key_rows, rotary)] or [1]
    return min(fitting, key=lambda n: abs(n - (width // 64 if width >= 128 else 4)))


def heads_fit(n_head: int, width: int, key_rows: int, rotary: bool) -> bool:
    """Whether `n_head` heads fill the width and the keys, in pairs of coordinates if they are rotated."""
    head_width, left = divmod(width, n_head)
    return not (left or key_rows % head_width or width % key_rows or (rotary and head_width % 2))


def _find_rope(left_out: Mapping[str, str], settle: Callable[..., object]) -> object:
    """Which coordinates RoPE turns together, as far as buffers show it: GPT-NeoX keeps inv_freq, cos and sin."""
    buffers = [name for name, reason in left_out.items() if reason == "a buffer"]
    if any("freqs" in name for name in buffers):
        return settle("rope", "interleaved")
    if any(word in name for word in ("inv_freq", "cos", "sin") for name in buffers):
        return settle("rope", "half")
    return settle("rope", "interleaved", "nobody")


def _assemble(source: Mapping[str, Tensor], structure: Structure) -> tuple[dict[str, Tensor], int | None]:
    """Canonical tensors in the source's precision, and the number of heads if they were saved one by one.

    Heads are concatenated, fused projections split, (in, out) turned to (out, in). Where possible these are views.
    """
    tensors, heads = {}, {}
    width = next((source[name].shape[-1] for name, role in structure.roles.items() if "norm" in role), 0)
    for name, role in structure.roles.items():
        tensor = source[name].squeeze() if source[name].dim() > 2 else source[name]
        if not tensor.dim():
            raise UserError(f"{name} has the shape (), and no weight is a single number.")
        tensor = tensor.T if name in structure.transposed and tensor.dim() == 2 else tensor
        head = re.fullmatch(r"(.*\.(?:query|key|value))\.(\d+)\.(weight|bias)", role)
        fused = re.fullmatch(r"(blocks\.\d+)\.([qkv]{3})\.(weight|bias)", role)
        if head:
            heads.setdefault(f"{head[1]}.{head[3]}", {})[int(head[2])] = tensor
        elif fused:
            key_rows, odd = divmod(len(tensor) - width, 2)
            if key_rows <= 0 or odd:
                raise UserError(f"{name} has {len(tensor)} rows, which query, key and value cannot share.")
            pieces = tensor.split([width if letter == "q" else key_rows for letter in fused[2]])
            for letter, piece in zip(fused[2], pieces, strict=True):
                part = {"q": "query", "k": "key", "v": "value"}[letter]
                tensors[f"{fused[1]}.{part}.{fused[3]}"] = piece
        elif role in tensors:
            raise UserError(f"Two tensors were taken for {role}, one of them {name}; name it in a --mapping.")
        else:
            tensors[role] = tensor
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
            raise UserError(f"The checkpoint has no {role}, which every GPT has; name it in a --mapping.")
    first = {name.removeprefix("blocks.0.") for name in tensors if name.startswith("blocks.0.")}
    for n in sorted(layers):
        own = {name.removeprefix(f"blocks.{n}.") for name in tensors if name.startswith(f"blocks.{n}.")}
        if own != first:
            raise UserError(f"Layer {n} and layer 0 differ in {', '.join(sorted(own ^ first))}; all must be alike.")
    vocab_size, width = tensors["token_embedding.weight"].shape[0], tensors["token_embedding.weight"].shape[-1]
    mlp_width, kv_width = tensors["blocks.0.mlp_in.weight"].shape[0], tensors["blocks.0.key.weight"].shape[0]
    shapes = {
        "token_embedding": (vocab_size, width),
        "head": (vocab_size, width),
        "mlp_in": (mlp_width, width),
        "mlp_gate": (mlp_width, width),
        "mlp_out": (width, mlp_width),
        **dict.fromkeys(("query", "output"), (width, width)),
        **dict.fromkeys(("key", "value"), (kv_width, width)),
        **dict.fromkeys(("norm_1", "norm_2", "final_norm"), (width,)),
    }
    if "position_embedding.weight" in tensors:
        shapes["position_embedding"] = (tensors["position_embedding.weight"].shape[0], width)
    for name, tensor in tensors.items():
        role, kind = name.split(".")[-2:]
        if kind == "bias" and role in ("token_embedding", "position_embedding"):
            raise UserError(f"{name} is a bias, and no embedding has one; name in a --mapping what it is.")
        expected = shapes[role] if kind == "weight" else shapes[role][:1]
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} has the shape {tuple(tensor.shape)}, and the other tensors demand {expected}.")
    return len(layers)
