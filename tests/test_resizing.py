import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fledge.resizing import add_rows


def tokenizer_of(count: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"t{i}": i for i in range(count)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))


def gpt2(tied: bool) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=tied)
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied, tmp_path):
    model, ids = gpt2(tied), torch.tensor([[1, 5, 10]])
    before = model(ids).logits
    embedding, head = model.transformer.wte.weight.clone(), model.lm_head.weight.clone()
    assert add_rows(model, tokenizer_of(14)) == 3
    assert model.config.vocab_size == 14
    torch.testing.assert_close(model.transformer.wte.weight[11:], embedding.mean(0).expand(3, 8))
    torch.testing.assert_close(model.lm_head.weight[11:], head.mean(0).expand(3, 8))
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    after = model(ids).logits
    assert torch.equal(after[..., :11], before)
    # A new token is as likely as the average one, in the geometric sense.
    torch.testing.assert_close(after[..., 11:], before.mean(-1, keepdim=True).expand(1, 3, 3))

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path).eval()(ids).logits, after)


def test_a_bias_of_the_head_grows_too():
    model = gpt2(False)
    model.lm_head = torch.nn.Linear(8, 11)
    bias = model.lm_head.bias.clone()
    assert add_rows(model, tokenizer_of(12)) == 1
    assert torch.equal(model.lm_head.bias[:11], bias)
    torch.testing.assert_close(model.lm_head.bias[11], bias.mean())


@pytest.mark.parametrize("count", [11, 9])
def test_a_model_with_rows_enough_is_untouched(count):
    model = gpt2(True)
    before = model.transformer.wte.weight
    assert add_rows(model, tokenizer_of(count)) == 0
    assert model.transformer.wte.weight is before
