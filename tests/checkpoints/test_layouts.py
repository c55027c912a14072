import math
from contextlib import suppress

import pytest
import torch
from hand_written import (
    CONTEXT_LENGTH,
    HEADS,
    HIDDEN,
    LAYERS,
    VARIANTS,
    VOCAB_SIZE,
    WAYS_TO_SAVE,
    WIDTH,
    build,
    checkpoint_of,
    own_logits,
    saved,
    stated,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.checkpoints.canonical import ACTIVATIONS, canonical_logits
from fledge.checkpoints.facts import CONFIG_KEYS, TOLD, Fact, Source, Status
from fledge.checkpoints.known_layouts import LAYOUTS
from fledge.checkpoints.loading import Checkpoint, load_checkpoint
from fledge.checkpoints.mapping import read_mapping
from fledge.checkpoints.questions import RARE, regroup
from fledge.checkpoints.recognition import fit_vocabulary, recognise
from fledge.checkpoints.targets import obstacles, to_target
from fledge.errors import UserError

IDS = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
USUAL_SCALE = (WIDTH // HEADS) ** -0.5
# layout, activation, norm, rotation, whether the head is tied; what HIDDEN tells is in them.
KNOWN = {
    "scratch": ("scratch", "gelu_tanh", "layernorm", None, True),
    "per_head": ("per_head", "gelu", "layernorm", None, False),
    "book": ("book", "gelu_tanh", "layernorm", None, False),
    "book_qkv_bias": ("book", "gelu_tanh", "layernorm", None, False),
    "book_fast": ("book", "gelu_tanh", "layernorm", None, False),
    "nanogpt": ("nanogpt", "gelu", "layernorm", None, True),
    "nanogpt_no_bias": ("nanogpt", "gelu", "layernorm", None, True),
    "build_nanogpt": ("nanogpt", "gelu_tanh", "layernorm", None, True),
    "hf_gpt2_like": ("gpt2", "gelu_tanh", "layernorm", None, True),
    "mingpt": ("mingpt", "gelu", "layernorm", None, False),
    "lecture": ("lecture", "relu", "layernorm", None, False),
    "lecture_old_scale": ("lecture", "relu", "layernorm", None, False),
    "no_output_projection": ("lecture", "relu", "layernorm", None, False),
    "student": ("student", "gelu", "layernorm", None, True),
    "torch_layers": ("torch", "gelu", "layernorm", None, False),
    "mha": (None, "gelu", "layernorm", None, False),
    "sinusoidal": ("torch", "relu", "layernorm", None, False),
    "sinusoidal_scaled": ("torch", "relu", "layernorm", None, False),
    "story_chat": ("story_chat", "silu", "layernorm", "interleaved", True),
    "llama2c": ("llama2.c", "silu", "rmsnorm", "interleaved", True),
    "llama2c_gqa": ("llama2.c", "silu", "rmsnorm", "interleaved", True),
    "llama_half": ("llama", "silu", "rmsnorm", "half", False),
}


def checkpoint(tensors, config=None, left_out=None):
    return Checkpoint(tensors, config or {}, left_out or {}, source={})


def weights(variant, **sizes):
    return weights_of(build(variant, **sizes)[0])


def told_of(variant):
    return stated(**HIDDEN.get(variant, {}))


def logit_error(gpt, module) -> float:
    return (canonical_logits(gpt, IDS) - own_logits(module, IDS)).abs().max().item()


def refusal(*args, **keys) -> str:
    with pytest.raises(UserError) as refused:
        recognise(*args, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("variant", "how"),
    [
        *((variant, WAYS_TO_SAVE[i % len(WAYS_TO_SAVE)]) for i, variant in enumerate(VARIANTS)),
        *(("nanogpt", how) for how in WAYS_TO_SAVE),
        *(("story_chat", how) for how in WAYS_TO_SAVE),
    ],
)
def test_saved_checkpoint_means_what_its_author_computes(variant, how, tmp_path):
    module, config = build(variant, heads=4)
    torch.save(saved(module, config, how), tmp_path / "model.pt")
    layout, activation, norm, rope, tied = KNOWN[variant]
    told = told_of(variant)
    if how == "bare":
        told |= stated(n_head=4) | (stated(context_length=CONTEXT_LENGTH) if rope else {})
    gpt, facts = recognise(load_checkpoint(str(tmp_path / "model.pt")), told=told)
    assert {fact.name: fact.value for fact in facts}["layout"] == layout
    assert (gpt.activation, gpt.norm, gpt.rope, gpt.tied) == (activation, norm, rope, tied)
    assert (gpt.n_layer, gpt.n_head, gpt.n_kv_head) == (LAYERS, 4, 2 if variant == "llama2c_gqa" else 4)
    assert (gpt.vocab_size, gpt.context_length, gpt.width) == (VOCAB_SIZE, CONTEXT_LENGTH, WIDTH)
    assert logit_error(gpt, module) <= 1e-9


@pytest.mark.parametrize(("variant", "name"), [(variant, name) for variant in HIDDEN for name in HIDDEN[variant]])
def test_what_is_hidden_must_be_told(variant, name):
    module, config = build(variant)
    told = {key: fact for key, fact in told_of(variant).items() if key != name}
    gpt, facts = recognise(checkpoint_of(module, config), told=told)
    assert next(fact for fact in facts if fact.name == name).assumed
    assert logit_error(gpt, module) > 1e-6


def test_the_config_that_build_nanogpt_saves_tells_its_activation(tmp_path):
    module, config = build("build_nanogpt")
    content = {"model": module.state_dict(), "config": config, "step": 7, "val_loss": 3.2}
    torch.save(content, tmp_path / "model.pt")
    gpt, facts = recognise(load_checkpoint(str(tmp_path / "model.pt")))
    assert facts[0] == Fact("layout", "build_nanogpt", Status.SHOWN, Source.NAMES)
    assert logit_error(gpt, module) <= 1e-9


def sources(*args, **keys) -> dict[str, str]:
    return {fact.name: fact.said_by for fact in recognise(*args, **keys)[1]}


def statuses(*args, **keys) -> dict[str, tuple[Status, str]]:
    return {fact.name: (fact.status, fact.said_by) for fact in recognise(*args, **keys)[1]}


SHOWN = (Status.SHOWN, "tensors")
USUAL = (Status.ASSUMED, "usual practice")
ALWAYS = "window attention_cap logit_cap final_norm_eps norm_unbiased norm_eps_outside "
ALWAYS += "residual_scale residual_scaled logit_scale window_pattern norm_offset"
CONFIG = (Status.SETTLED, "checkpoint config")


def test_each_fact_names_where_it_comes_from():
    known = (Status.SETTLED, "every known author of scratch")
    asked = (
        "activation attention_scale norm_eps embedding_scale causal norm_placement parallel position_offset " + ALWAYS
    )
    asked += " qkv_in_out output_in_out"
    assert statuses(checkpoint_of(*build("scratch"))) == dict.fromkeys(asked.split(), known) | {
        "layout": (Status.SHOWN, "names of tensors"),
        "n_head": CONFIG,
        "norm": SHOWN,
        "tied head": SHOWN,
    }
    forced = (Status.SETTLED, "--layout")
    asked = "rope attention_scale activation norm embedding_scale causal parallel rope_theta rope_direction rope_width"
    told = stated(n_head=3, norm_placement="pre")
    assert statuses(checkpoint_of(*build("llama_half")), "llama", told=told) == {
        **dict.fromkeys(
            [*asked.split(), *ALWAYS.split(), "rope_span", "qk_norm", "qkv_in_out", "output_in_out"], forced
        ),
        "layout": (Status.SHOWN, "--layout"),
        "n_head": (Status.SETTLED, "--n_head"),
        "norm_eps": CONFIG,
        "context_length": CONFIG,
        "tied head": SHOWN,
        "norm_placement": (Status.SETTLED, "--norm_placement"),
        "positions": (Status.SETTLED, "--layout"),
    }
    unheard = checkpoint({name.replace("att.", "mix."): tensor for name, tensor in weights("book_fast").items()})
    asked = "activation attention_scale norm_eps embedding_scale causal norm_placement parallel qkv_by_head " + ALWAYS
    assert statuses(unheard) == dict.fromkeys(asked.split(), USUAL) | {
        **dict.fromkeys(("norm_unbiased", "norm_eps_outside"), (Status.SETTLED, "names of nn.LayerNorm")),
        "output_in_out": (Status.SETTLED, "the other weights of its layer"),
        "position_offset": USUAL,
        "layout": (Status.SHOWN, "no layout has these names"),
        "n_head": (Status.ASSUMED, "a guess"),
        "norm": SHOWN,
        "tied head": SHOWN,
    }


@pytest.mark.parametrize(
    ("variant", "config", "assumed"),
    [
        ("nanogpt", {"n_head": 3, "bias": True}, set()),
        ("nanogpt", {"n_head": 3}, {"activation"}),
        ("llama2c", {"n_heads": 3, "max_seq_len": 20}, set()),
        ("llama2c", {"n_heads": 3, "context_length": 20}, {"rope_theta", "norm_eps"}),
        ("per_head", {}, {"attention_scale"}),
        ("hf_gpt2_like", {"n_head": 3}, set()),
        (
            "mha",
            {"n_head": 3},
            {"activation", "norm_eps", "embedding_scale", "causal", "norm_placement", "parallel"}
            | {"window", "window_pattern", "attention_cap", "logit_cap", "final_norm_eps", "norm_offset"}
            | {"residual_scale", "residual_scaled", "logit_scale", "position_offset"},
        ),
    ],
)
def test_known_authors_settle_what_they_all_share_and_nothing_else(variant, config, assumed):
    _, facts = recognise(checkpoint(weights(variant), config))
    assert {fact.name for fact in facts if fact.assumed} == assumed


LLAMA = {"num_attention_heads": 3, "max_position_embeddings": 20, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
OTHERS = {
    "names alone": {},
    "Gemma": {"architectures": ["GemmaForCausalLM"]},
    "Granite": {"architectures": ["LlamaForCausalLM"], "residual_multiplier": 0.22},
    "an author's own": {"architectures": "MyGPT"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_names_that_several_architectures_have_settle_nothing(other):
    tensors = weights("llama_half")
    _, facts = recognise(checkpoint(tensors, LLAMA | OTHERS[other]))
    assert {"embedding_scale", "norm_placement", "activation"} <= {fact.name for fact in facts if fact.assumed}
    _, facts = recognise(checkpoint(tensors, LLAMA | {"architectures": ["LlamaForCausalLM"]}))
    assert not [str(fact) for fact in facts if fact.assumed]


def test_one_line_of_a_mapping_denies_all_that_few_authors_have(tmp_path):
    (tmp_path / "usual.yaml").write_text("usual: true\nwindow: 7\n", encoding="utf-8")
    _, told = read_mapping(str(tmp_path / "usual.yaml"))
    gpt, facts = recognise(checkpoint(weights("mha"), {"n_head": 3}), told=told)
    stated = {fact.name: fact.value for fact in facts if fact.stated}
    assert gpt.window == stated.pop("window") == 7
    assert stated == {name: value for name, value in RARE.items() if name in stated}
    assert {"residual_scale", "logit_scale", "position_offset", "logit_cap"} <= stated.keys()
    assert not {"rope_span", "qk_norm_eps"} & stated.keys()


def test_names_that_only_resemble_a_layout_settle_nothing():
    tensors = {name.replace("mlp.c_fc", "mlp.c_up"): tensor for name, tensor in weights("nanogpt").items()}
    _, facts = recognise(checkpoint(tensors, {"n_head": 3, "bias": True}))
    assert {"activation", "attention_scale", "norm_placement"} <= {fact.name for fact in facts if fact.assumed}


def test_mask_beside_the_weights_shows_that_the_model_is_causal():
    assert statuses(checkpoint(weights("student"), {}, {"blocks.0.attn.mask": "a buffer"}))["causal"] == SHOWN
    assert statuses(checkpoint(weights("student")))["causal"] == USUAL


def test_final_norm_that_was_never_trained_is_a_question():
    tensors = weights("student")
    tensors["ln_f.weight"], tensors["ln_f.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)
    gpt, facts = recognise(checkpoint(tensors))
    assert not gpt.final_norm
    assert Fact.of("final_norm", False, Source.PRACTICE) in facts
    tensors["ln_f.bias"] = torch.full((WIDTH,), 1e-6)
    assert recognise(checkpoint(tensors))[0].final_norm


@pytest.mark.parametrize(("said", "length"), [(12, 12), (CONTEXT_LENGTH, 20), (400, 20), (None, 20)])
def test_table_of_positions_is_cut_to_the_context_that_the_config_says(said, length):
    tensors = weights("nanogpt")
    gpt, _ = recognise(checkpoint(tensors, {"block_size": said} if said else {}))
    config, written, _ = to_target(gpt, {})
    assert gpt.context_length == config.n_positions == length
    assert torch.equal(written["transformer.wpe.weight"], tensors["transformer.wpe.weight"][:length])


def test_positions_after_rows_that_nobody_reads_are_cut_to_their_own():
    tensors = weights("nanogpt")
    gpt, _ = recognise(checkpoint(tensors, {"block_size": 12}), told=stated(position_offset=2))
    assert torch.equal(to_target(gpt, {})[1]["transformer.wpe.weight"], tensors["transformer.wpe.weight"][2:14])
    gpt, _ = recognise(checkpoint(tensors), told=stated(position_offset=2))
    assert gpt.context_length == CONTEXT_LENGTH - 2


def test_what_is_told_outranks_the_config_and_that_the_layout():
    tensors, config = weights("nanogpt"), {"n_head": 3, "activation": "silu", "layer_norm_eps": 1e-6}
    assert recognise(checkpoint(tensors, {"n_head": 3}))[0].activation == "gelu"
    gpt, _ = recognise(checkpoint(tensors, config))
    assert (gpt.n_head, gpt.activation, gpt.norm_eps, gpt.attention_scale) == (3, "silu", 1e-6, USUAL_SCALE)
    gpt, _ = recognise(
        checkpoint(tensors, config), told=stated(n_head=2, activation="relu", norm_eps=1e-4, attention_scale=0.5)
    )
    assert (gpt.n_head, gpt.activation, gpt.norm_eps, gpt.attention_scale) == (2, "relu", 1e-4, 0.5)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("n_head", "n_head n_heads num_heads num_attention_heads nhead"),
        ("norm_eps", "norm_eps layer_norm_eps layer_norm_epsilon rms_norm_eps eps"),
        ("rope_theta", "rope_theta rope_base"),
        (
            "context_length",
            "context_length max_seq_len max_seqlen block_size n_positions max_position_embeddings max_len sequence_len "
            "sequence_length seq_len max_seq_length max_sequence_length n_ctx ctx ctx_len context context_size "
            "context_window",
        ),
        ("activation", "activation activation_function hidden_act"),
    ],
)
def test_config_may_use_any_usual_word(name, keys):
    value = {"n_head": 6, "norm_eps": 1e-6, "rope_theta": 5e5, "context_length": 77, "activation": "gelu_new"}[name]
    needed = {"n_head": 3, "context_length": 20}
    needed.pop(name, None)
    assert set(CONFIG_KEYS[name]) == set(keys.split())
    for key in keys.split():
        _, facts = recognise(checkpoint(weights("llama_half"), needed | {key: value}))
        expected = "gelu_tanh" if name == "activation" else value
        assert Fact(name, expected, Status.SETTLED, Source.CONFIG, detail=key) in facts


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("gelu", "gelu"),
        ("GELU", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("swiglu", "gelu_tanh"),
        (None, "gelu_tanh"),
        (["relu"], "gelu_tanh"),
    ],
)
def test_activation_in_the_config(said, meant):
    assert recognise(checkpoint(weights("scratch"), {"n_head": HEADS, "activation": said}))[0].activation == meant


def test_heads_saved_one_by_one_outrank_a_config_and_contradict_a_flag():
    per_head = checkpoint(weights("per_head"), {"num_heads": 2 * HEADS})
    gpt, facts = recognise(per_head, told=stated(n_head=HEADS))
    assert gpt.n_head == HEADS
    assert Fact.of("n_head", HEADS, Source.TENSORS) in facts
    assert refusal(per_head, told=stated(n_head=4)) == f"--n_head says 4 heads; the tensors show {HEADS}."


@pytest.mark.parametrize(("width", "guess"), [(24, 4), (128, 2), (192, 3), (64, 4)])
def test_heads_that_nobody_stated_are_asked_for(width, guess):
    gpt, facts = recognise(checkpoint(weights("nanogpt", width=width, heads=1)))
    assert (gpt.n_head, gpt.attention_scale) == (guess, (width // guess) ** -0.5)
    assert next(fact for fact in facts if fact.name == "n_head").assumed


@pytest.mark.parametrize(("width", "heads", "guess"), [(24, 3, 3), (24, 12, 12), (36, 6, 6)])
def test_heads_that_nobody_stated_are_guessed_to_fit_keys_and_rotation(width, heads, guess):
    tensors = {
        name: tensor[: width // heads] if "wk" in name or "wv" in name else tensor
        for name, tensor in weights("llama2c", width=width, heads=heads).items()
    }
    gpt, _ = recognise(checkpoint(tensors, {"max_seq_len": CONTEXT_LENGTH}))
    assert gpt.n_head == guess


def test_stated_heads_settle_everything():
    _, facts = recognise(checkpoint(weights("nanogpt"), {"bias": True}), told=stated(n_head=HEADS))
    assert not any(fact.assumed for fact in facts)


def test_rotation_that_nobody_stated_is_asked_for():
    tensors = {name.replace("ln_", "norm_"): tensor for name, tensor in weights("story_chat").items()}
    config = {"n_heads": HEADS, "max_seq_len": CONTEXT_LENGTH}
    facts = recognise(checkpoint(tensors, config))[1]
    assert Fact.of("rope", "interleaved", Source.GUESS) in facts
    for buffer, rope in (("freqs_cis", "interleaved"), ("blocks.0.attn.inv_freq", "half"), ("cos_cached", "half")):
        gpt, facts = recognise(checkpoint(tensors, config, {buffer: "a buffer"}))
        assert gpt.rope == rope


def test_context_that_nothing_shows_is_asked_for():
    assert "no config says how long the context is; write the line `context_length: N`" in refusal(
        checkpoint(weights("story_chat"), {"n_heads": HEADS})
    )


@pytest.mark.parametrize("n_head", [5, WIDTH + 1, 2 * WIDTH])
def test_number_of_heads_that_does_not_divide_the_width_is_refused(n_head):
    tensors = weights("nanogpt")
    expected = f"n_head {n_head} does not divide the width {WIDTH}."
    assert refusal(checkpoint(tensors), told=stated(n_head=n_head)) == expected
    assert refusal(checkpoint(tensors, {"n_head": n_head})) == expected


def test_heads_that_cannot_be_turned_in_pairs_are_refused():
    message = refusal(checkpoint_of(*build("story_chat")), told=stated(n_head=8))
    assert message == "Heads of width 3, as n_head 8 says, cannot be rotated in pairs."


def test_heads_that_do_not_fit_the_keys_are_refused():
    module, config = build("llama2c_gqa", heads=4)
    assert refusal(checkpoint_of(module, config | {"n_heads": 1})) == "Heads of width 24 do not fit keys of width 12."
    tensors = {
        name: tensor[:16] if "wk" in name or "wv" in name else tensor for name, tensor in weights("story_chat").items()
    }
    message = refusal(checkpoint(tensors, {"max_seq_len": 20}), told=stated(n_head=3))
    assert message == "Heads of width 8 do not fit keys of width 16."


def test_whole_number_may_stand_for_a_fraction():
    told = stated(norm_eps=1, attention_scale=1, rope_theta=500_000, embedding_scale=2)
    gpt, _ = recognise(checkpoint_of(*build("llama_half")), told=told)
    assert [type(vars(gpt)[name]) for name in told] == [float] * 4


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("activation", "swish", "choose one of gelu, gelu_tanh, relu, relu2, silu"),
        ("activation", None, "choose one of gelu, gelu_tanh, relu, relu2, silu"),
        ("norm", "batchnorm", "choose one of layernorm, rmsnorm"),
        ("rope", "sideways", "choose one of interleaved, half"),
        ("norm_placement", "maybe", "choose one of pre, post, sublayer, both, replace, none"),
        ("n_head", 0, "must be a positive whole number"),
        ("n_head", -3, "must be a positive whole number"),
        ("n_head", 3.0, "must be a positive whole number"),
        ("n_head", True, "must be a positive whole number"),
        ("context_length", 2.5, "must be a positive whole number"),
        ("attention_scale", 0, "must be a positive number"),
        ("attention_scale", math.nan, "must be a positive number"),
        ("attention_scale", math.inf, "must be a positive number"),
        ("attention_scale", "big", "must be a positive number"),
        ("norm_eps", -1e-5, "must be a positive number"),
        ("rope_theta", [10_000], "must be a positive number"),
        ("embedding_scale", "", "must be a positive number"),
    ],
)
def test_value_that_a_fact_cannot_have_is_refused(name, value, said):
    message = refusal(checkpoint_of(*build("llama_half")), told=stated(**{name: value}))
    assert message.startswith(f"{name} {value} (--{name})")
    assert said in message


@pytest.mark.parametrize(
    ("variant", "name", "value", "shown"),
    [
        ("nanogpt", "rope", "half", None),
        ("nanogpt", "rope_theta", 5e5, 1e4),
        ("nanogpt", "context_length", 2 * CONTEXT_LENGTH, CONTEXT_LENGTH),
        ("nanogpt", "norm", "rmsnorm", "layernorm"),
        ("mingpt", "qkv_by_head", True, False),
    ],
)
def test_fact_that_the_tensors_contradict_is_refused(variant, name, value, shown):
    module, config = build(variant)
    recognise(checkpoint_of(module, config), told={name: Fact.of(name, shown, Source.MAPPING)} if shown else {})
    message = refusal(checkpoint_of(module, config), told={name: Fact.of(name, value, Source.MAPPING)})
    assert message == f"--mapping says {name}: {value}; the tensors show {shown}."


@pytest.mark.parametrize("n_head", [0, -3, 3.5, math.nan])
def test_value_in_the_config_that_a_fact_cannot_have_is_refused(n_head):
    message = refusal(checkpoint(weights("nanogpt"), {"n_head": n_head}))
    assert message == f"n_head {n_head} (checkpoint config) must be a positive whole number."


@pytest.mark.parametrize("n_head", [None, "many", [3], True])
def test_value_in_the_config_that_is_no_number_counts_as_absent(n_head):
    assert sources(checkpoint(weights("nanogpt"), {"n_head": n_head}))["n_head"] == "a guess"


VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.sampled_from(["gelu", "rmsnorm", "half", 1, 2, 3, 10**400]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(TOLD), VALUES, max_size=4), st.dictionaries(st.sampled_from(TOLD), VALUES))
def test_any_value_of_any_fact_is_taken_or_refused(told, config):
    for tensors in (weights("llama_half", layers=1), weights("student", layers=1)):
        with suppress(UserError):
            recognise(checkpoint(tensors, {"max_len": 20} | config), told=stated(**told))


def test_layout_may_be_forced():
    book = checkpoint(weights("book"), {"n_heads": HEADS})
    gpt, facts = recognise(book, layout="lecture")
    assert gpt.activation == "relu"
    assert facts[0] == Fact("layout", "lecture", Status.SHOWN, Source.LAYOUT_FLAG)
    assert refusal(book, layout="gpt5") == f"--layout gpt5 is unknown; choose one of {', '.join(LAYOUTS)}."


@pytest.mark.parametrize(("saved_head", "tied"), [("same", True), ("absent", True), ("different", False)])
def test_head_is_tied_when_it_equals_the_embedding_or_was_not_saved(saved_head, tied):
    tensors = weights("nanogpt")
    if saved_head == "absent":
        del tensors["lm_head.weight"]
    elif saved_head == "different":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-6
    gpt, _ = recognise(checkpoint(tensors), told=stated(n_head=HEADS))
    assert gpt.tied is tied
    assert torch.equal(gpt.tensors["head.weight"], gpt.tensors["token_embedding.weight"]) is tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_keep_the_precision_of_the_checkpoint(dtype):
    gpt, _ = recognise(checkpoint({name: tensor.to(dtype) for name, tensor in weights("lecture").items()}))
    assert {tensor.dtype for tensor in gpt.tensors.values()} == {dtype}
    assert canonical_logits(gpt, IDS).dtype == torch.float64


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
        ("scratch", "norm_at_end.shift", ()),
        ("book", "out_head.weight", (VOCAB_SIZE + 1, WIDTH)),
        ("nanogpt", "transformer.h.0.attn.c_attn.weight", (3 * WIDTH + 1, WIDTH)),
        ("nanogpt", "transformer.h.0.attn.c_attn.weight", ()),
        ("nanogpt", "transformer.h.0.attn.c_attn.bias", (2 * WIDTH,)),
        ("nanogpt", "transformer.h.1.mlp.c_proj.weight", (4 * WIDTH, WIDTH)),
        ("per_head", "output_layer.bias", (VOCAB_SIZE - 1,)),
        ("per_head", "blocks.0.mha.heads.1.q.weight", (WIDTH // HEADS, WIDTH - 1)),
        ("per_head", "blocks.0.mha.heads.1.q.weight", ()),
        ("per_head", "blocks.0.mha.heads.1.q.weight", (WIDTH // HEADS + 1, WIDTH)),
        ("llama2c_gqa", "layers.1.attention.wk.weight", (WIDTH, WIDTH)),
    ],
)
def test_contradictory_shape_is_refused(variant, name, shape):
    module, config = build(variant, heads=4)
    given = checkpoint_of(module, config)
    assert name in given.tensors
    given.tensors[name] = torch.ones(shape)
    assert refusal(given)


def test_twelve_layers_keep_their_order():
    module, config = build("nanogpt", layers=12)
    gpt, _ = recognise(checkpoint_of(module, config))
    assert gpt.n_layer == 12
    for n, block in enumerate(module.transformer.h):
        assert torch.equal(gpt.tensors[f"blocks.{n}.mlp_in.weight"], block.mlp.c_fc.weight)


def test_twelve_heads_keep_their_order():
    module, config = build("per_head", heads=12)
    gpt, _ = recognise(checkpoint_of(module, config))
    rows = torch.cat([head.q.weight for head in module.blocks[0].mha.heads])
    assert torch.equal(gpt.tensors["blocks.0.query.weight"], rows)


def test_fused_projections_may_be_read_by_head():
    tensors = weights("nanogpt", layers=1)
    numbers = torch.arange(3.0 * WIDTH)
    tensors["transformer.h.0.attn.c_attn.bias"] = numbers
    gpt, _ = recognise(checkpoint(tensors), told=stated(n_head=HEADS, qkv_by_head=True))
    by_head = numbers.view(HEADS, 3, -1)
    for i, part in enumerate(("query", "key", "value")):
        assert torch.equal(gpt.tensors[f"blocks.0.{part}.bias"], by_head[:, i].flatten())
    plain, _ = recognise(checkpoint(tensors), told=stated(n_head=HEADS))
    back = regroup(gpt, into_thirds=True).tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in plain.tensors.items())


def test_mapping_names_roles_and_facts(tmp_path):
    (tmp_path / "layout.yaml").write_text(
        "token_embedding: wte\n"
        "blocks.{n}.query.{h}: layers.{n}.heads.{h}.q\n"
        "blocks.0.norm_1: first_norm\n"
        "n_head: 4\n"
        "attention_scale: 0.125\n"
        "norm_eps: 1e-6\n"
        "norm_placement: pre\n"
    )
    assert read_mapping(str(tmp_path / "layout.yaml")) == (
        {"wte": "token_embedding", "layers.{n}.heads.{h}.q": "blocks.{n}.query.{h}", "first_norm": "blocks.0.norm_1"},
        {
            "n_head": Fact.of("n_head", 4, Source.MAPPING),
            "attention_scale": Fact.of("attention_scale", 0.125, Source.MAPPING),
            "norm_eps": Fact.of("norm_eps", 1e-6, Source.MAPPING),
            "norm_placement": Fact.of("norm_placement", "pre", Source.MAPPING),
        },
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("token_embeding: wte\n", "says token_embeding: wte; a key is one of"),
        ("blocks.{n}.querry: q\n", "says blocks.{n}.querry: q; a key is one of"),
        ("blocks.{n}.query.weight: q\n", "says blocks.{n}.query.weight: q; a key is one of"),
        ("layers.{n}.query: q\n", "says layers.{n}.query: q; a key is one of"),
        ("head: 3\n", "says head: 3; a key is one of"),
        ("head: [a, b]\n", "says head: ['a', 'b']; a key is one of"),
        ("3: wte\n", "says 3: wte; a key is one of"),
        ("blocks.{n}.query: q\n", "says blocks.{n}.query: q; {n} and {h} stand once in both or in neither"),
        ("blocks.{n}.query: h.{n}.{n}\n", "{n} and {h} stand once in both or in neither"),
        ("blocks.{n}.query.{h}: h.{n}.q\n", "{n} and {h} stand once in both or in neither"),
        ("head: h.{n}\n", "{n} and {h} stand once in both or in neither"),
        ("blocks.{n}.output.{h}: h.{n}.{h}\n", "says blocks.{n}.output.{h}: h.{n}.{h}; a key is one of"),
        ("- head\n", "holds a list"),
        ("", "holds a NoneType"),
        ("head: wte: x\n", "is not valid YAML"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("head: 2020-13-45\n", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        (b"head: \xff\n", "is not valid YAML"),
    ],
)
def test_bad_mapping_is_refused(content, said, tmp_path):
    file = tmp_path / "layout.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_mapping(str(file))
    assert str(refused.value).startswith(f"--mapping {file}")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["transformer.wtee", "transformer.wte.weight", "transformer.h.{n}.attn.q"])
def test_name_in_a_mapping_that_no_tensor_has_is_refused(source):
    message = refusal(checkpoint(weights("nanogpt")), roles={source: "token_embedding"})
    assert message.startswith(f"No tensor is called {source}.weight or {source}.bias")


def test_mapping_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        read_mapping(str(tmp_path / "layout.yaml"))


@pytest.mark.parametrize("rows", [264, 280, 376])
@pytest.mark.parametrize("variant", ["nanogpt", "lecture"])
def test_rows_that_only_pad_the_vocabulary_are_cut(rows, variant):
    module, config = build(variant, vocab_size=rows)
    gpt, _ = recognise(checkpoint_of(module, config))
    fitted, said = fit_vocabulary(gpt, 257, "gpt2")
    assert said == [f"The last {rows - 257} of {rows} embedding rows, which pad the vocabulary, are cut off."]
    assert fitted.vocab_size == 257
    assert (canonical_logits(fitted, IDS) - own_logits(module, IDS)[..., :257]).abs().max() <= 1e-9


def test_vocabulary_that_fits_is_left_alone():
    gpt, _ = recognise(checkpoint_of(*build("nanogpt")))
    assert fit_vocabulary(gpt, VOCAB_SIZE, "gpt2") == (gpt, [])


@pytest.mark.parametrize(("rows", "tokens"), [(257, 264), (258, 257), (384, 256), (264, 100)])
def test_tokenizer_of_another_size_is_refused(rows, tokens):
    gpt, _ = recognise(checkpoint_of(*build("nanogpt", vocab_size=rows)))
    with pytest.raises(UserError, match=f"tokenizer gpt2 has {tokens} tokens .* embedding has {rows} rows; name"):
        fit_vocabulary(gpt, tokens, "gpt2")


def test_every_layout_states_facts_that_can_be_stated():
    for layout in LAYOUTS.values():
        assert layout.facts.keys() <= set(TOLD)
        assert layout.facts.get("activation") in {None, *ACTIVATIONS}


def test_nanochat_is_known_by_its_names_for_what_its_authors_compute():
    names = [f"transformer.h.0.attn.{part}.weight" for part in ("c_q", "c_k", "c_v", "c_proj")]
    tensors = {"transformer.wte.weight": torch.randn(40, 16), "lm_head.weight": torch.randn(40, 16)}
    tensors |= {name: torch.randn(16, 16) for name in names}
    tensors |= {
        "transformer.h.0.mlp.c_fc.weight": torch.randn(64, 16),
        "transformer.h.0.mlp.c_proj.weight": torch.randn(16, 64),
    }
    gpt, _ = recognise(checkpoint(tensors, {"n_head": 2, "sequence_len": 32}))
    assert (gpt.activation, gpt.rope, gpt.rope_direction, gpt.qk_norm) == ("relu2", "half", -1, "head")
    assert (gpt.embedding_norm, gpt.final_norm, gpt.logit_cap, gpt.qk_norm_after_rope) == (True, True, 15.0, True)
    assert [name for name, lacks in obstacles(gpt).items() if not lacks] == ["nanochat"]
    # modded-nanogpt of 2024 has the names and neither the norm of the embeddings nor the cap.
    _, facts = recognise(checkpoint(tensors, {"n_head": 2}), told=stated(context_length=32))
    assert {"embedding_norm", "logit_cap", "activation"} <= {fact.name for fact in facts if fact.assumed}
    with pytest.raises(UserError, match="skip_lambdas: learned weights of the residual stream"):
        recognise(checkpoint(tensors | {"skip_lambdas": torch.ones(1)}, {"n_head": 2, "sequence_len": 32}))
