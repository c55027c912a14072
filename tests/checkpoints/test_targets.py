from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hand_written import (
    CONTEXT_LENGTH,
    HEADS,
    HIDDEN,
    VARIANTS,
    VOCAB_SIZE,
    WIDTH,
    build,
    checkpoint_of,
    own_logits,
    stated,
)
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from random_gpts import KINDS, empty, filled, gpts
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.proof import probes_of, prove_exact, prove_greedy, prove_saved, prove_written, rounding
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.targets import TARGETS, fold_head_bias, obstacles, refuse_unconvertible, to_target
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each class is proven over random architectures

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
IDS = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
HEAD_BIAS = "The head's bias is carried by one coordinate of the final norm, which the other ones determine."
NO_OUTPUT = "The missing attention output projection is an identity."
OLD_SCALE = "The attention scale 0.204124 instead of 0.408248 is in the queries."
REORDERED = "The rows of queries and keys are reordered: RoPE turns halves of a head here, not neighbours."
EMBEDDING_SCALE = "The embeddings hold their scale 4.89898, and the head is untied from them."
# The class that holds each variant, and what must be folded for that.
CONVERTED = {
    "scratch": ("GPT2LMHeadModel", []),
    "per_head": ("GPT2LMHeadModel", [HEAD_BIAS]),
    "book": ("GPT2LMHeadModel", []),
    "book_qkv_bias": ("GPT2LMHeadModel", []),
    "book_fast": ("GPT2LMHeadModel", []),
    "nanogpt": ("GPT2LMHeadModel", []),
    "nanogpt_no_bias": ("GPT2LMHeadModel", []),
    "build_nanogpt": ("GPT2LMHeadModel", []),
    "hf_gpt2_like": ("GPT2LMHeadModel", []),
    "mingpt": ("GPT2LMHeadModel", []),
    "lecture": ("GPT2LMHeadModel", [HEAD_BIAS]),
    "lecture_old_scale": ("GPT2LMHeadModel", [HEAD_BIAS, OLD_SCALE]),
    "no_output_projection": ("GPT2LMHeadModel", [HEAD_BIAS, NO_OUTPUT]),
    "student": ("GPT2LMHeadModel", []),
    "torch_layers": ("GPT2LMHeadModel", []),
    "mha": ("GPT2LMHeadModel", []),
    "sinusoidal": ("GPT2LMHeadModel", [HEAD_BIAS]),
    "sinusoidal_scaled": ("GPT2LMHeadModel", [HEAD_BIAS, EMBEDDING_SCALE]),
    "story_chat": ("StableLmForCausalLM", [REORDERED]),
    "llama2c": ("LlamaForCausalLM", [REORDERED]),
    "llama2c_gqa": ("LlamaForCausalLM", [REORDERED]),
    "llama_half": ("LlamaForCausalLM", []),
}
NORM_NAMES = ("norm_1", "norm_2", "final_norm")
TIED = {"scratch", "nanogpt", "nanogpt_no_bias", "build_nanogpt", "hf_gpt2_like", "student"}
TIED |= {"story_chat", "llama2c", "llama2c_gqa"}


def recognised(variant: str, **sizes: int) -> tuple[nn.Module, CanonicalGPT]:
    module, config = build(variant, **sizes)
    return module, recognise(checkpoint_of(module, config), told=stated(**HIDDEN.get(variant, {})))[0]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_held_exactly(variant):
    module, gpt = recognised(variant, heads=4)
    config, weights, folds = to_target(gpt, TOKEN_IDS)
    model = empty(config)
    assert (type(model).__name__, folds) == CONVERTED[variant]
    assert config.tie_word_embeddings is (variant in TIED)
    probes = probes_of(gpt)
    assert all((expected - own_logits(module, ids)).abs().max() <= 1e-9 for ids, expected in probes)
    assert prove_exact(probes, model, weights) <= 1e-9


@pytest.mark.parametrize(
    "variant", ["nanogpt", "per_head", "sinusoidal_scaled", "story_chat", "llama2c_gqa", "llama_half"]
)
def test_saved_model_is_the_hand_written_one(variant, tmp_path):
    module, gpt = recognised(variant, heads=4)
    config, weights, _ = to_target(gpt, TOKEN_IDS)
    filled(config, weights, torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    probes = probes_of(gpt)
    proof = prove_saved(probes, model, rounding(gpt, probes))
    assert proof["max_relative_error"] <= 1e-5
    assert proof["argmax_equal"] == 1
    assert prove_greedy(gpt, model) == 16
    expected = own_logits(module, IDS)
    assert (logits_of(model, IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["nanogpt", "lecture", "llama2c_gqa"])
def test_half_precision_is_widened_without_loss(variant, dtype):
    module, config = build(variant, heads=4)
    gpt, _ = recognise(checkpoint_of(module.to(dtype), config))
    config, weights, _ = to_target(gpt, TOKEN_IDS)
    probes = [(IDS, own_logits(module, IDS))]
    assert prove_exact(probes, empty(config), weights) <= 1e-9


def test_topic_ending_model_converts_at_its_real_width():
    module, config = build("per_head", 50257, 512, 384, 6, 2)
    generator = torch.Generator().manual_seed(2)
    nn.init.normal_(module.output_layer.bias, std=2, generator=generator)
    gpt, _ = recognise(checkpoint_of(module, config))
    config, weights, folds = to_target(gpt, TOKEN_IDS)
    assert folds == [HEAD_BIAS]
    model = filled(config, weights, torch.float32)
    ids = torch.randint(50257, (1, 32), generator=generator)
    found, expected = logits_of(model, ids), own_logits(module, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_target_holds_every_such_gpt_exactly(target, data):
    gpt = data.draw(gpts(KINDS[target]))
    ids = torch.randint(gpt.vocab_size, (2, gpt.context_length), generator=torch.Generator().manual_seed(1))
    config, weights, folds = to_target(gpt, dict.fromkeys(TOKEN_IDS, 0), target)
    model = empty(config)
    assert config.model_type == target
    assert prove_exact([(ids, canonical_logits(gpt, ids))], model, weights, folds) <= 1e-6


CHANGES = (
    {"attention_scale": 0.3}, {"rope_width": 2}, {"window": 2}, {"logit_cap": 3.0}, {"attention_cap": 2.0},
    {"parallel": True}, {"qk_norm_after_rope": True}, {"embedding_norm": True}, {"rope_span": "width"},
    {"norm_eps_outside": True}, {"norm_unbiased": True}, {"final_norm_eps": 0.1}, {"qk_norm_eps": 0.1},
    {"rope_direction": -1}, {"alibi": True}, {"activation": "relu2"}, {"norm_offset": 0.5}, {"embedding_scale": 2.0},
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_each_class_that_lacks_nothing_holds_the_model(data):
    """What one class holds, with one thing changed: no class may take it and compute something else."""
    gpt = data.draw(gpts(KINDS[data.draw(st.sampled_from(list(TARGETS)))]))
    gpt = replace(gpt, **data.draw(st.sampled_from(CHANGES)))
    probes = probes_of(gpt)
    for target, lacks in obstacles(gpt).items():
        if not lacks:
            config, weights, folds = to_target(gpt, dict.fromkeys(TOKEN_IDS, 0), target)
            assert prove_exact(probes, empty(config), weights, folds) <= 1e-6


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_saved_model_of_each_class_answers_and_trains(target, data):
    gpt = data.draw(gpts(KINDS[target]))
    assume(gpt.width >= 8 and gpt.context_length > 1)  # narrower ones round in float32 as no real model does
    config, weights, _ = to_target(gpt, dict.fromkeys(TOKEN_IDS, 0), target)
    with TemporaryDirectory() as folder:
        written = filled(config, weights, torch.float32)
        written.save_pretrained(folder)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        prove_written(Path(folder) / "model.safetensors", revert_weight_conversion(written, weights))
        model = AutoModelForCausalLM.from_pretrained(folder)
    probes = probes_of(gpt)
    assert prove_saved(probes, model, rounding(gpt, probes))["argmax_equal"] > 0.9
    assert prove_greedy(gpt, model) == max(0, min(16, gpt.context_length - 1))
    ids = torch.randint(gpt.vocab_size, (2, gpt.context_length), generator=torch.Generator().manual_seed(1))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.get_output_embeddings().weight.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "target", "lacks"),
    [
        ("nanogpt", "stablelm", "learned positions and no MLP without a gate"),
        ("nanogpt", "llama", "learned positions and no LayerNorm and no MLP without a gate"),
        ("story_chat", "gpt2", "rotary positions and no gated MLP"),
        ("story_chat", "llama", "LayerNorm"),
        ("llama2c", "gpt2", "rotary positions and no RMSNorm and no gated MLP"),
        ("llama2c", "stablelm", "RMSNorm"),
    ],
)
def test_target_that_lacks_a_feature_is_refused_with_it(variant, target, lacks):
    _, gpt = recognised(variant)
    with pytest.raises(UserError) as refused:
        to_target(gpt, TOKEN_IDS, target)
    assert str(refused.value) == f"--target {target} cannot hold this model exactly: it has no {lacks}."


LEARNED, ROTARY, LLAMA = (recognised(variant)[1] for variant in ("nanogpt", "story_chat", "llama2c"))


# What no class holds, and what the nearest one lacks.
UNHELD = {
    "RMSNorm with a table of positions": (replace(LEARNED, norm="rmsnorm"), "gpt2, has no RMSNorm"),
    "ALiBi beside rotary positions": (replace(LLAMA, alibi=True), "llama, has no ALiBi beside rotary positions"),
    "ALiBi beside a table": (replace(LEARNED, alibi=True), "mpt, has no learned positions beside ALiBi"),
    "a gated MLP with a table of positions": (
        replace(LEARNED, tensors=LEARNED.tensors | {"blocks.0.mlp_gate.weight": torch.ones(96, 24)}),
        "gpt2, has no gated MLP",
    ),
    "post-norm blocks with a final norm": (
        replace(LEARNED, norm_placement="post"),
        "opt, has no final norm behind post-norm blocks",
    ),
    "biases in a gated MLP behind LayerNorm": (
        replace(ROTARY, tensors=ROTARY.tensors | {f"blocks.0.{part}.bias": None for part in ("output", "mlp_in")}),
        "stablelm, has no bias in mlp_in, output",
    ),
    "a head's bias behind RMSNorm": (
        replace(LLAMA, tensors=LLAMA.tensors | {"head.bias": torch.ones(61)}),
        "llama, has no bias on the head",
    ),
    "a head's bias behind no norm": (
        replace(LEARNED, final_norm=False, tensors=LEARNED.tensors | {"head.bias": torch.ones(61)}),
        "opt, has no bias on the head",
    ),
    "blocks without norms": (replace(LEARNED, norm_placement="none"), "gpt2, has no blocks without norms"),
    "capped logits behind LayerNorm": (replace(LEARNED, logit_cap=30.0), "gpt2, has no soft cap on logits"),
    "OPT with another epsilon": (
        replace(LEARNED, norm_placement="post", final_norm=False, norm_eps=1e-6),
        "opt, has no norm_eps 1e-06",
    ),
}


@pytest.mark.parametrize("feature", UNHELD)
def test_model_that_no_target_holds_is_refused_with_what_the_nearest_lacks(feature):
    gpt, lacks = UNHELD[feature]
    with pytest.raises(UserError) as refused:
        to_target(gpt, TOKEN_IDS)
    assert str(refused.value) == f"No class of transformers holds this model exactly: the nearest, {lacks}."


def test_window_as_long_as_the_context_is_none():
    for window, lacks in ((19, {"sliding window", "sliding window in some of its blocks"}), (20, set())):
        gpt = replace(LLAMA, window=window, window_pattern="SL")
        assert {*obstacles(gpt)["llama"]} == lacks


def test_scale_behind_a_norm_of_queries_and_keys_needs_weights_there():
    for scale, is_needed in ((LLAMA.usual_scale, False), (0.3, True)):
        gpt = replace(LLAMA, qk_norm="head", attention_scale=scale)
        assert ("weights in a norm of queries and keys" in obstacles(gpt)["nanochat"]) == is_needed


def test_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--target bert is unknown; choose auto, gpt2, stablelm, llama, opt, "):
        to_target(LEARNED, TOKEN_IDS, "bert")


def test_model_without_a_causal_mask_is_refused():
    refuse_unconvertible(LEARNED)
    with pytest.raises(UserError, match="trained without a causal mask"):
        refuse_unconvertible(replace(LEARNED, causal=False))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 64), st.sampled_from([0.0, 0.2, 0.9, 1.0]), st.integers(0, 2**32))
def test_folded_head_bias_changes_no_logit(vocab_size, width, share_of_zero_gains, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head, head_bias, shift, x = random(vocab_size, width), 2 * random(vocab_size), random(width), random(32, width)
    gain = random(width) * (torch.rand(width, generator=generator) >= share_of_zero_gains)
    expected = F.linear(F.layer_norm(x, (width,), gain, shift), head, head_bias)
    new_head, new_gain, new_shift = fold_head_bias(head, head_bias, gain, shift)
    found = F.layer_norm(x, (width,), new_gain, new_shift) @ new_head.T
    assert (found - expected).abs().max() <= 1e-10
    assert new_gain.count_nonzero() == width - 1
    assert new_shift.count_nonzero() == 1


def test_head_bias_goes_where_the_subtraction_loses_least():
    head, gain = torch.ones(5, 4), torch.tensor([1.0, -0.1, 0.5, 3.0])
    head[:, 2] = 0.01
    _, new_gain, new_shift = fold_head_bias(head, torch.ones(5), gain, torch.zeros(4))
    assert new_gain.tolist() == [1, 1, 0, 1]
    assert new_shift.tolist() == [0, 0, 1, 0]


def test_converting_leaves_the_canonical_gpt_alone():
    _, gpt = recognised("sinusoidal_scaled")
    before = {name: tensor.clone() for name, tensor in gpt.tensors.items()}
    to_target(gpt, TOKEN_IDS)
    assert gpt.tensors.keys() == before.keys()
    assert all(torch.equal(gpt.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("mlp_width", "n_inner"), [(4 * WIDTH, None), (WIDTH, WIDTH)])
def test_gpt2_config_holds_what_the_checkpoint_shows(mlp_width, n_inner):
    module, config = build("nanogpt")
    for block in module.transformer.h:
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(WIDTH, mlp_width), nn.Linear(mlp_width, WIDTH)
    gpt, _ = recognise(checkpoint_of(module, config), told=stated(norm_eps=1e-6, activation="gelu_tanh"))
    config, _, _ = to_target(gpt, TOKEN_IDS)
    assert (config.vocab_size, config.n_positions, config.n_embd) == (VOCAB_SIZE, CONTEXT_LENGTH, WIDTH)
    assert (config.n_head, config.n_layer, config.n_inner) == (HEADS, 2, n_inner)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_pytorch_tanh", 1e-6)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)


@pytest.mark.parametrize(("variant", "eps"), [("story_chat", "layer_norm_eps"), ("llama2c_gqa", "rms_norm_eps")])
def test_rotary_config_holds_what_the_checkpoint_shows(variant, eps):
    module, config = build(variant, heads=4)
    gpt, _ = recognise(checkpoint_of(module, config), told=stated(norm_eps=1e-6, rope_theta=5e5, activation="gelu"))
    config, _, _ = to_target(gpt, TOKEN_IDS)
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (61, 20, 24)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2 if variant == "llama2c_gqa" else 4)
    assert config.intermediate_size == (64 if variant == "llama2c_gqa" else 96)
    assert (config.to_dict()[eps], config.hidden_act, config.rope_parameters["rope_theta"]) == (1e-6, "gelu", 5e5)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
