import pytest
import torch
import torch.nn.functional as F
from small import MODELS, random_rows, small_gpt2, trainer_for

from fledge.training import attention
from fledge.training.attention import CausalRows, attend_by_rows


@pytest.mark.parametrize("length", [2, 7, 33])
@pytest.mark.parametrize("cached", [1 << 19, 4 * 33**2, 1])
def test_values_and_gradients_by_definition(length, cached, monkeypatch):
    monkeypatch.setattr(attention, "CACHED", cached)
    torch.manual_seed(0)
    exact = [torch.randn(3, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(3, 2, length, 8)
    query, key, value = exact
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    expected = scores.softmax(-1) @ value
    (expected * weights).sum().backward()
    found_in = [x.detach().float().requires_grad_() for x in exact]
    found = CausalRows.apply(*found_in, 0.3)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found_in, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_about_as_near_to_float32_as_the_fused_kernel():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 65, 16) for _ in range(3)]
    exact = F.scaled_dot_product_attention(*inputs, is_causal=True)
    rounded = [x.bfloat16() for x in inputs]
    fused = F.scaled_dot_product_attention(*rounded, is_causal=True)
    by_rows = CausalRows.apply(*rounded, 16**-0.5)
    assert (by_rows - exact).norm() < 3 * (fused - exact).norm()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_uses_it_in_training_and_not_in_generation(kind, monkeypatch):
    model, calls = MODELS[kind](), []
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, use_cache=False).logits
    plain = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    attend_by_rows(model)
    apply = CausalRows.apply
    monkeypatch.setattr(attention.CausalRows, "apply", lambda *x: calls.append(1) or apply(*x))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, use_cache=False).logits
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert len(calls) == model.config.num_hidden_layers


def test_packed_rows_keep_their_mask(tmp_path, monkeypatch):
    trainer = trainer_for(small_gpt2(), tmp_path, random_rows(4), packing=True, max_length=128)
    packed = dict(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = trainer.model(**packed, use_cache=False).logits
    attend_by_rows(trainer.model)
    monkeypatch.setattr(attention.CausalRows, "apply", None)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(trainer.model(**packed, use_cache=False).logits, expected)
