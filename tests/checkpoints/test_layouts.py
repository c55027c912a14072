import pytest
import torch
from hand_written import CONTEXT_LENGTH, HEADS, LAYERS, VOCAB_SIZE, WIDTH, build, weights_of

from fledge.checkpoints.layouts import LAYOUTS, recognise
from fledge.checkpoints.loading import Checkpoint
from fledge.cli import UserError


def checkpoint(tensors, config=None):
    return Checkpoint(tensors, config or {}, left_out={}, source={})


def own_checkpoint(variant, with_config=True):
    module, config = build(variant)
    return checkpoint(weights_of(module), config if with_config else {})


def assert_refused(tensors, match, **keys):
    with pytest.raises(UserError, match=match) as refused:
        recognise(checkpoint(tensors), n_head=HEADS, **keys)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variant", "layout", "activation", "tied"),
    [
        ("scratch", "scratch", "gelu_tanh", True),
        ("per_head", "per_head", "gelu", False),
        ("book", "book", "gelu_tanh", False),
        ("book_qkv_bias", "book", "gelu_tanh", False),
        ("nanogpt", "nanogpt", "gelu", True),
        ("nanogpt_no_bias", "nanogpt", "gelu", True),
    ],
)
def test_layout_is_recognised_by_its_names(variant, layout, activation, tied):
    gpt, facts = recognise(own_checkpoint(variant))
    assert {fact.name: fact.value for fact in facts} == {
        "layout": layout,
        "n_head": HEADS,
        "activation": activation,
        "attention_scale": (WIDTH // HEADS) ** -0.5,
        "norm_eps": 1e-5,
        "norm placement": "pre-norm",
        "tied head": tied,
    }
    assert (gpt.n_layer, gpt.n_head, gpt.activation, gpt.tied) == (LAYERS, HEADS, activation, tied)
    assert (gpt.vocab_size, gpt.context_length, gpt.width) == (VOCAB_SIZE, CONTEXT_LENGTH, WIDTH)
    assert all(tensor.dtype == torch.float64 for tensor in gpt.tensors.values())


def sources(*args, **keys):
    return {fact.name: fact.source for fact in recognise(*args, **keys)[1]}


def test_each_fact_names_where_it_comes_from():
    assert sources(own_checkpoint("scratch")) == {
        "layout": "tensor names",
        "n_head": "checkpoint config",
        "activation": "layout default",
        "attention_scale": "layout default",
        "norm_eps": "layout default",
        "norm placement": "layout default",
        "tied head": "tensors",
    }
    forced = sources(own_checkpoint("scratch"), layout="scratch", n_head=2, activation="relu", attention_scale=0.5)
    assert forced["layout"] == "--layout"
    assert forced["n_head"] == "--n_head"
    assert forced["activation"] == "--activation"
    assert forced["attention_scale"] == "--attention_scale"


def test_flags_outrank_config_and_defaults():
    gpt, _ = recognise(own_checkpoint("scratch"), n_head=2, activation="relu", attention_scale=0.5)
    assert (gpt.n_head, gpt.activation, gpt.attention_scale) == (2, "relu", 0.5)


def test_heads_saved_one_by_one_are_counted():
    _, facts = recognise(own_checkpoint("per_head", with_config=False))
    assert {fact.name: (fact.value, fact.source) for fact in facts}["n_head"] == (HEADS, "tensors")


def test_heads_in_the_tensors_outrank_a_config_that_disagrees():
    tensors = own_checkpoint("per_head").tensors
    assert recognise(checkpoint(tensors, {"num_heads": 2 * HEADS}))[0].n_head == HEADS


@pytest.mark.parametrize("key", ["n_head", "n_heads", "num_heads", "num_attention_heads"])
def test_config_may_call_the_heads_by_any_usual_name(key):
    tensors = own_checkpoint("nanogpt").tensors
    assert recognise(checkpoint(tensors, {key: HEADS}))[0].n_head == HEADS


@pytest.mark.parametrize("config", [{}, {"n_head": 0}, {"n_head": None}, {"n_head": "many"}, {"n_head": [3]}])
def test_unknown_number_of_heads_asks_for_n_head(config):
    with pytest.raises(UserError, match=f"--n_head.*{WIDTH}"):
        recognise(checkpoint(own_checkpoint("nanogpt").tensors, config))


@pytest.mark.parametrize("n_head", [5, WIDTH + 1, 2 * WIDTH, -HEADS])
def test_number_of_heads_that_does_not_divide_the_width_is_refused(n_head):
    tensors = own_checkpoint("nanogpt").tensors
    with pytest.raises(UserError, match=f"n_head {n_head} .*{WIDTH}"):
        recognise(checkpoint(tensors), n_head=n_head)
    with pytest.raises(UserError, match=f"n_head {n_head} .*{WIDTH}"):
        recognise(checkpoint(tensors, {"n_head": n_head}))


@pytest.mark.parametrize("variant", ["scratch", "per_head", "book", "nanogpt"])
def test_unknown_name_is_shown_with_the_closest_layout(variant):
    tensors = own_checkpoint(variant).tensors
    surprise = {"rotary.table": torch.ones(3), "gate.weight": torch.ones(3)}
    assert_refused(tensors | surprise, rf"closest, {variant}, does not know 2 of {len(tensors) + 2}.*rotary\.table")


def test_foreign_names_are_refused_with_the_layouts_that_there_are():
    assert_refused({"conv1.weight": torch.ones(3, 3)}, ", ".join(LAYOUTS))


@pytest.mark.parametrize("name", ["transformer.wte.bias", "transformer.wpe.bias"])
def test_bias_that_no_embedding_has_is_refused(name):
    tensors = own_checkpoint("nanogpt").tensors
    rows = tensors[name.replace("bias", "weight")].shape[0]
    assert_refused(tensors | {name: torch.ones(rows)}, name)


def test_forced_layout_is_used():
    gpt, facts = recognise(own_checkpoint("book"), layout="book")
    assert gpt.n_layer == LAYERS
    assert (facts[0].value, facts[0].source) == ("book", "--layout")


def test_forced_layout_that_does_not_fit_is_refused():
    assert_refused(own_checkpoint("book").tensors, "closest, nanogpt, does not know", layout="nanogpt")


def test_unknown_layout_is_refused_with_the_known_ones():
    assert_refused(own_checkpoint("book").tensors, "--layout llama.*scratch, per_head, book, nanogpt", layout="llama")


def test_unknown_activation_is_refused_with_the_known_ones():
    assert_refused(
        own_checkpoint("book").tensors, "--activation swish.*gelu, gelu_tanh, relu, silu", activation="swish"
    )


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("scratch", "token_table"),
        ("scratch", "position_table"),
        ("scratch", "norm_at_end.scale"),
        ("nanogpt", "h.1.ln_2.weight"),
        ("nanogpt", "h.1.attn.c_attn.weight"),
        ("nanogpt", "h.0.mlp.c_fc.weight"),
        ("book", "trf_blocks.1.att.W_key"),
        ("per_head", "blocks.0.feed_forward.layers.2.weight"),
    ],
)
def test_missing_tensor_is_named_by_its_role(variant, missing):
    assert_refused(without(own_checkpoint(variant).tensors, missing), "The checkpoint has no ")


@pytest.mark.parametrize("layers", ["layers.0.", "layers."])
def test_missing_layer_is_refused(layers):
    assert_refused(without(own_checkpoint("scratch").tensors, layers), "layers are numbered")


@pytest.mark.parametrize(
    ("missing", "role"),
    [
        ("blocks.1.mha.heads.1.q.weight", "blocks.1.query.weight"),
        ("blocks.0.mha.heads.0.v.bias", "blocks.0.value.bias"),
        ("blocks.1.mha.heads.2.k.weight", "blocks.1.key.weight"),
    ],
)
def test_missing_head_is_named(missing, role):
    assert_refused(without(own_checkpoint("per_head").tensors, missing), f"attention heads of {role}")


def test_block_with_fewer_heads_is_refused():
    assert_refused(without(own_checkpoint("per_head").tensors, "blocks.1.mha.heads.2"), "attention heads")


@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("scratch", "position_table.weight", (CONTEXT_LENGTH, WIDTH + 1)),
        ("scratch", "token_table.weight", ()),
        ("scratch", "token_table.weight", (WIDTH,)),
        ("scratch", "token_table.weight", (2, 3, WIDTH)),
        ("scratch", "layers.1.attention.to_query.weight", (WIDTH, WIDTH // 2)),
        ("scratch", "layers.1.feed_forward.expand.weight", (3 * WIDTH, WIDTH)),
        ("scratch", "layers.0.feed_forward.expand.weight", ()),
        ("scratch", "layers.0.attention.to_out.bias", (WIDTH - 1,)),
        ("scratch", "norm_at_end.shift", (WIDTH, 1)),
        ("book", "out_head.weight", (VOCAB_SIZE + 1, WIDTH)),
        ("nanogpt", "transformer.h.0.attn.c_attn.weight", (3 * WIDTH + 1, WIDTH)),
        ("nanogpt", "transformer.h.0.attn.c_attn.weight", (WIDTH, 3 * WIDTH)),
        ("nanogpt", "transformer.h.0.attn.c_attn.weight", ()),
        ("nanogpt", "transformer.h.1.mlp.c_proj.weight", (4 * WIDTH, WIDTH)),
        ("per_head", "output_layer.bias", (VOCAB_SIZE - 1,)),
        ("per_head", "blocks.0.mha.heads.1.q.weight", (WIDTH // HEADS, WIDTH - 1)),
        ("per_head", "blocks.0.mha.heads.1.q.weight", ()),
    ],
)
def test_contradictory_shape_is_refused(variant, name, shape):
    tensors = own_checkpoint(variant).tensors
    assert name in tensors
    assert_refused(tensors | {name: torch.ones(shape)}, "shape|rows")


def test_heads_of_unequal_width_are_refused():
    tensors = dict(own_checkpoint("per_head").tensors)
    first, second = "blocks.0.mha.heads.0.v", "blocks.0.mha.heads.1.v"
    for kind in ("weight", "bias"):
        rows = torch.cat([tensors[f"{first}.{kind}"], tensors[f"{second}.{kind}"]])
        tensors[f"{first}.{kind}"], tensors[f"{second}.{kind}"] = rows[:3], rows[3:]
    assert_refused(tensors, "head")


@pytest.mark.parametrize(("saved", "tied"), [("same", True), ("absent", True), ("different", False)])
def test_head_is_tied_when_it_equals_the_embedding_or_was_not_saved(saved, tied):
    tensors = own_checkpoint("nanogpt").tensors
    if saved == "absent":
        del tensors["lm_head.weight"]
    elif saved == "different":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-6
    gpt, _ = recognise(checkpoint(tensors), n_head=HEADS)
    assert gpt.tied is tied
    assert torch.equal(gpt.tensors["head.weight"], gpt.tensors["token_embedding.weight"]) is tied


def test_twelve_layers_keep_their_order():
    module, config = build("nanogpt", layers=12)
    gpt, _ = recognise(checkpoint(weights_of(module), config))
    assert gpt.n_layer == 12
    for n, block in enumerate(module.transformer.h):
        assert torch.equal(gpt.tensors[f"blocks.{n}.mlp_in.weight"], block.mlp.c_fc.weight.detach().double())


def test_twelve_heads_keep_their_order():
    module, config = build("per_head", width=24, heads=12)
    gpt, _ = recognise(checkpoint(weights_of(module), config))
    rows = torch.cat([head.q.weight.detach() for head in module.blocks[0].mha.heads]).double()
    assert torch.equal(gpt.tensors["blocks.0.query.weight"], rows)
