import pytest
import torch
from small import MODELS, VOCAB_SIZE, random_rows, small_tokenizer, trainer_for
from trl import ModelConfig, SFTTrainer

from fledge.resizing import add_rows
from fledge.training.trainable import adapter_config, blocks_of
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
