"""A checkpoint → the canonical GPT, with the facts that it rests on.

The steps: each tensor gets a role (`roles`), the tensors are put together under canonical names (`assembly`), what they
show is read off, and every fact that they do not show is settled or assumed (`settling`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fledge.checkpoints.assembly import assemble, check_shapes, is_square, reordered, with_positions, within_table
from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.facts import Fact, Source, from_config
from fledge.checkpoints.head_tensors import split_heads
from fledge.checkpoints.known_layouts import LAYOUTS
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.loading.weights import LeftOut
from fledge.checkpoints.questions import asked, heads_fit, is_usual, regroup
from fledge.checkpoints.roles import detect
from fledge.checkpoints.settling import Settling, known_layout
from fledge.checkpoints.structure import SQUARES, Structure
from fledge.errors import UserError

PER_TOKEN = {"token_embedding.weight", "head.weight", "head.bias"}
MASK = re.compile(r"(^|\.)(mask|tril|triu|(causal|attn|attention)_mask|attn\.bias)$")
ROTATIONS_SAVED = ("inv_freq", "cos", "sin")
"""Words in the names of GPT-NeoX's tables of rotations; the tables of LLaMA's authors are called freqs."""
RARE = {"norm_offset", "final_norm", "parallel", "embedding_norm", "alibi", "qk_norm", "qk_norm_type", "window"}
RARE |= {"qk_norm_after_rope", "experts_per_token", "renormalise_experts", "attention_cap", "logit_cap", "rope_width"}
RARE |= {"rope_direction", "norm_placement", "rope_span", "window_pattern", "final_norm_eps", "qk_norm_eps"}
"""Facts that are read only if the user or a layout states them, or the tensors raise the question."""


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
        layout: a key of `LAYOUTS` whose facts to use, instead of those of the layout that the names show.
        roles: source module → canonical module, named by hand.
        told: facts stated by flags or a mapping, by name.
        by_author: the context length of the author's code, for a checkpoint that shows none; 0 if it says nothing.

    Raises:
        UserError: a tensor whose role cannot be told, shapes that contradict each other, or a wrong fact.
    """
    if layout and layout not in LAYOUTS:
        raise UserError(f"--layout {layout} is unknown; choose one of {', '.join(LAYOUTS)}.")
    parts, oriented = split_heads(checkpoint.tensors)
    checkpoint = replace(checkpoint, tensors=parts)
    structure = _structure(checkpoint, roles or {}, oriented)
    tensors, heads_saved = assemble(checkpoint.tensors, structure)
    n_layer = check_shapes(tensors)
    known = known_layout(checkpoint, structure, tensors, forced=layout)
    facts = Settling(known, checkpoint.config, told or {}, by_author, checkpoint.origins, checkpoint.stated)

    n_head = _heads(tensors, heads_saved, facts)
    gpt = _shown(tensors, n_layer, n_head, checkpoint, facts)
    gpt = _open_facts(gpt, checkpoint, facts)
    gpt = _kinds_of_norm(gpt, structure, facts)
    gpt = _positions(gpt, checkpoint, facts)
    gpt = _orders(gpt, structure, facts)
    if any("in_proj_" in name for name in checkpoint.tensors):
        facts.settle_assumed(("attention_scale", "qkv_by_head"), Source.TORCH_ATTENTION)
    facts.check_told(vars(gpt))
    return gpt, facts.listed()


def _structure(checkpoint: Checkpoint, named: Mapping[str, str], oriented: frozenset[str]) -> Structure:
    structure = detect(checkpoint.tensors, named, oriented)
    if structure.refusals:
        raise UserError(structure.refusals[0])
    if structure.problems:
        raise UserError(
            f"{structure.problems[0]} --inspect shows what every tensor was taken for, and --mapping FILE.yaml names "
            "roles by hand."
        )
    return structure


def _heads(tensors: Mapping[str, Tensor], heads_saved: int | None, facts: Settling) -> int:
    """The number of heads: `heads_saved` if they were saved one by one, else stated or guessed."""
    width, key_rows = (len(tensors[f"blocks.0.{part}.weight"]) for part in ("query", "key"))
    rotary = _may_rotate(tensors)
    if gates := [tensor for name, tensor in tensors.items() if name.endswith(".value_gate.weight")]:
        heads_saved = len(gates[0]) * len(tensors["blocks.0.query.weight"]) // key_rows  # one for each key head
    normed = tensors.get("blocks.0.query_norm.weight")
    if normed is not None and len(normed) < width and not width % len(normed):  # a norm of each head, as wide as it
        heads_saved = width // len(normed)
    if heads_saved:
        n_head = facts.show("n_head", heads_saved)
        if (said := facts.told.get("n_head")) and said.value != heads_saved:
            raise UserError(f"{said.said_by} says {said.value} heads; the tensors show {heads_saved}.")
    else:
        n_head = facts.settle("n_head", _likely_heads(width, key_rows, rotary), Source.GUESS)
    if width % n_head:
        raise UserError(f"n_head {n_head} does not divide the width {width}.")
    head_width = width // n_head
    if not heads_fit(n_head, width, key_rows, rotary=False):
        raise UserError(f"Heads of width {head_width} do not fit keys of width {key_rows}.")
    if head_width % 2 and rotary:
        raise UserError(f"Heads of width {head_width}, as n_head {n_head} says, cannot be rotated in pairs.")
    return n_head


def _likely_heads(width: int, key_rows: int, rotary: bool) -> int:
    """A first guess of the heads: of the numbers that fit, the one closest to heads of width 64, or to four heads."""
    fitting = [n for n in range(1, width + 1) if heads_fit(n, width, key_rows, rotary)] or [1]
    return min(fitting, key=lambda n: abs(n - (width // 64 if width >= 128 else 4)))


def _may_rotate(tensors: Mapping[str, Tensor]) -> bool:
    """Whether positions may be rotated in: no tensor holds them."""
    return not {"position_embedding.weight", "alibi.slopes"} & tensors.keys()


def _shown(
    tensors: dict[str, Tensor], n_layer: int, n_head: int, checkpoint: Checkpoint, facts: Settling
) -> CanonicalGPT:
    """The model as far as its tensors show it; every other field has a value that `_open_facts` replaces."""
    head, token_embedding = tensors.get("head.weight"), tensors["token_embedding.weight"]
    tied = head is None or (head.shape == token_embedding.shape and torch.equal(head, token_embedding))
    facts.show("tied head", tied)
    if tied:
        tensors["head.weight"] = token_embedding
    rope = _rotation(checkpoint.left_out, facts) if _may_rotate(tensors) else None
    context_length = _context_length(tensors, checkpoint, facts)
    has_experts = "blocks.0.router.weight" in tensors
    return CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=len(tensors["blocks.0.key.weight"]) * n_head // len(tensors["blocks.0.query.weight"]),
        context_length=context_length,
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
        experts_per_token=facts.settle("experts_per_token", 2, Source.GUESS) if has_experts else 0,
    )


def _rotation(left_out: Mapping[str, str], facts: Settling) -> str | None:
    """Which coordinates RoPE turns together, as far as saved buffers show it."""
    buffers = [name for name, reason in left_out.items() if reason == LeftOut.BUFFER]
    if any("freqs" in name for name in buffers):
        return facts.settle("rope", "interleaved")
    if any(word in name for word in ROTATIONS_SAVED for name in buffers):
        return facts.settle("rope", "half")
    return facts.settle("rope", "interleaved", Source.GUESS)


def _context_length(tensors: dict[str, Tensor], checkpoint: Checkpoint, facts: Settling) -> int:
    """How long the context is: what the config says, if a table of positions has more rows, or else its rows.

    Raises:
        UserError: nothing says it.
    """
    table = tensors.get("position_embedding.weight")
    if table is None:
        length = facts.settle("context_length", 0, Source.GUESS)
        if facts.by_author and not length:
            length = facts.add(facts.by_author)
        if not length:
            silent = "neither a config nor the code" if facts.by_author else "no config"
            code = "" if facts.by_author else ", or pass --reference FOLDER with code that says it"
            raise UserError(
                f"There is no table of positions, and {silent} says how long the context is; write the line "
                f"`context_length: N` into a YAML file and pass it as --mapping{code}."
            )
        return length
    said = from_config(checkpoint.config, "context_length")
    if isinstance(said, int) and 0 < said < len(table):
        return facts.settle("context_length", said)
    return len(table)


def _qk_norm(tensors: Mapping[str, Tensor], n_head: int) -> str | None:
    """The kind of norm of queries and keys, by the shape of its weights, if it has any."""
    weight, rows = tensors.get("blocks.0.query_norm.weight"), len(tensors["blocks.0.query.weight"])
    if weight is None:
        return None
    return "width" if len(weight) == rows != rows // n_head else "head"


def _open_facts(gpt: CanonicalGPT, checkpoint: Checkpoint, facts: Settling) -> CanonicalGPT:
    """The model with every fact that its tensors leave open, as it is stated, settled or assumed."""
    facts.compute(gpt)
    idle = {name for name, fact in facts.told.items() if is_usual(fact)}  # said to be absent, and asked or not
    questions = dict.fromkeys(sorted(RARE & facts.stated_names() - idle)) | asked(gpt)
    # Where the config says as many positions as there are rows, the first position has the first row.
    rows = from_config(checkpoint.config, "context_length")
    sources = {"position_offset": Source.CONFIG} if rows == gpt.context_length else {}
    values = {
        name: facts.settle(name, default, sources.get(name, Source.PRACTICE))
        for name, default in questions.items()
        if name != "rope"
    }
    if "norm" not in values:
        facts.show("norm", "layernorm")
    masks = [name for name, reason in checkpoint.left_out.items() if reason == LeftOut.MASK or MASK.search(name)]
    if masks and gpt.causal and facts["causal"].assumed:
        facts.show("causal", True)
    return within_table(replace(gpt, **values))


def _kinds_of_norm(gpt: CanonicalGPT, structure: Structure, facts: Settling) -> CanonicalGPT:
    """The model with the kind of variance and epsilon that norms have. nn.LayerNorm's names leave no question."""
    names = [name for name, role in structure.roles.items() if "norm" in role and role.endswith(".weight")]
    if not names:
        return gpt
    by_hand = not all(name.endswith("weight") for name in names)
    unbiased = facts.settle("norm_unbiased", False, Source.PRACTICE if by_hand else Source.TORCH_NORM)
    by_hand = by_hand or gpt.norm == "rmsnorm"
    outside = facts.settle("norm_eps_outside", False, Source.PRACTICE if by_hand else Source.TORCH_NORM)
    return replace(gpt, norm_unbiased=unbiased, norm_eps_outside=outside)


def _positions(gpt: CanonicalGPT, checkpoint: Checkpoint, facts: Settling) -> CanonicalGPT:
    """The model with the positions that it most likely has, if no tensor holds them."""
    if not _may_rotate(gpt.tensors):
        return gpt
    saved = any(word in name for word in ("freqs", *ROTATIONS_SAVED) for name in checkpoint.left_out)
    known = saved or "rope" in facts.stated_names()
    return with_positions(gpt, facts.settle("positions", "rotary", Source.DEFAULT if known else Source.GUESS))


def _orders(gpt: CanonicalGPT, structure: Structure, facts: Settling) -> CanonicalGPT:
    """The model with tensors in the order that the facts about order say."""
    for name in sorted(structure.proposed):
        default = "qkv" if name == "qkv_order" else False
        source = Source.PRACTICE if name == "gate_order" else Source.GUESS
        gpt = reordered(gpt, name, facts.settle(name, default, source))
    for name, roles in SQUARES.items():
        square = [source for source, role in structure.roles.items() if is_square(gpt, role, roles)]
        square = [source for source in square if source not in structure.oriented]
        if square:
            in_out = any(source in structure.transposed for source in square)
            by_torch = all(source.endswith("weight") for source in square)
            settled = facts.settle(name, in_out, Source.ALIKE if by_torch else Source.PRACTICE)
            gpt = reordered(gpt, name, settled != in_out)
    fused = any(re.fullmatch(r".*\.[qkv]{3}\.weight", role) for role in structure.roles.values())
    if fused and facts.settle("qkv_by_head", False):
        return regroup(gpt)
    return gpt


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
    per_token = [key for key in gpt.tensors if key in PER_TOKEN or key.endswith(".value_embedding.weight")]
    cut = {key: gpt.tensors[key][:tokens] for key in per_token}
    said = f"The last {rows - tokens} of {rows} embedding rows, which pad the vocabulary, are cut off."
    return replace(gpt, tensors={**gpt.tensors, **cut}), [said]
