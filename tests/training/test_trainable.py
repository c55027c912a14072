import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from small import MODELS, VOCAB_SIZE, random_rows, small_gpt2, small_tokenizer, trainer_for
from trl import ModelConfig, SFTTrainer

from fledge.errors import UserError
from fledge.resizing import add_rows
from fledge.training.trainable import adapter_config, blocks_of, merged
from fledge.training.trainer import prepare_model


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_are_found_in_any_architecture(kind):
    model = MODELS[kind]()
    assert len(blocks_of(model)) == model.config.num_hidden_layers == 2
    assert all("attn" in " ".join(dict(block.named_children())) for block in blocks_of(model))


@pytest.mark.parametrize("kind", MODELS)
def test_beside_an_adapter_only_the_rows_of_new_tokens_are_trained(kind, tmp_path):
    model = MODELS[kind]()
    added = add_rows(model, small_tokenizer(VOCAB_SIZE + 2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [{key: [97, 98, *row[key]] for key in ("input_ids", "labels")} for row in random_rows(4)]
    plain = trainer_for(model, tmp_path, rows, max_steps=2, warmup_steps=0)
    trainer = SFTTrainer(
        model=model,
        args=plain.args,
        train_dataset=plain.train_dataset,
        processing_class=plain.processing_class,
        peft_config=adapter_config(ModelConfig(use_peft=True), model, added),
    )
    prepare_model(trainer)
    trainer.train()
    after = trainer.model.merge_and_unload().state_dict()
    ends = [name for name in before if before[name].shape[0] == VOCAB_SIZE + 2]
    assert len(ends) == 2
    for name in ends:
        assert (before[name] != after[name]).any(1).nonzero()[:, 0].tolist()[0] >= VOCAB_SIZE
    linear = [name for name in before if before[name].dim() == 2 and ("attn" in name or "mlp" in name)]
    assert linear
    assert all(not torch.equal(before[name], after[name]) for name in linear)


@pytest.mark.parametrize(
    ("named", "targets"),
    [
        (["all-linear"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (["c_attn"], {"attn.c_attn"}),
        (["mlp.c_proj", "c_attn"], {"mlp.c_proj", "attn.c_attn"}),
        ([r".*\.mlp\.c_.*"], {"mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_an_adapter_is_put_where_it_is_asked_for(named, targets):
    model, config = small_gpt2(), ModelConfig(use_peft=True)
    config.lora_target_modules = named  # a list, as it is after parsing
    adapted = get_peft_model(model, adapter_config(config, model, 0))
    layers = [path for path, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert {".".join(path.split(".")[-2:]) for path in layers} == targets


@pytest.mark.parametrize(("named", "missing"), [(["c_attn", "q_proj"], "q_proj"), (["[c_attn"], r"\[c_attn")])
def test_an_adapter_for_a_layer_that_is_not_there_is_refused(named, missing):
    config = ModelConfig(use_peft=True, lora_target_modules=named)
    with pytest.raises(UserError, match=f"{missing} names nothing in this model; its linear layers are c_attn, c_fc, "):
        adapter_config(config, small_gpt2(), 0)


@pytest.mark.parametrize("named", [["c_attn", "c_proj", "c_fc"], ["c_fc", "lm_head"]])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_layers_compute_the_same_and_are_restored_exactly(named, use_dora):
    """The head shares its weights with the embeddings, which its adapter must not change."""
    arguments = ModelConfig(use_peft=True, lora_r=4, lora_target_modules=named, use_dora=use_dora)
    model = small_gpt2()
    model = get_peft_model(model, adapter_config(arguments, model, 0)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, before = torch.arange(12)[None], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(ids).logits
    used = []
    layer = next(part for part in model.modules() if isinstance(part, LoraLayer))
    layer.lora_A["default"].register_forward_hook(lambda *_: used.append(1))
    with torch.no_grad(), merged(model.get_base_model()):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not used
    assert torch.equal(model(ids).logits, expected)
    assert used
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
