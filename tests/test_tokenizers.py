import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config

from fledge.cli import UserError
from fledge.tokenizers import load_tokenizer, open_tokenizer

STORIES = ["Once upon a time there was a fox.", "The fox was quick, and it's said: “Ça va?” 12 345\n\n日本 🦊"] * 3
CONTEXT_LENGTH = 64


def trained(end="<|endoftext|>") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [end] if end else []
    tokenizer.train_from_iterator(
        STORIES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def as_file(tokenizer, folder):
    tokenizer.save(str(folder / "own.json"))
    return folder / "own.json"


def as_folder(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def as_vocab_and_merges(tokenizer, folder):
    tokenizer.model.save(str(folder))
    return folder


def assert_refused(source, match):
    with pytest.raises(UserError, match=match) as refused:
        load_tokenizer(str(source), CONTEXT_LENGTH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("save", [as_file, as_folder, as_vocab_and_merges])
def test_every_form_gives_the_ids_of_the_original(save, tmp_path):
    original = trained()
    loaded = load_tokenizer(str(save(original, tmp_path)), CONTEXT_LENGTH)
    assert len(loaded) == original.get_vocab_size()
    for text in (*STORIES, "", " ", "never seen: żółw", "\t\r\n"):
        assert loaded(text)["input_ids"] == original.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end|>"])
def test_own_end_of_text_token_ends_and_pads(end, tmp_path):
    original = trained(end)
    loaded = load_tokenizer(str(as_file(original, tmp_path)), CONTEXT_LENGTH)
    assert loaded.eos_token == loaded.pad_token == loaded.bos_token == end
    assert loaded.eos_token_id == original.token_to_id(end) == 0
    assert loaded.model_max_length == CONTEXT_LENGTH
    assert loaded(f"a{end}b")["input_ids"] == [*original.encode("a").ids, 0, *original.encode("b").ids]
    assert loaded.decode(loaded(f"a{end}b")["input_ids"], skip_special_tokens=True) == "ab"


def test_padding_and_truncation_of_the_file_do_not_stay(tmp_path):
    original = trained()
    expected = original.encode(STORIES[0]).ids
    original.enable_truncation(3)
    original.enable_padding(length=200)
    loaded = load_tokenizer(str(as_file(original, tmp_path)), CONTEXT_LENGTH)
    loaded.save_pretrained(tmp_path / "base")
    assert Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json")).encode(STORIES[0]).ids == expected
    assert loaded(STORIES[0])["input_ids"] == expected


GPT2_IDS = {
    "Hello world": [15496, 995],
    "Hello, world!": [15496, 11, 995, 0],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
    "Once upon a time": [7454, 2402, 257, 640],
    " Hello": [18435],
    "\n": [198],
    "\n\n": [628],
    "é": [2634],
    "<|endoftext|>": [50256],
    "": [],
}


@pytest.mark.parametrize(("text", "ids"), GPT2_IDS.items())
def test_gpt2_has_the_ids_that_openai_published(text, ids):
    tokenizer = load_tokenizer("gpt2", 1024)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_gpt2_has_its_vocabulary_and_ends_with_its_last_token():
    tokenizer = load_tokenizer("gpt2", 1024)
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 50256


@pytest.fixture(scope="module", params=["gpt2", "own"])
def tokenizer_and_reopened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    source = "gpt2" if request.param == "gpt2" else str(as_file(trained(), tmp_path_factory.mktemp("trained")))
    tokenizer = load_tokenizer(source, CONTEXT_LENGTH)
    GPT2Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder), open_tokenizer(str(folder))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.sampled_from([*STORIES, "<|endoftext|>", "a <|endoftext|>\n\n b", "  don't   we'll "]))
def test_saved_tokenizer_reopens_with_the_same_ids_and_loses_no_text(tokenizer_and_reopened, text):
    tokenizer, *reopened = tokenizer_and_reopened
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for other in reopened:
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == text


def test_saved_tokenizer_keeps_its_special_tokens_and_length(tokenizer_and_reopened):
    tokenizer, *reopened = tokenizer_and_reopened
    for other in reopened:
        assert len(other) == len(tokenizer)
        assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id,) * 3
        assert other.model_max_length == CONTEXT_LENGTH


def test_post_processor_of_the_file_stays(tmp_path):
    original = trained()
    original.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    loaded = load_tokenizer(str(as_file(original, tmp_path)), CONTEXT_LENGTH)
    loaded.save_pretrained(tmp_path / "base")
    expected = original.encode("fox").ids
    assert expected[0] == 0
    assert loaded("fox")["input_ids"] == expected
    assert open_tokenizer(str(tmp_path / "base"))("fox")["input_ids"] == expected


def test_missing_tokenizer_is_refused(tmp_path):
    assert_refused(tmp_path / "nothing", "There is no tokenizer at .*nothing; name a folder, a tokenizer.json, or gpt2")


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    assert_refused(tmp_path, "neither tokenizer.json nor vocab.json and merges.txt")


@pytest.mark.parametrize("content", ["", "{", "{}", "null", "Once upon a time", '{"model": {"type": "BPE"}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "own.json"])
def test_file_of_another_kind_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert_refused(tmp_path / name, f"{name} is not a tokenizers file")


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("{", "#version: 0.2\n"),
        ("{}", "a b\n"),
        (json.dumps({"a": 0, "<|endoftext|>": 1}), "a b\n"),
        (json.dumps({"a": 0, "<|endoftext|>": 1}), "a b c d\n"),
        (json.dumps(["a"]), ""),
    ],
)
def test_damaged_vocab_or_merges_is_refused(vocab, merges, tmp_path):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    assert_refused(tmp_path, "tokenizer|vocab.json|merges.txt")


def test_vocabulary_without_an_end_of_text_token_is_refused(tmp_path):
    assert_refused(as_file(trained(end=None), tmp_path), "has no end-of-text token .*<|endoftext|>")


def test_folder_of_no_earlier_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json; convert_checkpoint\.py writes one"):
        open_tokenizer(str(tmp_path))
