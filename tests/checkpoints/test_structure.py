from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from architectures import NAMINGS, REFUSED, FlatGPT, Spec, gpt_of, naming, specs, tensors_of
from families import FAMILIES
from hand_written import HEADS, VARIANTS, WIDTH, build, own_logits, stated, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.checkpoints.assembly import QKV_ORDERS
from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.guessing import guess_roles
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.roles import detect, name_by_layout
from fledge.checkpoints.structure import Structure
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # names and shapes are drawn at random

# The tensors of a block whose attention and MLP bear the words that most authors use, one layer and two heads.
ROLES = {
    "student": """
        tok_emb.weight=token_embedding.weight pos_emb.weight=position_embedding.weight
        blocks.0.ln1.weight=blocks.0.norm_1.weight blocks.0.ln1.bias=blocks.0.norm_1.bias
        blocks.0.attn.qkv.weight=blocks.0.qkv.weight blocks.0.attn.proj.weight=blocks.0.output.weight
        blocks.0.ln2.weight=blocks.0.norm_2.weight blocks.0.ln2.bias=blocks.0.norm_2.bias
        blocks.0.ffn.0.weight=blocks.0.mlp_in.weight blocks.0.ffn.0.bias=blocks.0.mlp_in.bias
        blocks.0.ffn.2.weight=blocks.0.mlp_out.weight blocks.0.ffn.2.bias=blocks.0.mlp_out.bias
        ln_f.weight=final_norm.weight ln_f.bias=final_norm.bias head.weight=head.weight""",
    "lecture": """
        token_embedding_table.weight=token_embedding.weight position_embedding_table.weight=position_embedding.weight
        blocks.0.sa.heads.0.query.weight=blocks.0.query.0.weight blocks.0.sa.heads.0.key.weight=blocks.0.key.0.weight
        blocks.0.sa.heads.0.value.weight=blocks.0.value.0.weight
        blocks.0.sa.heads.1.query.weight=blocks.0.query.1.weight blocks.0.sa.heads.1.key.weight=blocks.0.key.1.weight
        blocks.0.sa.heads.1.value.weight=blocks.0.value.1.weight
        blocks.0.sa.proj.weight=blocks.0.output.weight blocks.0.sa.proj.bias=blocks.0.output.bias
        blocks.0.ffwd.net.0.weight=blocks.0.mlp_in.weight blocks.0.ffwd.net.0.bias=blocks.0.mlp_in.bias
        blocks.0.ffwd.net.2.weight=blocks.0.mlp_out.weight blocks.0.ffwd.net.2.bias=blocks.0.mlp_out.bias
        blocks.0.ln1.weight=blocks.0.norm_1.weight blocks.0.ln1.bias=blocks.0.norm_1.bias
        blocks.0.ln2.weight=blocks.0.norm_2.weight blocks.0.ln2.bias=blocks.0.norm_2.bias
        ln_f.weight=final_norm.weight ln_f.bias=final_norm.bias lm_head.weight=head.weight lm_head.bias=head.bias""",
    "sinusoidal": """
        pos_encoder.pe=position_embedding.weight
        transformer_encoder.layers.0.self_attn.in_proj_weight=blocks.0.qkv.weight
        transformer_encoder.layers.0.self_attn.in_proj_bias=blocks.0.qkv.bias
        transformer_encoder.layers.0.self_attn.out_proj.weight=blocks.0.output.weight
        transformer_encoder.layers.0.self_attn.out_proj.bias=blocks.0.output.bias
        transformer_encoder.layers.0.linear1.weight=blocks.0.mlp_in.weight
        transformer_encoder.layers.0.linear1.bias=blocks.0.mlp_in.bias
        transformer_encoder.layers.0.linear2.weight=blocks.0.mlp_out.weight
        transformer_encoder.layers.0.linear2.bias=blocks.0.mlp_out.bias
        transformer_encoder.layers.0.norm1.weight=blocks.0.norm_1.weight
        transformer_encoder.layers.0.norm1.bias=blocks.0.norm_1.bias
        transformer_encoder.layers.0.norm2.weight=blocks.0.norm_2.weight
        transformer_encoder.layers.0.norm2.bias=blocks.0.norm_2.bias
        transformer_encoder.norm.weight=final_norm.weight transformer_encoder.norm.bias=final_norm.bias
        embedding.weight=token_embedding.weight linear.weight=head.weight linear.bias=head.bias""",
    "llama2c": """
        tok_embeddings.weight=token_embedding.weight layers.0.attention.wq.weight=blocks.0.query.weight
        layers.0.attention.wk.weight=blocks.0.key.weight layers.0.attention.wv.weight=blocks.0.value.weight
        layers.0.attention.wo.weight=blocks.0.output.weight layers.0.feed_forward.w1.weight=blocks.0.mlp_gate.weight
        layers.0.feed_forward.w2.weight=blocks.0.mlp_out.weight layers.0.feed_forward.w3.weight=blocks.0.mlp_in.weight
        layers.0.attention_norm.weight=blocks.0.norm_1.weight layers.0.ffn_norm.weight=blocks.0.norm_2.weight
        norm.weight=final_norm.weight output.weight=head.weight""",
    "llama_half": """
        embed_tokens.weight=token_embedding.weight layers.0.self_attn.q_proj.weight=blocks.0.query.weight
        layers.0.self_attn.k_proj.weight=blocks.0.key.weight layers.0.self_attn.v_proj.weight=blocks.0.value.weight
        layers.0.self_attn.o_proj.weight=blocks.0.output.weight layers.0.mlp.gate_proj.weight=blocks.0.mlp_gate.weight
        layers.0.mlp.up_proj.weight=blocks.0.mlp_in.weight layers.0.mlp.down_proj.weight=blocks.0.mlp_out.weight
        layers.0.input_layernorm.weight=blocks.0.norm_1.weight
        layers.0.post_attention_layernorm.weight=blocks.0.norm_2.weight
        norm.weight=final_norm.weight lm_head.weight=head.weight""",
}
SPEC = Spec(vocab_size=40, context_length=10, heads=2, head_width=8, layers=2, mlp_width=64, naming=NAMINGS[0])
PLAIN = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
ALIKE = {
    "V = T": {"vocab_size": 16, "context_length": 16},
    "V = D": {"vocab_size": 16},
    "T = D": {"context_length": 16},
    "F = D": {"mlp_width": 16},
    "F = 3D": {"mlp_width": 48},
    "all": {"vocab_size": 16, "context_length": 16, "mlp_width": 16},
}


def words(**changed: str) -> Spec:
    """SPEC by an author of other words."""
    return replace(SPEC, naming=SPEC.naming._replace(**changed))


def roles_of(spec: Spec) -> dict[str, str]:
    """Canonical role of each of its author's names."""
    words = {"tokens": "token_embedding.weight", "positions": "position_embedding.weight", "gain": "weight"}
    words |= {"shift": "bias", "up": "mlp_in", "down": "mlp_out"}
    return {name: ".".join(words.get(word, word) for word in role.split(".")) for role, name, _ in tensors_of(spec)}


def stored_in_out(spec: Spec) -> dict[str, torch.Tensor]:
    """Its tensors as an author has them who multiplies from the left: x @ W."""
    inside = {name for name, role in roles_of(spec).items() if role.startswith("blocks.")}
    tensors = gpt_of(spec).state_dict()
    return {
        name: tensor.T.contiguous() if name in inside and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def logit_error(gpt: FlatGPT, tensors=None, roles=None, told=None) -> float:
    """Largest |Δ logit| between `gpt` and what its tensors, or those given, are taken for."""
    spec = gpt.spec
    told = (told or {}) | stated(
        n_head=spec.heads, activation=spec.activation, attention_scale=spec.score_scale, norm="layernorm"
    )
    found, _ = recognise(Checkpoint(tensors or gpt.state_dict(), {}, {}, {}), roles=roles, told=told)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(spec.vocab_size, (2, spec.context_length), generator=generator)
    return (canonical_logits(found, ids) - gpt.double()(ids)).abs().max().item()


def refusal(tensors, n_head=HEADS, roles=None) -> str:
    with pytest.raises(UserError) as refused:
        recognise(Checkpoint(tensors, {}, {}, {}), roles=roles, told=stated(n_head=n_head))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("variant", ROLES)
def test_every_tensor_has_its_role(variant):
    structure = detect(weights_of(build(variant, heads=2, layers=1)[0]), {})
    assert structure.roles == dict(pair.split("=") for pair in ROLES[variant].split())
    # Of w1 and w3 the lower number is the gate, by usual practice alone.
    assert structure == Structure(structure.roles, proposed={"gate_order"} if variant == "llama2c" else set())


def test_matrices_stored_in_out_are_those_of_the_blocks():
    structure = detect(weights_of(build("hf_gpt2_like", layers=1)[0]), {})
    assert structure.transposed == {
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs())
def test_authors_nobody_listed_are_read(spec):
    gpt = gpt_of(spec)
    assert detect(gpt.state_dict(), {}).roles == roles_of(spec)
    assert logit_error(gpt) <= 1e-9


@pytest.mark.parametrize("qkv", ["separate", "fused", "per_head", "fused_conv1d"])
@pytest.mark.parametrize("alike", ALIKE)
def test_tensors_of_equal_shape_are_told_apart_by_their_names(alike, qkv):
    for words in NAMINGS:
        for rest in ({}, PLAIN | {"head": "tied"}):
            assert logit_error(gpt_of(replace(SPEC, naming=words, qkv=qkv, **ALIKE[alike], **rest))) <= 1e-9


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(replace(SPEC, qkv="fused", **PLAIN), id="the fused shape"),
        pytest.param(replace(SPEC, qkv="fused", **PLAIN, mlp_width=48), id="the fused shape, F = 3D"),
        pytest.param(replace(SPEC, qkv="fused", **PLAIN, mlp_width=16), id="the fused shape, F = D"),
        pytest.param(replace(SPEC, qkv="separate", qkv_bias=False), id="the MLP's bias"),
        pytest.param(replace(SPEC, qkv="per_head", output_bias=False, mlp_bias=False), id="the heads' bias"),
        pytest.param(replace(words(up="ffn.up", down="ffn.down"), **PLAIN), id="words in the MLP's names"),
        pytest.param(replace(words(up="ffn.w1", down="ffn.w2"), **PLAIN), id="numbers in the MLP's names"),
    ],
)
def test_matrices_stored_in_out_are_told_by(spec):
    assert logit_error(gpt_of(spec)) <= 1e-9
    assert logit_error(gpt_of(spec), stored_in_out(spec)) <= 1e-9


# What the order of definition alone proposes, the fact about it, and what a mapping says of it.
PROPOSED = {
    "token embedding or head": (
        words(tokens="alpha", head="beta"),
        "ends_order",
        {"alpha": "token_embedding"},
    ),
    "order of the norms": (
        words(norm_1="left", norm_2="right"),
        "norm_order",
        {"encoder.layers.{n}.left": "blocks.{n}.norm_1", "encoder.layers.{n}.right": "blocks.{n}.norm_2"},
    ),
    "order of a square MLP": (
        replace(words(up="ffn.left", down="ffn.right"), mlp_width=16),
        "mlp_order",
        {"encoder.layers.{n}.ffn.left": "blocks.{n}.mlp_in", "encoder.layers.{n}.ffn.right": "blocks.{n}.mlp_out"},
    ),
    "query, key and value": (
        words(query="red", key="green", value="blue"),
        "qkv_order",
        {
            f"encoder.layers.{{n}}.attention.{color}": f"blocks.{{n}}.{part}"
            for color, part in {"red": "query", "green": "key", "blue": "value"}.items()
        },
    ),
    "heads one by one": (
        replace(words(query="red", key="green", value="blue"), qkv="per_head"),
        "qkv_order",
        {
            f"encoder.layers.{{n}}.attention.heads.{{h}}.{color}": f"blocks.{{n}}.{part}.{{h}}"
            for color, part in {"red": "query", "green": "key", "blue": "value"}.items()
        },
    ),
}


@pytest.mark.parametrize("case", PROPOSED)
def test_what_only_the_order_of_definition_tells_is_an_open_question(case):
    spec, fact, roles = PROPOSED[case]
    gpt = gpt_of(spec)
    assert detect(gpt.state_dict(), {}).proposed == {fact}
    found = {f.name: f for f in recognise(Checkpoint(gpt.state_dict(), {}, {}, {}), told=stated(n_head=2))[1]}
    assert found[fact].assumed
    assert logit_error(gpt) <= 1e-9
    assert logit_error(gpt, roles=roles) <= 1e-9
    assert not detect(gpt.state_dict(), roles).proposed


@pytest.mark.parametrize("order", QKV_ORDERS)
@pytest.mark.parametrize("qkv", ["separate", "per_head"])
def test_each_order_of_query_key_and_value_can_be_said(order, qkv):
    parts = {"q": "query", "k": "key", "v": "value"}
    gpt = gpt_of(replace(words(query="red", key="green", value="blue"), qkv=qkv))
    source = gpt.state_dict()
    # The author defined them in this order, under names that say nothing.
    names = dict(zip(("red", "green", "blue"), (parts[letter] for letter in order), strict=True))
    real = {"query": "red", "key": "green", "value": "blue"}
    renamed = {}
    for name, tensor in source.items():
        color = next((color for color in names if f".{color}." in name), None)
        renamed[name] = source[name.replace(color, real[names[color]])] if color else tensor
    assert logit_error(gpt, renamed, told=stated(qkv_order=order)) <= 1e-9
    assert order == "qkv" or logit_error(gpt, renamed) > 1e-6


# What cannot be told, the tensors that the message must name, and the words that settle it.
AMBIGUOUS = {
    "three tables of one size": (
        replace(words(tokens="alpha", head="beta", positions="gamma.weight"), vocab_size=10),
        "alpha.weight, gamma.weight: which is the token embedding and which the head?",
        {"alpha": "token_embedding", "beta": "head", "gamma": "position_embedding"},
    ),
    "output projection among squares": (
        replace(words(attention="core", output="out", up="core.proj", down="core.back"), mlp_width=16),
        "encoder.layers.0.core.out.weight, encoder.layers.0.core.proj.weight: which is the attention's output "
        "projection?",
        {
            "encoder.layers.{n}.core.out": "blocks.{n}.output",
            "encoder.layers.{n}.core.proj": "blocks.{n}.mlp_in",
            "encoder.layers.{n}.core.back": "blocks.{n}.mlp_out",
        },
    ),
    "fused or not": (
        replace(words(qkv="mix"), qkv="fused", mlp_width=48),
        "Layer 0 has no tensor that is known as query, key and value.",
        {"encoder.layers.{n}.attention.mix": "blocks.{n}.qkv"},
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_cannot_be_told_is_asked_and_named_by_hand(case):
    spec, question, roles = AMBIGUOUS[case]
    gpt = gpt_of(spec)
    message = refusal(gpt.state_dict(), spec.heads)
    assert message.startswith(question)
    assert "--mapping" in message
    assert logit_error(gpt, roles=roles) <= 1e-9


OPAQUE = naming("x1 x2 x3 x4", "x.{} x5 x6 weight bias", "x7 x8 x9 x10 x11 x12 x13", "x14 x15")


@pytest.mark.parametrize("naming", [OPAQUE, OPAQUE._replace(block="x{}x")])
@pytest.mark.parametrize("qkv", ["separate", "fused", "per_head"])
def test_every_name_may_be_given_by_hand(qkv, naming):
    spec = replace(SPEC, naming=naming, qkv=qkv, head="biased")
    roles = {path_of(name): path_of(role) for name, role in roles_of(spec).items()}
    assert logit_error(gpt_of(spec), roles=roles) <= 1e-9


def path_of(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


PAIRS = naming(
    "token_emb pos_emb.weight norm to_logits",
    "layers.{} 0.norm 1.net.0 weight bias",
    "0 heads to_q to_k to_v to_qkv to_out",
    "1.net.1 1.net.4",
)


@pytest.mark.parametrize("qkv", ["separate", "fused", "per_head"])
def test_layers_that_are_lists_of_attention_and_mlp_are_read(qkv):
    spec = replace(SPEC, naming=PAIRS, qkv=qkv)
    assert detect(gpt_of(spec).state_dict(), {}).roles == roles_of(spec)
    assert logit_error(gpt_of(spec)) <= 1e-9


def test_bias_of_a_tied_head_is_read_though_its_weight_was_not_saved():
    spec = replace(SPEC, naming=NAMINGS[2], head="biased")
    gpt = gpt_of(spec)
    gpt.tensors["head.weight"] = gpt.tensors["tokens"]
    tensors = gpt.state_dict()
    del tensors["lm_head.weight"]
    assert logit_error(gpt, tensors) <= 1e-9


@pytest.mark.parametrize(("names", "gate"), [("w1 w2 w3", "w1"), ("up down gate", "gate"), ("fc_1 fc_2 proj", "fc_1")])
def test_gate_is_told_by_its_word_or_the_lower_number(names, gate):
    first, second, third = names.split()
    tensors = weights_of(build("story_chat", layers=1)[0])
    renamed = {"blocks.0.mlp.w1.": first, "blocks.0.mlp.w2.": second, "blocks.0.mlp.w3.": third}
    if third == "proj":
        renamed = {"blocks.0.mlp.w1.": first, "blocks.0.mlp.w3.": second, "blocks.0.mlp.w2.": third}
    for old, new in renamed.items():
        tensors = {name.replace(old, f"blocks.0.mlp.{new}."): tensor for name, tensor in tensors.items()}
    assert detect(tensors, {}).roles[f"blocks.0.mlp.{gate}.weight"] == "blocks.0.mlp_gate.weight"


def with_mlp(names: str, width: int) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in weights_of(build("story_chat")[0]).items() if ".mlp." not in name}
    for n in range(2):
        shapes = dict.fromkeys(names.split()[:2], (width, WIDTH)) | {names.split()[2]: (WIDTH, width)}
        tensors |= {f"blocks.{n}.mlp.{name}.weight": torch.ones(shape) for name, shape in sorted(shapes.items())}
    return tensors


def test_gate_that_nothing_tells_is_an_open_question():
    assert detect(with_mlp("left right back", 96), {}).proposed == {"gate_order"}
    assert not detect(with_mlp("gate_proj up_proj down_proj", 96), {}).proposed


@pytest.mark.parametrize("gate_order", [False, True])
def test_gate_may_be_half_of_a_matrix(gate_order):
    module = build("story_chat")[0]
    tensors = weights_of(module)
    for n in range(2):
        halves = [tensors.pop(f"blocks.{n}.mlp.{name}.weight") for name in ("w1", "w3")]
        tensors[f"blocks.{n}.mlp.up.weight"] = torch.cat(halves[::-1] if gate_order else halves)
    told = stated(n_head=HEADS, activation="silu", rope="interleaved", context_length=20, gate_order=gate_order)
    gpt, _ = recognise(Checkpoint(tensors, {}, {}, {}), told=told)
    ids = torch.arange(20)[None]
    assert (canonical_logits(gpt, ids) - own_logits(module, ids)).abs().max() <= 1e-9
    del told["gate_order"]
    assert next(f for f in recognise(Checkpoint(tensors, {}, {}, {}), told=told)[1] if f.name == "gate_order").assumed


def test_mlp_on_each_position_is_no_table_of_positions():
    spec = words(up="pos_ffn.conv1", down="pos_ffn.conv2")
    tensors = {n: t[..., None] if "conv" in n and t.dim() == 2 else t for n, t in gpt_of(spec).state_dict().items()}
    assert logit_error(gpt_of(spec), tensors) <= 1e-9


def test_square_mlp_with_a_gate_that_nothing_tells_is_asked():
    assert refusal(with_mlp("a1 a3 a2", WIDTH)).startswith(
        "blocks.0.mlp.a1.weight, blocks.0.mlp.a2.weight, blocks.0.mlp.a3.weight: which of them leads back"
    )


# What a checkpoint of each known layout holds; torch_layers and mha have no table.
TABLED = {name: weights_of(build(name)[0]) for name in VARIANTS} | {n: f.weights() for n, f in FAMILIES.items()}
UNTABLED = {"torch_layers", "mha", "sinusoidal", "sinusoidal_scaled"}


@pytest.mark.parametrize("name", TABLED)
def test_table_of_a_layout_agrees_with_shapes_and_words(name):
    known = name_by_layout(TABLED[name])
    assert (known is None) == (name in UNTABLED)
    assert detect(TABLED[name], {}) == guess_roles(TABLED[name], Structure())


def test_mapping_of_every_name_may_not_hold_a_single_number():
    roles = {"tok": "token_embedding", "l.{n}.q": "blocks.{n}.query"}
    tensors = {"tok.weight": torch.tensor(1.0), "l.0.q.weight": torch.ones(4, 4)}
    assert refusal(tensors, roles=roles) == "tok.weight has the shape (), and no weight is a single number."


# Changes to nanoGPT's tensors, and what is said of them.
H, NANO = "transformer.h", weights_of(build("nanogpt")[0])
BROKEN = {
    "nothing in it": ({}, "No numbered layers with norms as wide as an embedding were found."),
    "no layers": (
        {name: tensor for name, tensor in NANO.items() if ".h." not in name},
        "No numbered layers with norms as wide as an embedding were found.",
    ),
    "first layer gone": (
        {name: tensor for name, tensor in NANO.items() if ".h.0." not in name},
        "The checkpoint's layers are numbered [1]; they must run from 0 without a gap.",
    ),
    "layers from one": (
        {name.replace(".h.1.", ".h.2.").replace(".h.0.", ".h.1."): tensor for name, tensor in NANO.items()},
        "The checkpoint's layers are numbered [1, 2]; they must run from 0 without a gap.",
    ),
    "layer gone between others": (
        {name.replace(".h.1.", ".h.2."): tensor for name, tensor in NANO.items()},
        "The checkpoint's layers are numbered [0, 2]; they must run from 0 without a gap.",
    ),
    "unknown tensor": (
        NANO | {"transformer.surprise": torch.ones(3, 3)},
        "transformer.surprise has no role in a GPT (1 such tensors in all).",
    ),
    "unknown tensors in a layer": (
        NANO | {f"{H}.1.attn.{name}": torch.ones(2, 3, 4) for name in ("rel", "dist")},
        f"{H}.1.attn.rel has no role in a GPT (2 such tensors in all).",
    ),
    "two stacks": (
        NANO | {name.replace(".h.", ".g."): tensor for name, tensor in NANO.items() if ".h." in name},
        "one embedding more than a GPT has",
    ),
    "second head": (NANO | {"value_head.weight": torch.ones(61, WIDTH)}, "one embedding more than a GPT has"),
    "norm gone": (
        {name: tensor for name, tensor in NANO.items() if f"{H}.1.ln_2" not in name},
        "Layer 1 and layer 0 differ in norm_2.bias, norm_2.weight; all must be alike.",
    ),
    "attention gone": (
        {name: tensor for name, tensor in NANO.items() if f"{H}.1.attn.c_attn" not in name},
        "Layer 1 has no tensor that is known as query, key and value.",
    ),
    "MLP gone": (
        {name: tensor for name, tensor in NANO.items() if f"{H}.1.mlp.c_fc" not in name},
        "blocks.1 has 1 matrices besides the attention's, and an MLP two or three.",
    ),
    "bias gone": (
        {name: tensor for name, tensor in NANO.items() if name != f"{H}.1.mlp.c_fc.bias"},
        "Layer 1 and layer 0 differ in mlp_in.bias; all must be alike.",
    ),
    "output projection gone": (
        {name: tensor for name, tensor in NANO.items() if f"{H}.1.attn.c_proj" not in name},
        "Layer 1 and layer 0 differ in output.bias, output.weight; all must be alike.",
    ),
    "output projection twice": (
        NANO | {f"{H}.{n}.attn.c_proj_2.weight": torch.ones(WIDTH, WIDTH) for n in range(2)},
        f"{H}.0.attn.c_proj.weight, {H}.0.attn.c_proj_2.weight: which is the attention's output projection?",
    ),
    "query beside the fused projections": (
        NANO | {f"{H}.{n}.attn.{part}.weight": torch.ones(WIDTH, WIDTH) for n in range(2) for part in "qkv"},
        "Two tensors were taken for blocks.0.query.weight",
    ),
    "attention over a memory": (
        NANO | {f"{H}.{n}.cross.{part}.weight": torch.ones(WIDTH, WIDTH) for n in range(2) for part in "qkv"},
        "Layer 0 has 2 attentions (attn, cross), and a GPT's has one",
    ),
    "tanh in place of a norm": (
        NANO | {f"{H}.{n}.ln_1.alpha": torch.ones(1) for n in range(2)},
        f"{H}.0.ln_1.alpha: one learned number, as a tanh in place of a norm has (DyT)",
    ),
    **{
        f"adapter {name}": (NANO | {f"{H}.0.attn.c_attn.{name}": torch.ones(2, WIDTH)}, f"{name}: a LoRA adapter")
        for name in ("lora_A", "lora_B.default.weight", "lora.A.weight")
    },
    "bias on the token embedding": (NANO | {"transformer.wte.bias": torch.ones(61)}, "token_embedding.bias is"),
    "bias on the positions": (NANO | {"transformer.wpe.bias": torch.ones(20)}, "position_embedding.bias is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_with_what_is_wrong(case):
    tensors, reason = BROKEN[case]
    assert reason in refusal(tensors)


@pytest.mark.parametrize(
    ("gone", "numbers"),
    [
        (["blocks.1.mha.heads.1.q."], "blocks.1.query.weight are numbered [0, 2]"),
        (["blocks.0.mha.heads.0.v.bias"], "blocks.0.value.bias are numbered [1, 2]"),
        (["blocks.1.mha.heads.2."], "blocks.1.query.weight are numbered [0, 1]"),
        ([f"blocks.{n}.mha.heads.1.{part}." for n in range(2) for part in "qkv"], "are numbered [0, 2]"),
    ],
)
def test_missing_heads_are_named(gone, numbers):
    tensors = weights_of(build("per_head")[0])
    tensors = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
    assert numbers in refusal(tensors)


def test_norm_of_the_embeddings_is_told_from_the_final_one():
    norm = {"transformer.emb_norm.weight": torch.ones(WIDTH), "transformer.emb_norm.bias": torch.ones(WIDTH)}
    for tensors in (NANO | norm, {name.replace("emb_", "first_"): t for name, t in norm.items()} | NANO):
        gpt, _ = recognise(Checkpoint(tensors, {}, {}, {}), told=stated(n_head=HEADS))
        assert gpt.embedding_norm
        assert torch.equal(gpt.tensors["final_norm.weight"], NANO["transformer.ln_f.weight"])
        assert torch.equal(gpt.tensors["embedding_norm.weight"], torch.ones(WIDTH))


@pytest.mark.parametrize("name", ["in_f", "ln_f", "final", "pre_head"])
def test_single_norm_behind_the_layers_is_the_final_one(name):
    tensors = {key.replace("ln_f", name): tensor for key, tensor in NANO.items()}
    gpt, _ = recognise(Checkpoint(tensors, {}, {}, {}), told=stated(n_head=HEADS))
    assert (gpt.final_norm, gpt.embedding_norm) == (True, False)
    assert torch.equal(gpt.tensors["final_norm.weight"], NANO["transformer.ln_f.weight"])


# What must be said of each, because no tensor shows it.
SAID = {
    "post_norm": {"norm_placement": "post"},
    "parallel": {"parallel": True},
    "non_causal": {"causal": False},
    "alibi": {"context_length": 20},
    "no_final_norm": {},
    "qk_norm": {},
    "four_norms": {},
}


@pytest.mark.parametrize("variant", REFUSED)
def test_architectures_beyond_gpt2_are_read_for_what_they_compute(variant):
    module, config = REFUSED[variant]()
    tensors = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(".attn.bias")}
    if variant not in SAID:
        assert refusal(tensors).startswith("transformer.h.0.pos_emb.weight: an embedding inside a layer")
        return
    gpt, _ = recognise(Checkpoint(tensors, config, {}, {}), told=stated(activation="gelu", **SAID[variant]))
    ids = torch.randint(gpt.vocab_size, (2, gpt.context_length), generator=torch.Generator().manual_seed(1))
    assert (canonical_logits(gpt, ids) - own_logits(module, ids)).abs().max() <= 1e-9


WORDS = {word for words in NAMINGS for name in words for word in name.format(0).split(".")} | {"0", "1", "bias", "x"}
NAMES = st.lists(st.sampled_from(sorted(WORDS)), min_size=1, max_size=5).map(".".join)
SHAPES = st.lists(st.sampled_from([0, 1, 4, 8, 12, 16]), max_size=4)
FUZZ = settings(max_examples=100, deadline=None, derandomize=True)


@FUZZ
@given(st.dictionaries(NAMES, SHAPES, max_size=20))
def test_any_names_and_shapes_are_read_or_refused(shapes):
    with suppress(UserError):
        recognise(Checkpoint({name: torch.ones(shape) for name, shape in shapes.items()}, {}, {}, {}))


@FUZZ
@given(specs(), st.data())
def test_any_damage_to_names_and_shapes_is_read_or_refused(spec, data):
    tensors = gpt_of(spec).state_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        kept = tensors.pop(name)
        renamed = data.draw(st.one_of(st.just(name), NAMES))
        turned = kept.T if kept.dim() == 2 else kept
        tensors[renamed] = data.draw(st.one_of(st.sampled_from([kept, kept.half(), turned]), SHAPES.map(torch.ones)))
    with suppress(UserError):
        recognise(Checkpoint(tensors, {}, {}, {}))
