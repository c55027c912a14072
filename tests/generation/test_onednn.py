import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from fledge.generation import onednn
from fledge.generation.onednn import WORTH, by_onednn

SMALL = {"vocab_size": 700, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=64, **SMALL)
LLAMA = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, attention_bias=True, **SMALL
)


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param).eval()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_logits_are_those_of_pytorch(model, rows, monkeypatch):
    ids = torch.randint(700, (rows, 7))
    calls = []
    monkeypatch.setattr(onednn, "WORTH", 0)
    monkeypatch.setattr(onednn, "_forward", lambda *given, real=onednn._forward: calls.append(1) or real(*given))
    with torch.no_grad():
        expected = model(ids).logits
        with by_onednn(model):
            found = model(ids).logits
    assert len(calls) == (9 if isinstance(model, GPT2LMHeadModel) else 15)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_of_it_stays_on_the_model(model):
    before = copy.deepcopy(model)
    with by_onednn(model), by_onednn(model):
        assert any("forward" in vars(part) for part in model.modules())
    assert not any("forward" in vars(part) for part in model.modules())
    with pytest.raises(ZeroDivisionError), by_onednn(model):
        _ = 1 / 0
    assert not any("forward" in vars(part) for part in model.modules())
    assert str(model) == str(before)


def test_gradients_are_not_lost(model):
    with by_onednn(model):
        model(torch.zeros(1 + WORTH // (128 * 128), 4, dtype=torch.long)).logits.sum().backward()
    assert all(part.grad is not None for part in model.parameters())


def unlike(*given):
    return torch.zeros(2, 3, 4)


def failing(error):
    def multiply(*given):
        raise error

    return multiply


@pytest.mark.parametrize(
    "operator",
    [
        failing(AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")),
        failing(RuntimeError("could not create a primitive descriptor")),
        failing(TypeError("_linear_pointwise() missing 1 required positional argument")),
        unlike,
    ],
)
def test_without_a_working_operator_layers_multiply_as_they_did(operator, monkeypatch):
    monkeypatch.setattr(onednn, "_multiply", operator)
    monkeypatch.setattr(onednn, "works", onednn.works.__wrapped__)
    model = GPT2LMHeadModel(GPT2).eval()
    with torch.no_grad(), by_onednn(model):
        assert not any("forward" in vars(part) for part in model.modules())


def test_a_variable_turns_it_off(model, monkeypatch):
    monkeypatch.setenv("FLEDGE_ONEDNN", "0")
    with by_onednn(model):
        assert not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
def test_under_autocast_the_logits_are_those_of_pytorch(model, monkeypatch):
    monkeypatch.setattr(onednn, "WORTH", 1 << 16)  # some layers below, so that others read what autocast rounded
    ids = torch.randint(700, (3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with by_onednn(model):
            assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_bfloat16_where_the_processor_multiplies_it(model, monkeypatch):
    model, ids = model.bfloat16(), torch.randint(700, (3, 7))
    expected = model(ids).logits
    for multiplies in (False, True):
        monkeypatch.setattr(onednn, "multiplies_bf16", lambda answer=multiplies: answer)
        with by_onednn(model):
            # oneDNN may be told to do without the instructions that the processor has.
            taken = multiplies and onednn.works(torch.bfloat16)
            assert any("forward" in vars(part) for part in model.modules()) == taken
            torch.testing.assert_close(model(ids).logits, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_weights_too_large_to_copy_multiply_as_they_lie(model, monkeypatch):
    ids = torch.randint(700, (3, 7))
    expected = model(ids).logits
    monkeypatch.setattr(onednn, "WORTH", 0)
    monkeypatch.setattr(onednn, "COPIED", 0)
    with by_onednn(model):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_other_types_and_devices_are_left_alone():
    for model in (GPT2LMHeadModel(GPT2).double(), GPT2LMHeadModel(GPT2).to("meta")):
        with by_onednn(model):
            assert not any("forward" in vars(part) for part in model.modules())
