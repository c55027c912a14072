from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from hand_written import HEADS, HIDDEN, VOCAB_SIZE, WIDTH, build, checkpoint_of, stated
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fledge.checkpoints import proof
from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.proof import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    probe_ids,
    probes_of,
    prove_exact,
    prove_greedy,
    prove_saved,
    prove_written,
    rounding,
)
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.targets import to_target
from fledge.checkpoints.targets.folds import ACROSS_ROTATION
from fledge.errors import UserError

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LLAMA_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
# Every tensor of a converted model: those of a block, and those around the blocks.
TENSORS = {
    "per_head": (
        {f"transformer.h.{{}}.{part}.{kind}" for part in GPT2_PARTS for kind in ("weight", "bias")},
        {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
        | {"lm_head.weight"},
    ),
    "story_chat": (
        {f"model.layers.{{}}.{part}.weight" for part in LLAMA_PARTS}
        | {f"model.layers.{{}}.{norm}.bias" for norm in ("input_layernorm", "post_attention_layernorm")},
        {f"model.{name}" for name in ("embed_tokens.weight", "norm.weight", "norm.bias")},
    ),
    "llama_half": (
        {f"model.layers.{{}}.{part}.weight" for part in LLAMA_PARTS},
        {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"},
    ),
}


def converted(variant: str = "per_head", **sizes: int):
    """Canonical GPT, its probes, and the config and the weights of what it is converted to."""
    module, config = build(variant, **sizes)
    gpt, _ = recognise(checkpoint_of(module, config), told=stated(**HIDDEN.get(variant, {})))
    config, weights, _ = to_target(gpt, TOKEN_IDS)
    return gpt, probes_of(gpt), config, {name: tensor.clone() for name, tensor in weights.items()}


def empty(config) -> PreTrainedModel:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def filled(config, weights) -> PreTrainedModel:
    model = empty(config)
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model


def assert_disproven(probes, config, weights):
    with pytest.raises(UserError, match=r"conversion is wrong: logits differ by .* in float64, 1e-09 allowed"):
        prove_exact(probes, empty(config), weights)
    with pytest.raises(UserError, match=r"saved model differs by .* of its largest logit, 1e-05 allowed"):
        prove_saved(probes, filled(config, weights))


@pytest.mark.parametrize("variant", TENSORS)
def test_right_conversion_is_proven(variant):
    gpt, probes, config, weights = converted(variant)
    assert 0 < rounding(gpt, probes) <= FLOAT32_TOLERANCE
    assert prove_exact(probes, empty(config), weights) <= FLOAT64_TOLERANCE
    found = prove_saved(probes, filled(config, weights))
    assert 0 < found["max_relative_error"] <= FLOAT32_TOLERANCE
    assert found["argmax_equal"] == 1


@pytest.mark.parametrize("variant", [*TENSORS, "nanogpt"])
def test_proving_leaves_the_model_as_it_was(variant):
    _, probes, config, weights = converted(variant)
    model = empty(config)
    parameters = model.num_parameters()
    first = prove_exact(probes, model, weights)
    assert model.num_parameters() == parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert prove_exact(probes, model, weights) == first
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("variant", TENSORS)
def test_any_tensor_a_thousandth_off_is_disproven(variant):
    _, probes, config, weights = converted(variant)
    in_block, around = TENSORS[variant]
    assert weights.keys() == around | {name.format(n) for name in in_block for n in range(2)}
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert_disproven(probes, config, weights | {name: tensor + 1e-3 * tensor.square().mean().sqrt() * noise})


def test_what_is_in_float64_stays_so_whatever_a_model_asks_for():
    exact, rounded, whole = torch.full((2,), 1 / 3, dtype=torch.float64), torch.full((2,), 1 / 3), torch.arange(2)
    casts = (
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float32),
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
    )
    with proof._InFloat64():
        assert all(cast(exact).dtype == torch.float64 for cast in casts)
        assert all(cast(x).dtype == torch.float32 for cast in casts for x in (rounded, whole))
        assert all(torch.equal(cast(exact), exact) for cast in casts[:3])
    assert exact.float().dtype == torch.float32


def test_square_projection_left_as_it_was_is_disproven():
    _, probes, config, weights = converted()
    name = "transformer.h.0.attn.c_proj.weight"
    assert weights[name].shape == (WIDTH, WIDTH)
    assert_disproven(probes, config, weights | {name: weights[name].T})


def test_rotated_rows_left_as_they_were_are_disproven():
    gpt, probes, config, weights = converted("story_chat")
    for part, name in (("query", "q_proj"), ("key", "k_proj")):
        for n in range(gpt.n_layer):
            weights[f"model.layers.{n}.self_attn.{name}.weight"] = gpt.tensors[f"blocks.{n}.{part}.weight"]
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize("swapped", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=["q_k", "k_v", "q_v"])
def test_swapped_projections_are_disproven(swapped):
    _, probes, config, weights = converted()
    for kind in ("weight", "bias"):
        name = f"transformer.h.0.attn.c_attn.{kind}"
        parts = weights[name].chunk(3, dim=-1)
        weights[name] = torch.cat([parts[i] for i in swapped], dim=-1)
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("per_head", {"activation_function": "gelu_pytorch_tanh"}),
        ("book", {"activation_function": "gelu"}),
        ("per_head", {"n_head": 1}),
        ("per_head", {"n_head": 2 * HEADS}),
        ("per_head", {"layer_norm_epsilon": 1e-6}),
        ("per_head", {"scale_attn_weights": False}),
        ("story_chat", {"hidden_act": "gelu"}),
        ("story_chat", {"layer_norm_eps": 1e-6}),
        ("llama_half", {"rms_norm_eps": 1e-6}),
        ("llama_half", {"rope_parameters": {"rope_type": "default", "rope_theta": 9_999.0}}),
    ],
)
def test_config_that_says_something_else_is_disproven(variant, wrong):
    _, probes, config, weights = converted(variant)
    changed = type(config)(**config.to_dict() | wrong)
    assert changed.to_dict() != config.to_dict()
    with pytest.raises(UserError, match="conversion is wrong"):
        prove_exact(probes, empty(changed), weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.1.mlp.c_proj.bias", "lm_head.weight"])
def test_values_that_are_not_finite_are_disproven(name, value):
    _, probes, config, weights = converted()
    weights[name].view(-1)[5] = value
    with pytest.raises(UserError, match="conversion is wrong"):
        prove_exact(probes, empty(config), weights)
    with pytest.raises(UserError, match=r"saved model differs by (nan|inf)"):
        prove_saved(probes, filled(config, weights))


def test_one_wrong_number_at_the_last_position_is_disproven():
    _, probes, config, weights = converted()
    weights["transformer.wpe.weight"][-1, 0] += 1e-3
    assert_disproven(probes, config, weights)


DAMAGED = {
    "a row that no probe touches": lambda saved, row: saved["wte"][row].mul_(1.0001),
    "the last row": lambda saved, row: saved["wte"][-1].mul_(1.0001),
    "one row more": lambda saved, row: saved.update(wte=torch.cat([saved["wte"], saved["wte"][:1]])),
    "missing": lambda saved, row: saved.pop("wte"),
    "one too many": lambda saved, row: saved.update(wtes=torch.ones(2)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_file_that_is_not_what_was_written_is_refused(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "READ_AT_ONCE", WIDTH)  # a row at a time
    gpt, probes, _, _ = converted("nanogpt", vocab_size=2000)
    weights = {"wte": gpt.tensors["token_embedding.weight"].contiguous(), "norm": gpt.tensors["final_norm.weight"]}
    save_file(weights, tmp_path / "model.safetensors")
    prove_written(tmp_path / "model.safetensors", weights)
    touched = {token for ids, _ in probes for token in ids.flatten().tolist()}
    saved = {name: tensor.clone() for name, tensor in weights.items()}
    DAMAGED[damage](saved, min(set(range(2000)) - touched))
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"reads back another wtes? than was written"):
        prove_written(tmp_path / "model.safetensors", weights)


def test_no_more_error_is_allowed_than_each_tolerance_says():
    _, probes, config, weights = converted()
    off = [(ids, logits * (1 + 2e-6)) for ids, logits in probes]
    with pytest.raises(UserError, match=r"2\.0e-06 of the largest in float64, 1e-06 allowed"):
        prove_exact(off, empty(config), weights, [ACROSS_ROTATION])
    off = [(ids, logits * (1 + 2e-4)) for ids, logits in probes]
    with pytest.raises(UserError, match=r"of its largest logit, 0\.0001 allowed"):
        prove_saved(off, filled(config, weights), float32_rounding=1.0)


def test_error_is_a_share_of_the_largest_logit():
    gpt, _, config, weights = converted("llama_half")
    weights["lm_head.weight"] = 1e6 * weights["lm_head.weight"].double()
    loud = replace(gpt, tensors=gpt.tensors | {"head.weight": 1e6 * gpt.tensors["head.weight"].double()})
    assert prove_exact(probes_of(loud), empty(config), weights) <= FLOAT64_TOLERANCE


def test_error_of_any_probe_counts():
    _, probes, config, weights = converted()
    for wrong in range(len(probes)):
        off = [(ids, logits + (i == wrong)) for i, (ids, logits) in enumerate(probes)]
        assert_disproven(off, config, weights)


def test_ids_to_avoid_are_in_no_probe():
    gpt, _, _, _ = converted()
    usual, kept = probe_ids(gpt), probe_ids(gpt, avoid={0, 1, 5})
    assert all({0, 1, 5}.isdisjoint(ids.flatten().tolist()) for ids in kept)
    for ids, other in zip(usual, kept, strict=True):
        assert torch.equal(other, torch.where(torch.isin(ids, torch.tensor([0, 1, 5])), 2, ids))


@pytest.mark.parametrize(("context_length", "checked"), [(1, 0), (2, 1), (9, 8), (20, 16), (64, 16)])
def test_greedy_tokens_are_those_of_the_source(context_length, checked):
    gpt, _, config, weights = converted(context_length=context_length)
    assert prove_greedy(gpt, filled(config, weights)) == checked


@pytest.mark.parametrize("variant", TENSORS)
def test_greedy_tokens_of_another_model_are_refused(variant):
    gpt, _, config, weights = converted(variant)
    name = next(name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in weights)
    with pytest.raises(UserError, match=r"continues differently from its source: at token \d+ its choice is .* below"):
        prove_greedy(gpt, filled(config, weights | {name: weights[name].roll(1, 0)}))
    first = {"per_head": "transformer.h.0.mlp.c_fc.weight"}.get(variant, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"continues differently from its source: at token \d+ "):
        prove_greedy(gpt, filled(config, weights | {first: -weights[first]}))


def test_greedy_choice_among_equals_is_right():
    gpt, _, config, weights = converted("nanogpt")
    gpt = replace(gpt, tensors={name: torch.zeros_like(tensor) for name, tensor in gpt.tensors.items()})
    gpt.tensors["position_embedding.weight"] = torch.ones_like(gpt.tensors["position_embedding.weight"])
    gpt.tensors["final_norm.bias"] = torch.ones(WIDTH)
    gpt.tensors["token_embedding.weight"] = gpt.tensors["head.weight"] = torch.ones(VOCAB_SIZE, WIDTH)
    config, weights, _ = to_target(gpt, TOKEN_IDS)
    assert prove_greedy(gpt, filled(config, weights)) == 16


def of_size(vocab_size: int, context_length: int) -> CanonicalGPT:
    return recognise(checkpoint_of(*build("nanogpt", vocab_size, context_length)))[0]


@pytest.mark.parametrize("context_length", [1, 7, 48, 512])
def test_probes_touch_every_position_and_are_the_same_on_every_run(context_length):
    gpt = of_size(100, context_length)
    probes = probe_ids(gpt)
    assert [tuple(ids.shape) for ids in probes] == [(1, context_length), (4, min(8, context_length))]
    assert all(ids.min() >= 0 and ids.max() < 100 for ids in probes)
    assert probes[0][0, -1] == 99
    assert probes[0][0, 0] == (0 if context_length > 1 else 99)
    assert all(torch.equal(*pair) for pair in zip(probes, probe_ids(gpt), strict=True))
    for ids, logits in probes_of(gpt):
        assert torch.equal(logits, canonical_logits(gpt, ids))


def test_probe_of_a_large_model_is_shorter_than_its_context(monkeypatch):
    gpt = of_size(100, 512)
    parameters = sum(tensor.numel() for tensor in gpt.tensors.values())
    monkeypatch.setattr(proof, "PROBE_WORK", 100.5 * parameters)
    assert probe_ids(gpt)[0].shape == (1, 100)
    monkeypatch.setattr(proof, "PROBE_WORK", 1)
    assert probe_ids(gpt)[0].shape == (1, 32)


def test_model_whose_logits_are_all_zero_is_proven_too():
    _, probes, config, weights = converted("nanogpt")
    probes = [(ids, torch.zeros_like(logits)) for ids, logits in probes]
    weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    assert prove_exact(probes, empty(config), weights) == 0
    assert prove_saved(probes, filled(config, weights))["max_relative_error"] == 0
