import json
import pickle
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fledge.tokenizers import load_tokenizer
from fledge.tokenizers.fast import TextEncoder, UnequalIds, characters_of_bytes

TOKENIZERS = {"gpt2": "gpt2", "ours": str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json")}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return load_tokenizer(TOKENIZERS[request.param], context_length=512)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    return TextEncoder(tokenizer), TextEncoder(tokenizer, fast=False)


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "'s", "'LL", "’re", "don't", "Lily", "1", "²", "½",
     "...", "é", "e\u0301", "日本", "👩‍👩‍👧", "\ufffd", "\x00", "<|endoftext|>", "<|user|>", "ß", "İ", "aaaa", "==="]
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))
def test_tiktoken_gives_the_same_ids_for_any_text(encoders, tokenizer, text):
    fast, slow = encoders
    ids = fast.encoding.encode_ordinary(text)

    assert ids == slow([text])[0]
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_every_character_there_is_falls_into_the_same_class(encoders):
    fast, slow = encoders
    # A letter, a digit and a sign around each: whether they join with it shows what it is taken for.
    # Of the planes 4 to 13, which hold no character, and of those for private use, one in a hundred is enough.
    empty = [*range(0x40000, 0xE0000, 101), *range(0xF0000, sys.maxunicode + 1, 101)]
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000), *empty)]
    texts = ["".join(characters[begin : begin + 2000]) for begin in range(0, len(characters), 2000)]
    texts += ["".join(f"a{character}1{character}!" for character in characters[:0x3100])]

    assert [fast.encoding.encode_ordinary(text) for text in texts] == slow(texts)


def test_a_control_token_in_a_text_is_text(tokenizer):
    ids = TextEncoder(tokenizer)(["The end.<|endoftext|>"])[0]

    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "The end.<|endoftext|>"


def test_special_tokens_added_later_stay_text(tokenizer):
    longer = pickle.loads(pickle.dumps(tokenizer))
    longer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    encoder = TextEncoder(longer)

    assert encoder.way.startswith("tiktoken")
    assert encoder(["Ask the <|user|>."]) == TextEncoder(tokenizer, fast=False)(["Ask the <|user|>."])


def test_an_encoder_travels_to_a_worker(encoders):
    fast, _ = encoders

    assert pickle.loads(pickle.dumps(fast))(["One day,"]) == fast(["One day,"])


def test_no_text_is_no_ids(encoders):
    for encoder in encoders:
        assert encoder([]) == []
        assert encoder([""]) == [[]]


def small_bpe(**changes) -> Tokenizer:
    """Every byte, and the words `ab` and `abc`."""
    model = {
        "vocab": {c: i for i, c in enumerate(sorted(characters_of_bytes()))} | {"ab": 256, "abc": 257},
        "merges": [("a", "b"), ("ab", "c")],
    }
    tokenizer = Tokenizer(models.BPE(**(model | changes)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def way(tokenizer: Tokenizer) -> str:
    return TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).way


def test_a_small_byte_level_bpe_goes_by_tiktoken():
    assert way(small_bpe()) == "tiktoken, ids checked"


VOCABULARY = {c: i for i, c in enumerate(sorted(characters_of_bytes()))}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "no plain byte-level BPE"),
        ({"ignore_merges": True}, "no plain byte-level BPE"),
        ({"vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}}, "lacks some bytes"),
        ({"vocab": VOCABULARY | {"ab": 257, "abc": 256}}, "not in the order of its merges"),
        # `bc` is merged first, so that `abc` is never reached: tiktoken would find it whole.
        (
            {"vocab": VOCABULARY | {"bc": 256, "ab": 257, "abc": 258}, "merges": [("b", "c"), ("a", "b"), ("ab", "c")]},
            "do not reach every token",
        ),
    ],
)
def test_another_model_goes_the_slow_way_and_says_why(changes, reason):
    assert reason in way(small_bpe(**changes))


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("normalizer", normalizers.NFC(), "normalises text"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "does not cut words as GPT-2 does"),
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "does not cut words as GPT-2 does"),
        ("pre_tokenizer", None, "does not cut words as GPT-2 does"),
    ],
)
def test_other_parts_go_the_slow_way_and_say_why(part, value, reason):
    tokenizer = small_bpe()
    setattr(tokenizer, part, value)

    assert reason in way(tokenizer)


def test_added_tokens_that_are_not_special_go_the_slow_way():
    tokenizer = small_bpe()
    tokenizer.add_tokens(["Lily"])

    assert "added tokens that are not special" in way(tokenizer)


def test_a_character_vocabulary_goes_the_slow_way(tmp_path):
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps({c: i for i, c in enumerate("abc .")}), encoding="utf-8")
    encoder = TextEncoder(load_tokenizer(str(file), context_length=16))

    assert "does not cut words as GPT-2 does" in encoder.way
    assert encoder(["a cab."]) == [[0, 3, 2, 0, 1, 4]]


def with_wrong_ids(wrong: str) -> TextEncoder:
    """An encoder whose tiktoken gives other ids for one text."""
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=small_bpe()))
    right = encoder.encoding.encode_ordinary

    class Encoding:
        def encode_ordinary(self, text: str) -> list[int]:
            return [0] if text == wrong else right(text)

    encoder.encoding = Encoding()
    return encoder


def test_a_difference_anywhere_in_the_first_batch_is_noticed():
    with pytest.raises(UnequalIds):
        with_wrong_ids("abc")(["a", "b", "abc"])


def test_a_difference_at_the_head_of_a_later_batch_is_noticed():
    encoder = with_wrong_ids("abc")
    encoder(["a", "b"])

    with pytest.raises(UnequalIds):
        encoder(["abc", "a"])
