"""A checkpoint → the canonical GPT, and the facts that rest on somebody's word because tensors cannot show them.

Roles come from `structure`; a layout in `known_layouts` only adds what its author is known to compute.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fledge.checkpoints.assembly import assemble, check_shapes, reordered, with_positions
from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.facts import (
    CONFIG,
    CONFIG_KEYS,
    DEFAULT,
    GUESS,
    PRACTICE,
    TENSORS,
    Fact,
    Status,
    check_fact,
    from_config,
)
from fledge.checkpoints.known_layouts import LAYOUTS, UNUSUAL, Layout
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.questions import asked, heads_fit, regroup
from fledge.checkpoints.structure import Structure, detect
from fledge.cli import UserError

PER_TOKEN = {"token_embedding.weight", "head.weight", "head.bias"}
TORCH_ATTENTION = "nn.MultiheadAttention"
MASK = re.compile(r"(^|\.)(mask|tril|triu|(causal|attn|attention)_mask|attn\.bias)$")
# Of these a mapping speaks where an author does what few do.
RARE = {"norm_offset", "final_norm", "parallel", "embedding_norm", "alibi", "qk_norm", "qk_norm_type", "window"}
RARE |= {"qk_norm_after_rope", "experts_per_token", "renormalise_experts", "attention_cap", "logit_cap", "rope_width"}
RARE |= {"rope_direction", "norm_placement"}


def recognise(
    checkpoint: Checkpoint,
    layout: str | None = None,
    roles: Mapping[str, str] | None = None,
    told: Mapping[str, Fact] | None = None,
    by_author: Fact | None = None,
) -> tuple[CanonicalGPT, list[Fact]]:
    """The canonical GPT of a checkpoint, with what it rests on.

    Args:
        checkpoint: the loaded file.
        layout: a key of `LAYOUTS` whose defaults to use, instead of telling it by its names.
        roles: source module → canonical module, named by hand.
        told: facts stated by flags or a mapping, by name.
        by_author: the context length of the author's code, for a checkpoint that shows none.

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
    tensors, heads_seen = assemble(checkpoint.tensors, structure)
    n_layer = check_shapes(tensors)
    name = layout or next((name for name in LAYOUTS if _fits(LAYOUTS[name], checkpoint, structure)), None)
    where = "--layout" if layout else "names of tensors" if name else "no layout has these names"
    facts = {"layout": Fact("layout", name, Status.SHOWN, where)}
    told = told or {}
    # An author who left out the final norm of a layout may have changed more of it.
    normed = "final_norm.weight" in tensors or bool(name and LAYOUTS[name].facts.get("final_norm"))
    usual = not any(checkpoint.config.get(key) for key in UNUSUAL)
    exact = bool(name and normed and usual and _is_exact(LAYOUTS[name], checkpoint))

    def settle(fact: str, default: object, source: str = PRACTICE) -> object:
        facts[fact] = _fact(fact, default, source, checkpoint.config, exact, layout, name, told)
        return check_fact(facts[fact])

    key_rows = len(tensors["blocks.0.key.weight"])
    rotary = not {"position_embedding.weight", "alibi.slopes"} & tensors.keys()
    n_head = _heads(tensors, heads_seen, rotary, told, facts, settle)
    head, token_embedding = tensors.get("head.weight"), tensors["token_embedding.weight"]
    tied = head is None or (head.shape == token_embedding.shape and torch.equal(head, token_embedding))
    facts["tied head"] = Fact.of("tied head", tied, TENSORS)
    if tied:
        tensors["head.weight"] = token_embedding
    rope = _find_rope(checkpoint.left_out, settle) if rotary else None
    gpt = CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=key_rows * n_head // len(tensors["blocks.0.query.weight"]),
        context_length=_context_length(tensors, checkpoint, facts, settle, by_author),
        activation="gelu",
        attention_scale=1.0,
        norm_eps=1e-5,
        tied=tied,
        rope=rope,
        alibi="alibi.slopes" in tensors,
        final_norm="final_norm.weight" in tensors,
        embedding_norm="embedding_norm.weight" in tensors,
        norm_placement="both" if "blocks.0.norm_1_after.weight" in tensors else "pre",
        qk_norm=_qk_norm(tensors, n_head),
        qk_norm_type="layernorm" if "blocks.0.query_norm.bias" in tensors else "rmsnorm",
        experts_per_token=settle("experts_per_token", 2, GUESS) if "blocks.0.router.weight" in tensors else 0,
    )
    rare = RARE & {*told, *(LAYOUTS[name].facts if name else ())}
    questions = dict.fromkeys(rare) | asked(gpt)
    values = {fact: settle(fact, default) for fact, default in questions.items() if fact != "rope"}
    if "norm" not in values:
        facts["norm"] = Fact.of("norm", "layernorm", TENSORS)
    if any("mask" in reason or MASK.search(name) for name, reason in checkpoint.left_out.items()) and gpt.causal:
        facts["causal"] = Fact.of("causal", True, TENSORS) if facts["causal"].assumed else facts["causal"]
    gpt = replace(gpt, **values)
    if rotary:
        said = any(word in name for word in ("freqs", "inv_freq", "cos", "sin") for name in checkpoint.left_out)
        known = said or (name and "rope" in LAYOUTS[name].facts) or "rope" in told
        gpt = with_positions(gpt, settle("positions", "rotary", DEFAULT if known else GUESS))
    for fact in sorted(structure.proposed):
        settle(fact, "qkv" if fact == "qkv_order" else False, PRACTICE if fact == "gate_order" else GUESS)
        gpt = reordered(gpt, fact, facts[fact].value)
    if any(re.fullmatch(r".*\.[qkv]{3}\.weight", role) for role in structure.roles.values()) and (
        gpt.n_head == gpt.n_kv_head
    ):
        gpt = regroup(gpt) if settle("qkv_by_head", False) else gpt
    if any("in_proj_" in name for name in checkpoint.tensors):
        for fact in [facts[name] for name in ("attention_scale", "qkv_by_head") if name in facts]:
            if fact.assumed:
                fact.status, fact.source = Status.SETTLED, TORCH_ATTENTION
    for name, fact in told.items():
        shown = facts[name].value if name in facts else vars(gpt).get(name, False)
        if fact.value != shown:
            raise UserError(f"{fact.source} says {name}: {fact.value}; the tensors show {shown}.")
    return gpt, list(facts.values())


def _fact(
    name: str,
    default: object,
    source: str,
    config: Mapping[str, object],
    exact: bool,
    forced: str | None,
    layout: str | None,
    told: Mapping[str, Fact],
) -> Fact:
    """Who says what a fact is: the user, the checkpoint's config, the layout's known authors, or usual practice."""
    if name in told:
        return told[name]
    if name in CONFIG_KEYS and (said := from_config(config, name)) is not None:
        return Fact.of(name, said, CONFIG)
    if layout is None or name in ("n_head", "context_length"):
        return Fact.of(name, default, source)
    preset = LAYOUTS[layout]
    value = preset.facts.get(name, default)
    shared = exact and (name not in preset.open or preset.dated in config)
    if forced or shared:
        value = True if name == "final_norm" and exact else value  # one that is there, and still as it was made
        return Fact(name, value, Status.SETTLED, "--layout" if forced else f"every known author of {layout}")
    return Fact.of(name, value, DEFAULT if name in preset.facts else source)


def _heads(
    tensors: Mapping[str, Tensor],
    heads_seen: int | None,
    rotary: bool,
    told: Mapping[str, Fact],
    facts: dict[str, Fact],
    settle: Callable[..., object],
) -> int:
    width, key_rows = tensors["token_embedding.weight"].shape[1], len(tensors["blocks.0.key.weight"])
    if heads_seen:
        facts["n_head"] = Fact.of("n_head", heads_seen, TENSORS)
        if "n_head" in told and told["n_head"].value != heads_seen:
            raise UserError(
                f"{told['n_head'].source} says {told['n_head'].value} heads; the tensors show {heads_seen}."
            )
    else:
        settle("n_head", _likely_heads(width, key_rows, rotary), GUESS)
    n_head = facts["n_head"].value
    if width % n_head:
        raise UserError(f"n_head {n_head} does not divide the width {width}.")
    head_width = width // n_head
    if not heads_fit(n_head, width, key_rows, rotary=False):
        raise UserError(f"Heads of width {head_width} do not fit keys of width {key_rows}.")
    if head_width % 2 and rotary:
        raise UserError(f"Heads of width {head_width}, as n_head {n_head} says, cannot be rotated in pairs.")
    return n_head


def _context_length(
    tensors: dict[str, Tensor],
    checkpoint: Checkpoint,
    facts: dict[str, Fact],
    settle: Callable[..., object],
    by_author: Fact | None,
) -> int:
    """How long the context is. A table of positions is cut to what the config says: its later rows were never trained.

    Raises:
        UserError: nothing says it.
    """
    table = tensors.get("position_embedding.weight")
    if table is None:
        settle("context_length", 0, GUESS)
        if by_author and not facts["context_length"].value:
            facts["context_length"] = by_author
        if not (length := facts["context_length"].value):
            raise UserError(
                "There is no table of positions, and no config says how long the context is; write the line "
                "`context_length: N` into a YAML file and pass it as --mapping, or pass --reference FOLDER with code "
                "that says it."
            )
        return length
    said = from_config(checkpoint.config, "context_length")
    if isinstance(said, int) and 0 < said < len(table):
        length = settle("context_length", said)
        tensors["position_embedding.weight"] = table[:length]
        return length
    return len(table)


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


def _qk_norm(tensors: Mapping[str, Tensor], n_head: int) -> str | None:
    """Over what queries and keys are normalised, if those norms have weights."""
    weight, rows = tensors.get("blocks.0.query_norm.weight"), len(tensors["blocks.0.query.weight"])
    if weight is None:
        return None
    return "width" if len(weight) == rows != rows // n_head else "head"


def _fits(layout: Layout, checkpoint: Checkpoint, structure: Structure) -> bool:
    return (
        all(any(part in name for name in checkpoint.tensors) for part in layout.names)
        and all(entry in checkpoint.left_out for entry in layout.beside)
        and layout.transposed == bool(structure.transposed)
    )


def _is_exact(layout: Layout, checkpoint: Checkpoint) -> bool:
    return bool(layout.exact) and all(re.fullmatch(layout.exact, name) for name in checkpoint.tensors)


def _likely_heads(width: int, key_rows: int, rotary: bool) -> int:
    """A start for evidence to improve on: of those that fit, what is next to heads 64 wide, or to four of them."""
    fitting = [n for n in range(1, width + 1) if heads_fit(n, width, key_rows, rotary)] or [1]
    return min(fitting, key=lambda n: abs(n - (width // 64 if width >= 128 else 4)))


def _find_rope(left_out: Mapping[str, str], settle: Callable[..., object]) -> object:
    """Which coordinates RoPE turns together, as far as buffers show it: GPT-NeoX keeps inv_freq, cos and sin."""
    buffers = [name for name, reason in left_out.items() if reason == "a buffer"]
    if any("freqs" in name for name in buffers):
        return settle("rope", "interleaved")
    if any(word in name for word in ("inv_freq", "cos", "sin") for name in buffers):
        return settle("rope", "half")
    return settle("rope", "interleaved", GUESS)
