import io
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from architectures import NAMINGS, REFUSED, FlatGPT, Spec, gpt_of, naming, specs, tensors_of
from hand_written import (
    CONTEXT_LENGTH,
    HEADS,
    LAYERS,
    VARIANTS,
    VOCAB_SIZE,
    WAYS_TO_SAVE,
    WIDTH,
    build,
    own_logits,
    saved,
    weights_of,
)
from hypothesis import find, given, settings
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

pytestmark = pytest.mark.slow  # each layout is read in many ways

IDS = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
FEW = settings(max_examples=40, deadline=None, derandomize=True)
# A query's product with the keys' bias is the same for every key, and the softmax takes it away.
KEY_BIAS = re.compile(r"\.(k|key|W_key|k_norm)\.bias$")

# Every state dict at one layer and two heads, in its author's order.
NAMES = {
    "scratch": """
        token_table.weight position_table.weight
        layers.0.norm_before_attention.scale layers.0.norm_before_attention.shift
        layers.0.attention.to_query.weight layers.0.attention.to_key.weight layers.0.attention.to_value.weight
        layers.0.attention.to_out.weight layers.0.attention.to_out.bias
        layers.0.norm_before_feed_forward.scale layers.0.norm_before_feed_forward.shift
        layers.0.feed_forward.expand.weight layers.0.feed_forward.expand.bias
        layers.0.feed_forward.shrink.weight layers.0.feed_forward.shrink.bias
        norm_at_end.scale norm_at_end.shift to_vocab.weight""",
    "per_head": """
        embeddings.token_embedding.weight embeddings.pos_embedding.weight
        blocks.0.layer_norm1.weight blocks.0.layer_norm1.bias
        blocks.0.mha.heads.0.mask blocks.0.mha.heads.0.q.weight blocks.0.mha.heads.0.q.bias
        blocks.0.mha.heads.0.k.weight blocks.0.mha.heads.0.k.bias
        blocks.0.mha.heads.0.v.weight blocks.0.mha.heads.0.v.bias
        blocks.0.mha.heads.1.mask blocks.0.mha.heads.1.q.weight blocks.0.mha.heads.1.q.bias
        blocks.0.mha.heads.1.k.weight blocks.0.mha.heads.1.k.bias
        blocks.0.mha.heads.1.v.weight blocks.0.mha.heads.1.v.bias
        blocks.0.mha.out_proj.weight blocks.0.mha.out_proj.bias
        blocks.0.layer_norm2.weight blocks.0.layer_norm2.bias
        blocks.0.feed_forward.layers.0.weight blocks.0.feed_forward.layers.0.bias
        blocks.0.feed_forward.layers.2.weight blocks.0.feed_forward.layers.2.bias
        layer_norm.weight layer_norm.bias output_layer.weight output_layer.bias""",
    "book": """
        tok_emb.weight pos_emb.weight trf_blocks.0.att.mask
        trf_blocks.0.att.W_query.weight trf_blocks.0.att.W_key.weight trf_blocks.0.att.W_value.weight
        trf_blocks.0.att.out_proj.weight trf_blocks.0.att.out_proj.bias
        trf_blocks.0.ff.layers.0.weight trf_blocks.0.ff.layers.0.bias
        trf_blocks.0.ff.layers.2.weight trf_blocks.0.ff.layers.2.bias
        trf_blocks.0.norm1.scale trf_blocks.0.norm1.shift trf_blocks.0.norm2.scale trf_blocks.0.norm2.shift
        final_norm.scale final_norm.shift out_head.weight""",
    "book_qkv_bias": """
        tok_emb.weight pos_emb.weight trf_blocks.0.att.mask
        trf_blocks.0.att.W_query.weight trf_blocks.0.att.W_query.bias
        trf_blocks.0.att.W_key.weight trf_blocks.0.att.W_key.bias
        trf_blocks.0.att.W_value.weight trf_blocks.0.att.W_value.bias
        trf_blocks.0.att.out_proj.weight trf_blocks.0.att.out_proj.bias
        trf_blocks.0.ff.layers.0.weight trf_blocks.0.ff.layers.0.bias
        trf_blocks.0.ff.layers.2.weight trf_blocks.0.ff.layers.2.bias
        trf_blocks.0.norm1.scale trf_blocks.0.norm1.shift trf_blocks.0.norm2.scale trf_blocks.0.norm2.shift
        final_norm.scale final_norm.shift out_head.weight""",
    "book_fast": """
        tok_emb.weight pos_emb.weight
        trf_blocks.0.att.qkv.weight trf_blocks.0.att.proj.weight trf_blocks.0.att.proj.bias
        trf_blocks.0.ff.layers.0.weight trf_blocks.0.ff.layers.0.bias
        trf_blocks.0.ff.layers.2.weight trf_blocks.0.ff.layers.2.bias
        trf_blocks.0.norm1.weight trf_blocks.0.norm1.bias trf_blocks.0.norm2.weight trf_blocks.0.norm2.bias
        final_norm.weight final_norm.bias out_head.weight""",
    "nanogpt": """
        transformer.wte.weight transformer.wpe.weight transformer.h.0.ln_1.weight transformer.h.0.ln_1.bias
        transformer.h.0.attn.bias transformer.h.0.attn.c_attn.weight transformer.h.0.attn.c_attn.bias
        transformer.h.0.attn.c_proj.weight transformer.h.0.attn.c_proj.bias
        transformer.h.0.ln_2.weight transformer.h.0.ln_2.bias
        transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_fc.bias
        transformer.h.0.mlp.c_proj.weight transformer.h.0.mlp.c_proj.bias
        transformer.ln_f.weight transformer.ln_f.bias lm_head.weight""",
    "nanogpt_no_bias": """
        transformer.wte.weight transformer.wpe.weight transformer.h.0.ln_1.weight transformer.h.0.attn.bias
        transformer.h.0.attn.c_attn.weight transformer.h.0.attn.c_proj.weight transformer.h.0.ln_2.weight
        transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_proj.weight transformer.ln_f.weight lm_head.weight""",
    "hf_gpt2_like": """
        wte.weight wpe.weight h.0.ln_1.weight h.0.ln_1.bias h.0.attn.bias h.0.attn.c_attn.weight h.0.attn.c_attn.bias
        h.0.attn.c_proj.weight h.0.attn.c_proj.bias h.0.ln_2.weight h.0.ln_2.bias
        h.0.mlp.c_fc.weight h.0.mlp.c_fc.bias h.0.mlp.c_proj.weight h.0.mlp.c_proj.bias
        ln_f.weight ln_f.bias lm_head.weight""",
    "mingpt": """
        pos_emb tok_emb.weight blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias
        blocks.0.attn.mask blocks.0.attn.key.weight blocks.0.attn.key.bias
        blocks.0.attn.query.weight blocks.0.attn.query.bias blocks.0.attn.value.weight blocks.0.attn.value.bias
        blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.mlp.0.weight blocks.0.mlp.0.bias
        blocks.0.mlp.2.weight blocks.0.mlp.2.bias ln_f.weight ln_f.bias head.weight""",
    "lecture": """
        token_embedding_table.weight position_embedding_table.weight
        blocks.0.sa.heads.0.tril blocks.0.sa.heads.0.key.weight
        blocks.0.sa.heads.0.query.weight blocks.0.sa.heads.0.value.weight
        blocks.0.sa.heads.1.tril blocks.0.sa.heads.1.key.weight
        blocks.0.sa.heads.1.query.weight blocks.0.sa.heads.1.value.weight
        blocks.0.sa.proj.weight blocks.0.sa.proj.bias
        blocks.0.ffwd.net.0.weight blocks.0.ffwd.net.0.bias blocks.0.ffwd.net.2.weight blocks.0.ffwd.net.2.bias
        blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias
        ln_f.weight ln_f.bias lm_head.weight lm_head.bias""",
    "student": """
        tok_emb.weight pos_emb.weight blocks.0.ln1.weight blocks.0.ln1.bias
        blocks.0.attn.mask blocks.0.attn.qkv.weight blocks.0.attn.proj.weight blocks.0.ln2.weight blocks.0.ln2.bias
        blocks.0.ffn.0.weight blocks.0.ffn.0.bias blocks.0.ffn.2.weight blocks.0.ffn.2.bias
        ln_f.weight ln_f.bias head.weight""",
    "torch_layers": """
        token_embedding.weight position_embedding.weight
        layers.0.self_attn.in_proj_weight layers.0.self_attn.in_proj_bias
        layers.0.self_attn.out_proj.weight layers.0.self_attn.out_proj.bias
        layers.0.linear1.weight layers.0.linear1.bias layers.0.linear2.weight layers.0.linear2.bias
        layers.0.norm1.weight layers.0.norm1.bias layers.0.norm2.weight layers.0.norm2.bias
        ln_f.weight ln_f.bias head.weight""",
    "mha": """
        token_emb.weight pos_emb.weight blocks.0.ln_1.weight blocks.0.ln_1.bias
        blocks.0.attn.in_proj_weight blocks.0.attn.in_proj_bias
        blocks.0.attn.out_proj.weight blocks.0.attn.out_proj.bias blocks.0.ln_2.weight blocks.0.ln_2.bias
        blocks.0.mlp.0.weight blocks.0.mlp.0.bias blocks.0.mlp.2.weight blocks.0.mlp.2.bias
        ln_f.weight ln_f.bias head.weight""",
    "sinusoidal": """
        pos_encoder.pe
        transformer_encoder.layers.0.self_attn.in_proj_weight transformer_encoder.layers.0.self_attn.in_proj_bias
        transformer_encoder.layers.0.self_attn.out_proj.weight transformer_encoder.layers.0.self_attn.out_proj.bias
        transformer_encoder.layers.0.linear1.weight transformer_encoder.layers.0.linear1.bias
        transformer_encoder.layers.0.linear2.weight transformer_encoder.layers.0.linear2.bias
        transformer_encoder.layers.0.norm1.weight transformer_encoder.layers.0.norm1.bias
        transformer_encoder.layers.0.norm2.weight transformer_encoder.layers.0.norm2.bias
        transformer_encoder.norm.weight transformer_encoder.norm.bias embedding.weight linear.weight linear.bias""",
    "story_chat": """
        freqs_cis mask tok_emb.weight blocks.0.ln_1.weight blocks.0.ln_1.bias
        blocks.0.attn.wq.weight blocks.0.attn.wk.weight blocks.0.attn.wv.weight blocks.0.attn.wo.weight
        blocks.0.ln_2.weight blocks.0.ln_2.bias blocks.0.mlp.w1.weight blocks.0.mlp.w2.weight blocks.0.mlp.w3.weight
        ln_f.weight ln_f.bias head.weight""",
    "llama2c": """
        tok_embeddings.weight layers.0.attention.wq.weight layers.0.attention.wk.weight
        layers.0.attention.wv.weight layers.0.attention.wo.weight layers.0.feed_forward.w1.weight
        layers.0.feed_forward.w2.weight layers.0.feed_forward.w3.weight
        layers.0.attention_norm.weight layers.0.ffn_norm.weight norm.weight output.weight""",
    "llama_half": """
        embed_tokens.weight layers.0.self_attn.q_proj.weight layers.0.self_attn.k_proj.weight
        layers.0.self_attn.v_proj.weight layers.0.self_attn.o_proj.weight layers.0.mlp.gate_proj.weight
        layers.0.mlp.up_proj.weight layers.0.mlp.down_proj.weight
        layers.0.input_layernorm.weight layers.0.post_attention_layernorm.weight norm.weight lm_head.weight""",
}
NAMES["build_nanogpt"] = NAMES["nanogpt"]
NAMES["lecture_old_scale"] = NAMES["lecture"]
NAMES["no_output_projection"] = NAMES["lecture"].replace("blocks.0.sa.proj.weight blocks.0.sa.proj.bias", "")
NAMES["sinusoidal_scaled"] = NAMES["sinusoidal"]
NAMES["llama2c_gqa"] = NAMES["llama2c"]

# What a shape tells where a name does not; 24 wide, 2 heads.
SHAPES = {
    "per_head": {"blocks.0.mha.heads.1.q.weight": (12, 24), "output_layer.bias": (61,)},
    "book_fast": {"trf_blocks.0.att.qkv.weight": (72, 24)},
    "nanogpt": {"transformer.h.0.attn.c_attn.weight": (72, 24), "transformer.h.0.attn.bias": (1, 1, 20, 20)},
    "hf_gpt2_like": {
        "h.0.attn.c_attn.weight": (24, 72),
        "h.0.mlp.c_fc.weight": (24, 96),
        "h.0.mlp.c_proj.weight": (96, 24),
    },
    "mingpt": {"pos_emb": (1, 20, 24), "blocks.0.attn.mask": (1, 1, 20, 20)},
    "lecture": {"blocks.0.sa.heads.1.key.weight": (12, 24), "lm_head.bias": (61,)},
    "student": {"blocks.0.ffn.0.weight": (48, 24), "blocks.0.attn.mask": (20, 20)},
    "torch_layers": {"layers.0.self_attn.in_proj_weight": (72, 24)},
    "sinusoidal": {"pos_encoder.pe": (1, 20, 24)},
    "story_chat": {"freqs_cis": (20, 6), "blocks.0.mlp.w2.weight": (24, 96)},
    "llama2c_gqa": {"layers.0.attention.wq.weight": (24, 24), "layers.0.attention.wk.weight": (12, 24)},
}
TIED = {"scratch", "nanogpt", "nanogpt_no_bias", "build_nanogpt", "hf_gpt2_like", "student"}
TIED |= {"story_chat", "llama2c", "llama2c_gqa"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_its_authors(variant):
    state = build(variant, heads=2, layers=1)[0].state_dict()
    assert list(state) == NAMES[variant].split()
    assert {name: tuple(state[name].shape) for name in SHAPES.get(variant, {})} == SHAPES.get(variant, {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_is_tied_where_its_author_ties_it(variant):
    module = build(variant)[0]
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert len(module.state_dict().keys() - own) == (variant in TIED)


def test_weights_are_all_but_masks_and_rotations():
    assert weights_of(build("student")[0]).keys() == {
        name for name in build("student")[0].state_dict() if not name.endswith("mask")
    }
    story_chat = build("story_chat")[0]
    assert story_chat.state_dict().keys() - weights_of(story_chat).keys() == {"freqs_cis", "mask"}
    sinusoidal = build("sinusoidal")[0]
    assert weights_of(sinusoidal).keys() == sinusoidal.state_dict().keys()


def test_sinusoidal_positions_are_those_of_the_paper():
    pe = build("sinusoidal", width=4, heads=1, context_length=3)[0].pos_encoder.pe
    expected = [[0, 1, 0, 1], [0.841471, 0.540302, 0.01, 0.99995], [0.909297, -0.416147, 0.019999, 0.9998]]
    assert torch.allclose(pe, torch.tensor([expected]), atol=1e-5)


def reaches_back(module) -> bool:
    """Whether a token has a say in the logits before it."""
    before = own_logits(module, IDS)
    differs = False
    for position in (1, CONTEXT_LENGTH // 2, CONTEXT_LENGTH - 1):
        changed = IDS.clone()
        changed[:, position:] = (IDS[:, position:] + 1) % VOCAB_SIZE
        after = own_logits(module, changed)
        assert (after[:, position] - before[:, position]).abs().amax() > 1e-3
        differs |= bool((after[:, :position] - before[:, :position]).abs().amax() > 1e-12)
    return differs


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_causal(variant):
    assert not reaches_back(build(variant)[0])


@pytest.mark.parametrize("variant", REFUSED)
def test_one_refused_architecture_alone_is_not_causal(variant):
    assert reaches_back(REFUSED[variant]()[0]) is (variant == "non_causal")


REFUSED_NAMES = {
    "post_norm": (set(), set()),
    "no_final_norm": (set(), {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    "non_causal": (set(), {"transformer.h.0.attn.bias"}),
    "parallel": (set(), {"transformer.h.0.ln_2.weight", "transformer.h.0.ln_2.bias"}),
    "alibi": ({"transformer.h.0.attn.slopes"}, {"transformer.wpe.weight"}),
    "extra_layer_embedding": ({"transformer.h.0.pos_emb.weight"}, set()),
    "qk_norm": (
        {f"transformer.h.0.attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")},
        set(),
    ),
    "four_norms": ({f"transformer.h.0.ln_{n}.{kind}" for n in (3, 4) for kind in ("weight", "bias")}, set()),
}


@pytest.mark.parametrize("variant", REFUSED)
def test_refused_architecture_differs_from_nanogpt_with_its_tensors(variant):
    module, config = REFUSED[variant](layers=1)
    plain, plain_config = build("nanogpt", layers=1)
    more, fewer = REFUSED_NAMES[variant]
    assert config == plain_config
    assert module.state_dict().keys() - plain.state_dict().keys() == more
    assert plain.state_dict().keys() - module.state_dict().keys() == fewer
    plain.load_state_dict(module.state_dict(), strict=False)
    assert (own_logits(module, IDS) - own_logits(plain, IDS)).abs().max() > 0.1


@torch.no_grad()
def test_post_norm_block_is_that_of_the_paper():
    block = REFUSED["post_norm"]()[0].transformer.h[0]
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_attn.": "self_attn.in_proj_",
        "attn.c_proj": "self_attn.out_proj",
    }
    names |= {"mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    weights = weights_of(block)
    for old, new in names.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=False)
    layer.load_state_dict(weights)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = layer.eval().double()(x, src_mask=future, is_causal=True)
    assert (block.double()(x) - expected).abs().max() < 1e-12


def assert_no_weight_is_unused(logits, weights, key_bias):
    """Noise on any one of `weights` changes what `logits` gives, but for the keys' biases."""
    before = logits()
    for name, weight in weights.items():
        kept, noise = weight.clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        weight += noise.to(weight.dtype)
        change = (logits() - before).abs().max()
        weight.copy_(kept)
        assert (change < 1e-9) if key_bias(name) else (change > 1e-6), name


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_weight_has_a_say(variant):
    module = build(variant)[0].double()
    assert_no_weight_is_unused(lambda: module(IDS), weights_of(module), KEY_BIAS.search)


@pytest.mark.parametrize("variant", REFUSED)
@torch.no_grad()
def test_every_weight_of_a_refused_architecture_has_a_say(variant):
    module = REFUSED[variant]()[0].double()
    assert_no_weight_is_unused(lambda: module(IDS), weights_of(module), KEY_BIAS.search)


@FEW
@given(specs())
@torch.no_grad()
def test_every_weight_of_a_spec_has_a_say(spec):
    # A ReLU can be dead for every token of so small a model, and nothing then reaches what is before it.
    gpt = gpt_of(replace(spec, activation="gelu")).double()
    ids = torch.arange(3 * spec.context_length).view(3, -1) % spec.vocab_size
    assert_no_weight_is_unused(lambda: gpt(ids), gpt.tensors, re.compile(r"\.key(\.\d+)?\.bias$").search)


NANO_ENDS = "transformer.wte transformer.wpe.weight transformer.ln_f lm_head"
NANO_BLOCK = "transformer.h.{} ln_1 ln_2 weight bias"
NANO_REST = "attn heads query key value c_attn c_proj", "mlp.c_fc mlp.c_proj"
BOOK_ENDS, BOOK_MLP = "tok_emb pos_emb.weight final_norm out_head", "ff.layers.0 ff.layers.2"
BOOK = BOOK_ENDS, "trf_blocks.{} norm1 norm2 scale shift", "att heads W_query W_key W_value qkv out_proj", BOOK_MLP
LECTURE = (
    "token_embedding_table position_embedding_table.weight ln_f lm_head",
    "blocks.{} ln1 ln2 weight bias",
    "sa heads query key value qkv proj",
    "ffwd.net.0 ffwd.net.2",
)
TORCH_REST = "self_attn heads query key value in_proj out_proj", "linear1 linear2"
LECTURE_SPEC = {"qkv": "per_head", "qkv_bias": False, "head": "biased", "activation": "relu"}
NO_BIAS = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "norm_bias"), False)
# Every layout without rotations as a spec.
AS_SPECS = {
    "scratch": (
        "token_table position_table.weight norm_at_end to_vocab",
        "layers.{} norm_before_attention norm_before_feed_forward scale shift",
        "attention heads to_query to_key to_value qkv to_out",
        "feed_forward.expand feed_forward.shrink",
        {"qkv_bias": False, "head": "tied", "activation": "gelu_tanh"},
    ),
    "per_head": (
        "embeddings.token_embedding embeddings.pos_embedding.weight layer_norm output_layer",
        "blocks.{} layer_norm1 layer_norm2 weight bias",
        "mha heads q k v qkv out_proj",
        "feed_forward.layers.0 feed_forward.layers.2",
        {"qkv": "per_head", "head": "biased"},
    ),
    "book": (*BOOK, {"qkv_bias": False, "activation": "gelu_tanh"}),
    "book_qkv_bias": (*BOOK, {"activation": "gelu_tanh"}),
    "book_fast": (
        BOOK_ENDS,
        "trf_blocks.{} norm1 norm2 weight bias",
        "att heads query key value qkv proj",
        BOOK_MLP,
        {"qkv": "fused", "qkv_bias": False, "activation": "gelu_tanh"},
    ),
    "nanogpt": (NANO_ENDS, NANO_BLOCK, *NANO_REST, {"qkv": "fused", "head": "tied"}),
    "nanogpt_no_bias": (NANO_ENDS, NANO_BLOCK, *NANO_REST, {"qkv": "fused", "head": "tied"} | NO_BIAS),
    "build_nanogpt": (NANO_ENDS, NANO_BLOCK, *NANO_REST, {"qkv": "fused", "head": "tied", "activation": "gelu_tanh"}),
    "hf_gpt2_like": (
        NANO_ENDS.replace("transformer.", ""),
        NANO_BLOCK.replace("transformer.", ""),
        *NANO_REST,
        {"qkv": "fused_conv1d", "head": "tied", "activation": "gelu_tanh"},
    ),
    "mingpt": (
        "tok_emb pos_emb ln_f head",
        "blocks.{} ln1 ln2 weight bias",
        "attn heads query key value qkv proj",
        "mlp.0 mlp.2",
        {},
    ),
    "lecture": (*LECTURE, LECTURE_SPEC),
    "lecture_old_scale": (*LECTURE, LECTURE_SPEC | {"attention_scale": "by_width"}),
    "no_output_projection": (*LECTURE, LECTURE_SPEC | {"output_projection": False}),
    "student": (
        "tok_emb pos_emb.weight ln_f head",
        "blocks.{} ln1 ln2 weight bias",
        "attn heads query key value qkv proj",
        "ffn.0 ffn.2",
        {"qkv": "fused", "qkv_bias": False, "output_bias": False, "mlp_width": 2 * WIDTH, "head": "tied"},
    ),
    "torch_layers": (
        "token_embedding position_embedding.weight ln_f head",
        "layers.{} norm1 norm2 weight bias",
        *TORCH_REST,
        {"qkv": "fused"},
    ),
    "mha": (
        "token_emb pos_emb.weight ln_f head",
        "blocks.{} ln_1 ln_2 weight bias",
        "attn heads query key value in_proj out_proj",
        "mlp.0 mlp.2",
        {"qkv": "fused"},
    ),
    "sinusoidal": (
        "embedding pos_encoder.weight transformer_encoder.norm linear",
        "transformer_encoder.layers.{} norm1 norm2 weight bias",
        *TORCH_REST,
        {"qkv": "fused", "activation": "relu", "head": "biased", "positions": "sinusoidal"},
    ),
}
ROTARY = {"story_chat", "llama2c", "llama2c_gqa", "llama_half"}


def test_every_variant_is_compared_with_another_implementation():
    assert AS_SPECS.keys() | ROTARY | {"sinusoidal_scaled"} == set(VARIANTS)


@pytest.mark.parametrize("variant", AS_SPECS)
def test_spec_computes_what_the_module_with_its_weights_does(variant):
    *words, said = AS_SPECS[variant]
    sizes = {"mlp_width": 4 * WIDTH} | said
    spec = Spec(VOCAB_SIZE, CONTEXT_LENGTH, HEADS, WIDTH // HEADS, LAYERS, naming=naming(*words), **sizes)
    module, _ = build(variant)
    weights = {name.replace("in_proj_", "in_proj."): tensor for name, tensor in weights_of(module).items()}
    assert weights.keys() == {name for _, name, _ in tensors_of(spec)}
    tensors = {role: weights[name] for role, name, _ in tensors_of(spec)}

    def error(spec):
        return (own_logits(FlatGPT(spec, tensors), IDS) - own_logits(module, IDS)).abs().max()

    assert error(spec) < 1e-12
    for activation in {"gelu", "gelu_tanh", "relu", "silu"} - {spec.activation}:
        assert error(replace(spec, activation=activation)) > 1e-5
    for scale in {"usual", "by_width", "one"} - {spec.attention_scale}:
        assert error(replace(spec, attention_scale=scale)) > 1e-3


def test_scaled_embeddings_are_unscaled_ones_times_the_root_of_the_width():
    scaled, plain = build("sinusoidal_scaled")[0], build("sinusoidal")[0]
    expected = own_logits(scaled, IDS)
    assert (own_logits(plain, IDS) - expected).abs().max() > 0.1
    with torch.no_grad():
        plain.embedding.weight *= WIDTH**0.5
    assert (own_logits(plain, IDS) - expected).abs().max() < 1e-12


def halves(weight, heads):
    """Rows of interleaved pairs (2i, 2i + 1) as transformers wants them, (i, i + head width / 2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


LLAMA_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "tok_emb": "model.embed_tokens",
    "embed_tokens": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "feed_forward": "mlp",
    "attn": "self_attn",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "blocks": "model.layers",
    "layers": "model.layers",
    "norm": "model.norm",
    "ln_f": "model.norm",
    "output": "lm_head",
    "head": "lm_head",
}


@pytest.mark.parametrize("variant", sorted(ROTARY))
def test_rotary_variant_computes_what_transformers_does(variant, monkeypatch):
    # transformers' own takes its input down to float32 in a float64 model too.
    exact = "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward"
    monkeypatch.setattr(exact, lambda norm, x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon))
    heads, width = 4, 32
    module, config = build(variant, width=width, heads=heads)
    kv_heads = {"llama2c_gqa": 2}.get(variant, heads)
    assert config.get("n_kv_heads", heads) == kv_heads
    weights = {}
    for name, tensor in weights_of(module).items():
        if name.endswith(("wq.weight", "wk.weight")):
            tensor = halves(tensor, heads if "wq" in name else kv_heads)
        weights[".".join(LLAMA_NAMES.get(word, word) for word in name.split("."))] = tensor
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": next(t.shape[0] for name, t in weights.items() if "gate_proj" in name),
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": variant in TIED,
    }
    if variant == "story_chat":
        model = StableLmForCausalLM(StableLmConfig(**sizes, partial_rotary_factor=1.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5))
    model.load_state_dict(weights)
    with torch.no_grad():
        found = model.eval().double()(input_ids=IDS).logits
    assert (found - own_logits(module, IDS)).abs().max() < 1e-12


def test_conv1d_variant_computes_what_transformers_gpt2_does():
    module, config = build("hf_gpt2_like")
    weights = {f"transformer.{name}".replace("transformer.lm", "lm"): t for name, t in weights_of(module).items()}
    model = GPT2LMHeadModel(GPT2Config(**config))
    model.load_state_dict(weights)
    with torch.no_grad():
        found = model.eval().double()(input_ids=IDS).logits
    assert (found - own_logits(module, IDS)).abs().max() < 1e-12


SAVED_KEYS = {
    "model_state_dict": {"epoch", "model_state_dict", "optimizer_state_dict", "config"},
    "model": {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"},
    "state_dict": {
        *("epoch", "global_step", "pytorch-lightning_version", "state_dict"),
        *("optimizer_states", "lr_schedulers", "hyper_parameters"),
    },
    "compiled": {"model_state_dict", "config"},
    "ddp": {"model_state_dict", "config"},
    "ddp_compiled": {"model_state_dict", "config"},
}
SAVED_PREFIXES = {
    "state_dict": "model.",
    "compiled": "_orig_mod.",
    "ddp": "module.",
    "ddp_compiled": "module._orig_mod.",
}


@pytest.mark.parametrize("how", WAYS_TO_SAVE)
@pytest.mark.parametrize("variant", ["book", "nanogpt", "torch_layers", "story_chat"])
def test_saved_object_holds_the_module_as_it_is(variant, how):
    module, config = build(variant)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    file = io.BytesIO()
    torch.save(saved(module, config, how), file)
    content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    state = content
    if how != "bare":
        assert content.keys() == SAVED_KEYS[how]
        state = content[how if how in content else "model_state_dict"]
        said = content[{"model": "model_args", "state_dict": "hyper_parameters"}.get(how, "config")]
        assert said == config
    prefix = SAVED_PREFIXES.get(how, "")
    assert state.keys() == {prefix + name for name in before}
    for name, tensor in before.items():
        assert torch.equal(state[prefix + name], tensor)
        assert torch.equal(module.state_dict()[name], tensor)
    optimizers = content.get("optimizer_states", [content.get("optimizer", content.get("optimizer_state_dict"))])
    if how in ("model_state_dict", "model", "state_dict"):
        moments = optimizers[0]["state"]
        assert len(moments) == len(list(module.parameters()))
        assert all(moment["step"] == 1 and moment["exp_avg"].abs().max() > 1e-4 for moment in moments.values())


@FEW
@given(specs())
def test_spec_is_small_and_its_gpt_is_as_it_says(spec):
    assert spec.width <= 32
    assert spec.layers <= 3
    assert spec.vocab_size <= 64
    assert spec.context_length <= 16
    gpt = gpt_of(spec)
    state, again = gpt.state_dict(), gpt_of(spec).state_dict()
    assert len(state) == len(gpt.tensors)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {n: s for _, n, s in tensors_of(spec)}
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    head, tokens = state[f"{spec.naming.head}.weight"], state[f"{spec.naming.tokens}.weight"]
    assert torch.equal(head, tokens) is (spec.head == "tied")
    ids = torch.arange(spec.context_length).view(1, -1) % spec.vocab_size
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % spec.vocab_size
    logits = own_logits(gpt, ids)
    assert logits.shape == (1, spec.context_length, spec.vocab_size)
    assert torch.equal(logits[:, :-1], own_logits(gpt, changed)[:, :-1])


SPEC = Spec(7, 5, 2, 4, 1, 8, NAMINGS[1], norm_bias=False, output_bias=False, mlp_bias=False)
ENDS_OF_SPEC = [
    "transformer_blocks.0.norm2.gamma",
    "transformer_blocks.0.ffn.w_1.weight",
    "transformer_blocks.0.ffn.w_2.weight",
    "norm.gamma",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("said", "attention"),
    [
        ({"qkv_bias": False}, ["W_q.weight", "W_k.weight", "W_v.weight", "W_o.weight"]),
        ({"qkv": "fused"}, ["W_qkv.weight", "W_qkv.bias", "W_o.weight"]),
        ({"qkv": "fused", "output_projection": False}, ["W_qkv.weight", "W_qkv.bias"]),
        (
            {"qkv": "per_head", "qkv_bias": False, "output_bias": True},
            [f"heads.{h}.W_{part}.weight" for h in (0, 1) for part in "qkv"] + ["W_o.weight", "W_o.bias"],
        ),
    ],
)
def test_spec_names_its_tensors_by_its_scheme(said, attention):
    assert list(gpt_of(replace(SPEC, **said)).state_dict()) == [
        "token_embed.weight",
        "pos_embed.weight",
        "transformer_blocks.0.norm1.gamma",
        *(f"transformer_blocks.0.self_attention.{name}" for name in attention),
        *ENDS_OF_SPEC,
    ]


def test_only_a_block_of_conv1d_is_turned():
    state = gpt_of(replace(SPEC, qkv="fused_conv1d", mlp_width=12)).state_dict()
    assert state["transformer_blocks.0.self_attention.W_qkv.weight"].shape == (8, 24)
    assert state["transformer_blocks.0.ffn.w_1.weight"].shape == (8, 12)
    assert state["transformer_blocks.0.ffn.w_2.weight"].shape == (12, 8)
    assert state["lm_head.weight"].shape == (7, 8)


@pytest.mark.parametrize(
    ("words", "positions", "name", "shape"),
    [
        (NAMINGS[1], "learned", "pos_embed.weight", (5, 8)),
        (NAMINGS[3], "learned", "embed.pos", (1, 5, 8)),
        (NAMINGS[1], "sinusoidal", "pos_embed.pe", (1, 5, 8)),
        (NAMINGS[3], "sinusoidal", "embed.pos.pe", (1, 5, 8)),
    ],
)
def test_positions_of_a_spec(words, positions, name, shape):
    table = gpt_of(replace(SPEC, naming=words, positions=positions)).state_dict()[name]
    assert table.shape == shape
    sinusoids = build("sinusoidal", context_length=5, width=8, heads=2)[0].pos_encoder.pe
    assert torch.allclose(table.view(1, 5, 8), sinusoids, atol=1e-6) is (positions == "sinusoidal")


def test_naming_schemes_differ_in_more_than_one_word():
    assert len(NAMINGS) >= 12
    for one in NAMINGS:
        for other in NAMINGS:
            assert one is other or sum(a != b for a, b in zip(one, other, strict=True)) >= 5


@pytest.mark.parametrize(
    "alike",
    [
        lambda spec: spec.vocab_size == spec.context_length,
        lambda spec: spec.vocab_size == spec.width,
        lambda spec: spec.context_length == spec.width,
        lambda spec: spec.mlp_width == spec.width,
        lambda spec: spec.mlp_width == 3 * spec.width,
        lambda spec: spec.heads == 1 and spec.qkv == "per_head",
    ],
)
def test_sizes_that_make_tensors_look_alike_are_drawn(alike):
    assert alike(find(specs(), alike, settings=settings(derandomize=True, database=None)))
