import pytest
import torch
from hand_written import HEADS, WIDTH, build, weights_of
from transformers import GPT2LMHeadModel

from fledge.checkpoints.gpt2 import to_gpt2
from fledge.checkpoints.layouts import recognise
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.proof import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    probe_ids,
    prove_exact,
    prove_saved,
    reference,
)
from fledge.cli import UserError

NAMES = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    *(
        f"transformer.h.1.{name}.{kind}"
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ),
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "lm_head.weight",
)


def converted(variant="per_head"):
    module, config = build(variant)
    gpt, _ = recognise(Checkpoint(weights_of(module), config, left_out={}, source={}), n_head=HEADS)
    config, weights, _ = to_gpt2(gpt, {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    return reference(gpt), config, {name: tensor.clone() for name, tensor in weights.items()}


def model_of(config, weights):
    model = GPT2LMHeadModel(config).double()
    model.load_state_dict(weights)
    return model


def assert_disproven(probes, config, weights):
    model = model_of(config, weights)
    with pytest.raises(UserError, match="conversion is wrong"):
        prove_exact(probes, model)
    with pytest.raises(UserError, match="saved model differs"):
        prove_saved(probes, model.float())


@pytest.mark.parametrize("variant", ["scratch", "per_head", "book", "nanogpt"])
def test_right_conversion_is_proven(variant):
    probes, config, weights = converted(variant)
    model = model_of(config, weights)
    assert prove_exact(probes, model) <= FLOAT64_TOLERANCE
    saved = prove_saved(probes, model.float())
    assert 0 < saved["max_relative_error"] <= FLOAT32_TOLERANCE
    assert saved["argmax_equal"] == 1


def test_every_tensor_of_a_converted_model_is_tried():
    _, _, weights = converted()
    assert {name.replace(".h.0.", ".h.1.") for name in weights} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_a_thousandth_off_is_disproven(name):
    probes, config, weights = converted()
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[name] += 1e-3 * weights[name].square().mean().sqrt() * noise
    assert_disproven(probes, config, weights)


def test_square_projection_left_as_it_was_is_disproven():
    probes, config, weights = converted()
    name = "transformer.h.0.attn.c_proj.weight"
    assert weights[name].shape == (WIDTH, WIDTH)
    weights[name] = weights[name].T.contiguous()
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize(("variant", "wrong"), [("per_head", "gelu_pytorch_tanh"), ("book", "gelu")])
def test_other_gelu_is_disproven(variant, wrong):
    probes, config, weights = converted(variant)
    assert config.activation_function != wrong
    config.activation_function = wrong
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize("swapped", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=["q_k", "k_v", "q_v"])
def test_swapped_projections_are_disproven(swapped):
    probes, config, weights = converted()
    for kind in ("weight", "bias"):
        name = f"transformer.h.0.attn.c_attn.{kind}"
        parts = weights[name].chunk(3, dim=-1)
        weights[name] = torch.cat([parts[i] for i in swapped], dim=-1)
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize("n_head", [1, 2 * HEADS])
def test_other_number_of_heads_is_disproven(n_head):
    probes, config, weights = converted()
    config.n_head = n_head
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.1.mlp.c_proj.bias", "lm_head.weight"])
def test_values_that_are_not_finite_are_disproven(name, value):
    probes, config, weights = converted()
    weights[name].view(-1)[5] = value
    assert_disproven(probes, config, weights)


def test_one_wrong_number_at_the_last_position_is_disproven():
    probes, config, weights = converted()
    weights["transformer.wpe.weight"][-1, 0] += 1e-3
    assert_disproven(probes, config, weights)


@pytest.mark.parametrize("context_length", [1, 7, 48, 512])
def test_probes_touch_every_position_and_are_the_same_on_every_run(context_length):
    probes = probe_ids(100, context_length)
    assert max(ids.shape[1] for ids in probes) == context_length
    assert all(ids.min() >= 0 and ids.max() < 100 for ids in probes)
    assert all(torch.equal(*pair) for pair in zip(probes, probe_ids(100, context_length), strict=True))


def test_model_whose_logits_are_all_zero_is_proven_too():
    probes, config, weights = converted("nanogpt")
    probes = [(ids, torch.zeros_like(logits)) for ids, logits in probes]
    model = model_of(config, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    assert prove_exact(probes, model) == 0
    assert prove_saved(probes, model.float())["max_relative_error"] == 0
