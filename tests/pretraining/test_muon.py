import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fledge.pretraining.muon import MuonWithAdamW


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def optimizer_of(model) -> MuonWithAdamW:
    return MuonWithAdamW(model, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def step(model, optimizer) -> None:
    ids = torch.arange(16)[None] * 3
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_every_parameter_has_one_optimizer_and_moves():
    model = small_model()
    optimizer, before = optimizer_of(model), copy.deepcopy(model.state_dict())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    adamw, muon = optimizer.parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {
        f"transformer.h.{n}.{part}.weight"
        for n in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    decay = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {name for name, share in decay.items() if share} == {"transformer.wte.weight", "transformer.wpe.weight"}
    step(model, optimizer)
    after = model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in model.named_parameters())


def test_a_schedule_reaches_both():
    model = small_model()
    optimizer, before = optimizer_of(model), copy.deepcopy(model.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    step(model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_state_saved_and_loaded_goes_on_the_same_way():
    straight = small_model()
    optimizer = optimizer_of(straight)
    step(straight, optimizer)
    resumed = copy.deepcopy(straight)
    second = optimizer_of(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, of_model in ((straight, optimizer), (resumed, second)):
        of_model.param_groups[0]["lr"] = 0.002
        step(model, of_model)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
