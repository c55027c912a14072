import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fledge.cli import run
from fledge.errors import UserError
from fledge.reading.documents import pieces
from fledge.resizing import compare_trimmed, keep_rows, trim_tokenizer
from fledge.scripts import trim_vocabulary
from fledge.tokenizers.fast import characters_of_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return AutoTokenizer.from_pretrained(corpus.tokenizer)


def gpt2_of(size: int, tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)  # far from uniform
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = 0
    model.generation_config.eos_token_id = [0, 2]
    return model


def test_a_chain_of_merges_is_kept_and_nothing_else():
    byte = sorted(characters_of_bytes())
    vocabulary = {token: i for i, token in enumerate([*byte, "ab", "cd", "abcd", "abc", "xy", "<end>"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("ab", "c"), ("x", "y")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<end>"])
    end = vocabulary["<end>"]
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template="{{ messages }}")

    trimmed, old_ids = trim_tokenizer(whole, [vocabulary["abcd"]])
    names = {token: i for i, token in enumerate([*byte, "ab", "cd", "abcd", "<end>"])}
    assert trimmed.get_vocab() == names
    assert old_ids == [vocabulary[token] for token in names]
    assert trimmed("abcdxy")["input_ids"] == [names["abcd"], names["x"], names["y"], names["<end>"]]
    assert (trimmed.eos_token_id, trimmed.chat_template) == (names["<end>"], "{{ messages }}")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """What transformers makes of SentencePiece's BPE, as in Llama: other characters are written with their bytes."""
    parts = ["▁", *"Lilysawbedn.", "Li", "ly", "Lily", "▁Lily", "▁s", "aw", "▁saw"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts]
    merges = [("L", "i"), ("l", "y"), ("Li", "ly"), ("▁", "Lily"), ("▁", "s"), ("a", "w"), ("▁s", "aw")]
    vocabulary = {token: i for i, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@given(st.text())
@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_any_text_comes_back_and_used_text_keeps_its_tokens(tokenizer, kind, text):
    tokenizer = tokenizer if kind == "byte-level" else with_byte_fallback()
    used = tokenizer(text, split_special_tokens=True)["input_ids"]
    trimmed, old_ids = trim_tokenizer(tokenizer, used)
    ids = trimmed(text, split_special_tokens=True)["input_ids"]
    assert [old_ids[i] for i in ids] == used
    assert trimmed.decode(ids) == tokenizer.decode(used) == text
    other = "Lily saw \N{SNOWMAN}.\n"
    assert trimmed.decode(trimmed.encode(other)) == other


@pytest.mark.parametrize("kind", ["tied", "untied", "llama"])
def test_logits_of_kept_tokens_are_the_same(kind):
    if kind == "llama":
        torch.manual_seed(2)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=90, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        ).eval()
    else:
        model = gpt2_of(90, tied=kind == "tied")
    kept = [0, 2, 3, 40, 41, 89]
    ids = torch.tensor([[5, 3, 0, 1, 4, 2]])
    with torch.no_grad():
        expected = model.double()(torch.tensor(kept)[ids]).logits[..., kept]
        keep_rows(model, kept)
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    assert model.config.vocab_size == found.shape[-1] == 6
    if kind != "llama":
        assert (model.lm_head.weight is model.transformer.wte.weight) == (kind == "tied")
        assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (0, [0, 1])


def test_probabilities_are_those_before_over_what_stays(tokenizer):
    before = gpt2_of(400)
    texts = ["Lily had a ball.", "Tim saw a kite.", "zq"]
    used = [i for text in texts[:2] for i in tokenizer.encode(text)]
    trimmed, old_ids = trim_tokenizer(tokenizer, used)
    after = gpt2_of(400)
    keep_rows(after, old_ids)
    found = compare_trimmed((before, tokenizer), (after, trimmed), old_ids, texts[:2])
    assert found["same_tokens"] == 1
    assert 0.01 < found["removed"] < found["largest_removed"] < 1
    assert found["largest_error"] < 1e-5
    assert found["bits_per_byte_after"] < found["bits_per_byte_before"]
    with torch.no_grad():  # a wrong row is seen
        after.transformer.wte.weight[5, 0] += 0.1
    assert compare_trimmed((before, tokenizer), (after, trimmed), old_ids, texts[:2])["largest_error"] > 1e-3


def test_the_script_writes_a_model_that_opens(corpus, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    gpt2_of(400).save_pretrained(base)
    AutoTokenizer.from_pretrained(corpus.tokenizer).save_pretrained(base)
    (base / "conversion.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("Lily had a ball. She was happy.", encoding="utf-8")
    command = ["--model", base, "--data", text, "--output_dir", tmp_path / "small"]
    monkeypatch.setattr(sys, "argv", ["trim_vocabulary.py", *map(str, command)])
    run(trim_vocabulary.main)
    model, tokenizer = (kind.from_pretrained(tmp_path / "small") for kind in (AutoModelForCausalLM, AutoTokenizer))
    record = json.loads((tmp_path / "small" / "trimming.json").read_text())
    assert 256 < len(tokenizer) == model.config.vocab_size == record["tokens_after"] < 320
    assert record["largest_error"] < 1e-5
    assert record["parameters_after"] == model.num_parameters() < record["parameters_before"]
    assert (tmp_path / "small" / "conversion.json").exists()
    (only,) = (text for text, _ in pieces([str(text)]))
    assert tokenizer.decode(tokenizer.encode(only)) == only
    assert "bits per byte" in capsys.readouterr().out

    # Nothing occurs so often: the bytes stay, and so much of the text is measured as fits the context in bytes.
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "bytes"), "--min_count", "1000"])
    run(trim_vocabulary.main)
    record = json.loads((tmp_path / "bytes" / "trimming.json").read_text())
    assert (record["texts"], record["bytes_per_token_after"]) == (1, 1)


def test_other_kinds_are_refused(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="no BPE with a token for each of the 256 bytes"):
        trim_tokenizer(words, [0])
