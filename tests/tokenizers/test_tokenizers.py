import contextlib
import json
import pickle
import re
import struct
from itertools import pairwise

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, StableLmConfig

from fledge.errors import UserError
from fledge.tokenizers import load_tokenizer, open_tokenizer
from fledge.tokenizers.tiktoken_pickle import byte_level

pytestmark = pytest.mark.slow  # vocabularies are drawn at random

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


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2", 1024)


@pytest.mark.parametrize(("text", "ids"), GPT2_IDS.items())
def test_gpt2_has_the_ids_that_openai_published(gpt2, text, ids):
    assert gpt2(text)["input_ids"] == ids
    assert gpt2.decode(ids) == text


def test_gpt2_has_its_vocabulary_and_ends_with_its_last_token(gpt2):
    assert len(gpt2) == 50257
    assert gpt2.eos_token_id == gpt2.pad_token_id == gpt2.bos_token_id == 50256


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
    assert_refused(tmp_path / "nothing", r"There is no tokenizer at .*nothing; name gpt2, tokenizer\.json, .* a folder")


def test_neither_a_tokenizer_nor_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"pass --tokenizer: gpt2, tokenizer\.json, .*SentencePiece .* meta\.pkl"):
        load_tokenizer(None, CONTEXT_LENGTH)


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


def test_folder_of_no_earlier_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json; convert_checkpoint\.py and"):
        open_tokenizer(str(tmp_path))


CHARACTERS = ["\n", " ", "!", "a", "b", "é", "日", "🦊"]
IDS = {"\n": 0, " ": 1, "!": 2, "a": 3, "b": 4, "é": 5, "日": 6, "🦊": 7}
META = {"vocab_size": 8, "itos": dict(enumerate(CHARACTERS)), "stoi": IDS}
CHARACTER_FILES = {
    "chars.json": json.dumps(CHARACTERS).encode(),
    "stoi.json": json.dumps(IDS).encode(),
    "itos.json": json.dumps(dict(enumerate(CHARACTERS))).encode(),
    "meta.json": json.dumps(META).encode(),
    "meta.pkl": pickle.dumps(META),
    "old.pkl": pickle.dumps(META, protocol=0),
    "itos.pkl": pickle.dumps(dict(enumerate(CHARACTERS))),
    "both.pkl": pickle.dumps((IDS, dict(enumerate(CHARACTERS)))),
    "input.txt": "🦊 é日\nbaab!\n🦊\n".encode(),
}


def written(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", CHARACTER_FILES)
def test_every_form_of_a_character_vocabulary_gives_its_ids(name, tmp_path):
    tokenizer = load_tokenizer(written(tmp_path / name, CHARACTER_FILES[name]), CONTEXT_LENGTH)
    assert tokenizer.get_vocab() == IDS
    assert tokenizer("  ab\n\n🦊!é日")["input_ids"] == [1, 1, 3, 4, 0, 0, 7, 2, 5, 6]


def reopened(tokenizer, folder, config):
    config(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[GPT2Config, LlamaConfig, StableLmConfig])
def character_tokenizers(request, tmp_path_factory):
    stoi = {c: i for i, c in enumerate(["<|endoftext|>", "<pad>", "<unk>", *"\t\n\r .,'?n▁Ġé日🦊ß", "\u0301", "\0"])}
    tokenizer = load_tokenizer(None, CONTEXT_LENGTH, stoi)
    return stoi, tokenizer, reopened(tokenizer, tmp_path_factory.mktemp("base"), request.param)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(alphabet="\t\n\r .,'?n▁Ġé日🦊ß\u0301\0x<", max_size=30))
def test_character_vocabulary_spells_a_text_also_when_it_was_saved(character_tokenizers, text):
    stoi, *tokenizers = character_tokenizers
    ids = [stoi.get(c, stoi["<unk>"]) for c in text]
    for tokenizer in tokenizers:
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert tokenizer.decode(ids) == "".join(c if c in stoi else "<unk>" for c in text)


def test_special_tokens_of_a_character_vocabulary_are_found_whole(character_tokenizers):
    stoi, *tokenizers = character_tokenizers
    for tokenizer in tokenizers:
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2)
        assert tokenizer("n<|endoftext|>.<pad>")["input_ids"] == [stoi["n"], 0, stoi["."], 1]
        assert tokenizer.decode([stoi["n"], 0, stoi["."], 1], skip_special_tokens=True) == "n."
        assert (len(tokenizer), tokenizer.model_max_length) == (len(stoi), CONTEXT_LENGTH)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.characters(codec="utf-8"), min_size=1, max_size=30, unique=True))
def test_any_character_vocabulary_gives_back_any_text_of_its_characters(data, characters):
    tokenizer = load_tokenizer(None, CONTEXT_LENGTH, {c: i for i, c in enumerate(characters)})
    text = "".join(data.draw(st.lists(st.sampled_from(characters), max_size=40)))
    ids = [characters.index(c) for c in text]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("vocabulary", [IDS, {"a": 0, "word": 1}])
def test_what_is_in_no_vocabulary_does_not_vanish(vocabulary, tmp_path):
    tokenizer = load_tokenizer(None, CONTEXT_LENGTH, vocabulary)
    for each in (tokenizer, reopened(tokenizer, tmp_path, GPT2Config)):
        assert each("a")["input_ids"] == [vocabulary["a"]]
        with pytest.raises(Exception, match=r"(?i)unk.* token"):
            each("a Z")


BOOK_TEXT = (
    "I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it was no great surprise "
    'to me to hear that, in the height of his glory, he had dropped his painting. (He said: it\'s "over"; was_it?)'
)


class BookTokenizer:
    """SimpleTokenizerV2 of "Build a Large Language Model (From Scratch)", listing 2.4."""

    def __init__(self, vocabulary):
        self.str_to_int = vocabulary
        self.int_to_str = {i: token for token, i in vocabulary.items()}

    @staticmethod
    def split(text):
        return [part.strip() for part in re.split(r'([,.:;?_!"()\']|--|\s)', text) if part.strip()]

    def encode(self, text):
        return [self.str_to_int.get(part, self.str_to_int["<|unk|>"]) for part in self.split(text)]

    def decode(self, ids):
        return re.sub(r'\s+([,.:;?!"()\'])', r"\1", " ".join(self.int_to_str[i] for i in ids))


@pytest.fixture(scope="module")
def word_tokenizers(tmp_path_factory):
    tokens = [*sorted(set(BookTokenizer.split(BOOK_TEXT))), "<|endoftext|>", "<|unk|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder = tmp_path_factory.mktemp("words")
    tokenizer = load_tokenizer(written(folder / "vocab.json", json.dumps(vocabulary).encode()), CONTEXT_LENGTH)
    return BookTokenizer(vocabulary), tokenizer, reopened(tokenizer, folder / "base", GPT2Config)


WORDS = st.sampled_from([*BookTokenizer.split(BOOK_TEXT), "<|unk|>", "fox", "é", "-", "---", *" \n\t\x1c\x85\u3000"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=12).map("".join) | st.just(BOOK_TEXT) | st.lists(WORDS, max_size=12).map(" ".join))
def test_word_vocabulary_splits_and_joins_as_the_book_does(word_tokenizers, text):
    book, *tokenizers = word_tokenizers
    # The book's own split keeps "<|unk|>x" together; a special token is found wherever it stands.
    ids = book.encode(text.replace("<|unk|>", " <|unk|> "))
    for tokenizer in tokenizers:
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == book.decode(ids)


def test_word_vocabulary_ends_with_its_own_token(word_tokenizers):
    book, *tokenizers = word_tokenizers
    for tokenizer in tokenizers:
        assert (tokenizer.eos_token, tokenizer.unk_token) == ("<|endoftext|>", "<|unk|>")
        assert len(tokenizer) == len(book.str_to_int)
        assert tokenizer("genius<|endoftext|>Jack")["input_ids"] == [
            book.str_to_int[token] for token in ("genius", "<|endoftext|>", "Jack")
        ]


@pytest.mark.parametrize(
    ("tokens", "begin", "end", "pad"),
    [
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        (["<pad>", "<unk>", "<bos>", "<eos>"], "<bos>", "<eos>", "<pad>"),
        (["[PAD]", "[BOS]", "[EOS]"], "[BOS]", "[EOS]", "[PAD]"),
        (["<SOS>", "<EOS>"], "<SOS>", "<EOS>", "<EOS>"),
        (["<s>", "</s>"], "<s>", "</s>", "</s>"),
        (["<s>", "</s>", "<|endoftext|>"], "<s>", "<|endoftext|>", "<|endoftext|>"),
        (["<|bos|>"], "<|bos|>", "<|bos|>", "<|bos|>"),
        (["<|pad|>"], None, None, "<|pad|>"),
        ([], None, None, None),
    ],
)
def test_a_vocabulary_names_its_own_ends(tokens, begin, end, pad, tmp_path):
    vocabulary = {token: i for i, token in enumerate(["a", *tokens, "b"])}
    tokenizer = load_tokenizer(None, CONTEXT_LENGTH, vocabulary)
    for each in (tokenizer, reopened(tokenizer, tmp_path, LlamaConfig)):
        assert (each.bos_token, each.eos_token, each.pad_token) == (begin, end, pad)
        assert each.get_vocab() == vocabulary
        assert each("ab")["input_ids"] == [0, len(vocabulary) - 1]


def test_tokenizer_without_end_of_text_opens_without_special_tokens(tmp_path):
    load_tokenizer(str(as_file(trained(end=None), tmp_path)), CONTEXT_LENGTH).save_pretrained(tmp_path / "base")
    tokenizer = open_tokenizer(str(tmp_path / "base"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({}, "its vocabulary is empty"),
        ([], "its vocabulary is empty"),
        ({"stoi": {}}, "its vocabulary is empty"),
        ({"a": 0, "b": 0}, "id 0 stands for both 'a' and 'b'"),
        ({"a": 0, "b": 2}, "'b' has the id 2 among 2 tokens, whose ids are 0 to 1"),
        ({"a": 1, "b": 2}, "'b' has the id 2 among 2 tokens"),
        ({"a": 0, "b": -1}, "'b' has the id -1 among 2 tokens"),
        ({"0": "a", "2": "b"}, "'b' has the id 2 among 2 tokens"),
        (["a", "b", "a"], "'a' stands in it twice"),
        (["a", 1], "it maps 1 to 1, not a token to its id"),
        ({"a": 0.0}, "it maps 'a' to 0.0, not a token to its id"),
        ({"a": True}, "it maps 'a' to True"),
        ({"a": "b"}, "invalid literal for int"),
        ("abc", "it holds a str, not a list or mapping of tokens"),
        (3, "it holds a int"),
        (["\ud800"], "'utf-8' codec|surrogates"),
        ({"the": 0, "don't": 1}, '"don\'t" is neither a character nor a word'),
        ({"a": 0, " ": 1, "ab": 2}, "' ' is neither a character nor a word"),
        ({"the": 0, "Ġthe": 1}, "'Ġthe' is neither a character nor a word"),
    ],
)
def test_what_is_no_vocabulary_is_refused(content, cause, tmp_path):
    assert_refused(written(tmp_path / "v.json", json.dumps(content).encode()), rf"v\.json is not .*\(.*{cause}.*\); n")
    if "codec" not in cause:
        assert_refused(written(tmp_path / "v.pkl", pickle.dumps(content)), rf"v\.pkl is not .*\(.*{cause}")
    with pytest.raises(UserError, match=rf"The checkpoint's vocabulary is damaged \(.*{cause}.*\); pass --tokenizer"):
        load_tokenizer(None, CONTEXT_LENGTH, content)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_text_without_characters_is_refused(content, tmp_path):
    assert_refused(written(tmp_path / "input.txt", content), "input.txt is not a text in UTF-8")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(protocol, tmp_path):
    content = pickle.dumps({"stoi": IDS, "itos": Touch(str(tmp_path / "ran"))}, protocol)
    assert_refused(written(tmp_path / "meta.pkl", content), r"meta\.pkl is not .*it holds .*open, .*not opened")
    assert not (tmp_path / "ran").exists()


# sentencepiece_model.proto: a message is its fields, each (number, an integer or bytes); a float is four bytes.
def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields) -> bytes:
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        elif isinstance(value, float):
            parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


SPECIAL_PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
# Scores as llama2.c's models have them, and as Llama's own has them: one and the same for all runs of spaces.
MERGED = ["▁a", "ab", "▁ab", "aa", "▁b", "ba", "bab", "aaaa", "abab", "é▁", "▁▁", "▁▁▁"]
SCORED = [(piece, -1e9 if piece in ("▁▁", "▁▁▁") else float(-i)) for i, piece in enumerate(MERGED)]
SCORED += [(piece, -100.0 - i) for i, piece in enumerate("▁abé")]


def sentencepiece_file(model_type=2, normalizer=((3, 1), (4, 0)), byte_fallback=1, extra=()) -> bytes:
    pieces = [message((1, text.encode()), (2, 0.0), (3, kind)) for text, kind in SPECIAL_PIECES]
    pieces += [message((1, text.encode()), (2, score)) for text, score in SCORED]
    trainer = message((3, model_type), (35, byte_fallback), *extra)
    return message(*((1, piece) for piece in pieces), (2, trainer), (3, message(*normalizer)))


def llama2c_file(bytes_as_characters: bool) -> bytes:
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    pieces += [(chr(byte) if bytes_as_characters else f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(piece.replace("▁", " "), score) for piece, score in SCORED]
    entries = [struct.pack("<fI", score, len(text.encode())) + text.encode() for text, score in pieces]
    return struct.pack("<I", 8) + b"".join(entries)


LLAMA_FILES = {
    "tokenizer.model": sentencepiece_file(),
    "tokenizer.bin": llama2c_file(bytes_as_characters=False),
    "tok512.bin": llama2c_file(bytes_as_characters=True),
}


def llama2c_encode(text: str) -> list[int]:
    """encode() of llama2.c's run.c without <s>: the neighbours of the best score merge, the leftmost of equals."""
    ids = {piece: 259 + i for i, (piece, _) in enumerate(SCORED)}
    scores = dict(SCORED)
    symbols = list(("▁" + text if text else "").replace(" ", "▁"))
    while merges := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]:
        _, i = min(merges)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])]


@pytest.fixture(scope="module", params=LLAMA_FILES)
def llama_tokenizers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = load_tokenizer(written(folder / request.param, LLAMA_FILES[request.param]), CONTEXT_LENGTH)
    return tokenizer, reopened(tokenizer, folder / "base", LlamaConfig), open_tokenizer(str(folder / "base"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="aabbé  \n", max_size=25) | st.text(max_size=10) | st.sampled_from(["a<unk>b", "<0x41>", "▁"]))
def test_llama_tokenizers_merge_as_llama2c_does(llama_tokenizers, text):
    expected = llama2c_encode(text)
    for tokenizer in llama_tokenizers:
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.decode(expected) == text.replace("▁", " ")


def test_llama_tokenizers_begin_and_end_a_story_with_s(llama_tokenizers):
    for tokenizer in llama_tokenizers:
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>",) * 3
        assert (tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("</s>")) == (1, 2)
        assert len(tokenizer) == len(SPECIAL_PIECES) + len(SCORED)
        assert tokenizer("<s>ab<s>ab")["input_ids"] == [1, *llama2c_encode("ab")] * 2
        assert tokenizer.decode([1, *llama2c_encode("ab"), 2], skip_special_tokens=True) == "ab"


# A double array of two units, the first of which points far outside it.
BROKEN_RULES = struct.pack("<III", 8, 0xFFFFFFF0, 123) + b"a\0b\0"


def test_folder_is_opened_by_its_most_telling_file(tmp_path):
    expected = {
        "meta.pkl": [3],
        "tokenizer.bin": llama2c_encode("a"),
        "tokenizer.model": [4],
        "encoder.json": [2],
        "vocab.json": [1],
        "tokenizer.json": [0],
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META))
    (tmp_path / "tokenizer.bin").write_bytes(LLAMA_FILES["tokenizer.bin"])
    model = message((1, message((1, b"<unk>"), (3, 2))), *((1, message((1, c.encode()))) for c in "▁bca"))
    (tmp_path / "tokenizer.model").write_bytes(model + message((2, message((3, 2))), (3, message((3, 0)))))
    for name, merges, i in (("encoder.json", "vocab.bpe", 2), ("vocab.json", "merges.txt", 1)):
        (tmp_path / name).write_text(json.dumps({"a": i, "b": 0}))
        (tmp_path / merges).write_text("#version: 0.2\n")
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    for name in reversed(expected):
        assert load_tokenizer(str(tmp_path), CONTEXT_LENGTH)("a")["input_ids"] == expected[name]
        assert load_tokenizer(str(tmp_path / name), CONTEXT_LENGTH)("a")["input_ids"] == expected[name]
        (tmp_path / name).unlink()
    assert_refused(tmp_path, "tokenizer.bin or meta.pkl; name a folder or file that does")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "its pieces, trainer or normalizer are missing"),
        (LLAMA_FILES["tokenizer.model"][:-40], "cut short"),
        (LLAMA_FILES["tokenizer.model"][:-20], "missing|cut short"),
        (sentencepiece_file(model_type=3), "it is neither BPE nor unigram"),
        (sentencepiece_file(extra=[(24, 1)]), "treat_whitespace_as_suffix"),
        (sentencepiece_file(normalizer=[(5, 0)]), "escape_whitespaces"),
        (sentencepiece_file(normalizer=[(2, b"\x00\x01")]), "Precompiled"),
        (sentencepiece_file(normalizer=[(2, BROKEN_RULES)]), "its normalization rules are damaged"),
        (sentencepiece_file() + message((1, message((1, b"\xff")))), "codec"),
        (sentencepiece_file() + message((1, message((1, b"ab")))), "'ab' stands in it twice"),
        (sentencepiece_file() + message((1, message((1, b"other"), (3, 2)))), "2 unknown pieces"),
    ],
)
def test_damaged_sentencepiece_model_is_refused(content, cause, tmp_path):
    file = written(tmp_path / "t.model", content)
    assert_refused(file, rf"t\.model is not a SentencePiece model \(.*({cause}).*\); name")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "buffer"),
        (struct.pack("<I", 8), "does not begin with <unk>, <s>, </s> and the 256 bytes"),
        (LLAMA_FILES["tokenizer.bin"][:-1], "piece 274 is 2 bytes long, with 8 at most and 1 left"),
        (LLAMA_FILES["tokenizer.bin"][:-8], "buffer|bytes long"),
        (LLAMA_FILES["tokenizer.bin"][:2000], "buffer|bytes long|does not begin"),
        (struct.pack("<I", 4) + LLAMA_FILES["tokenizer.bin"][4:], "piece 0 is 5 bytes long, with 4 at most"),
        (LLAMA_FILES["tokenizer.bin"].replace(b"<0x41>", b"<0x4I>"), "does not begin with"),
        (LLAMA_FILES["tokenizer.bin"].replace(b"bab", b"b\xffb"), "codec"),
    ],
)
def test_damaged_llama2c_tokenizer_is_refused(content, cause, tmp_path):
    file = written(tmp_path / "tokenizer.bin", content)
    assert_refused(file, rf"tokenizer\.bin is not a tokenizer of llama2\.c \(.*({cause}).*\); name")


WHOLE = {
    ".model": sentencepiece_file(),
    ".bin": llama2c_file(bytes_as_characters=True),
    ".pkl": pickle.dumps(META),
    ".json": json.dumps(META).encode(),
    ".tokenizers.json": trained().to_str().encode(),
}


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    begin = draw(st.integers(0, len(whole)))
    end = begin + draw(st.integers(0, 8))
    return whole[:begin] + draw(st.binary(max_size=6)) + whole[end:]


@pytest.mark.parametrize("suffix", WHOLE)
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_raises_nothing_but_a_user_error(suffix, data, tmp_path):
    content = data.draw(st.binary(max_size=60) | damaged(WHOLE[suffix]))
    with contextlib.suppress(UserError):
        load_tokenizer(written(tmp_path / f"t{suffix}", content), CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def trained_sentencepiece(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train(model_type, rule, byte_fallback, symbols, prefix):
        prefix_of_files = folder / f"{model_type}-{rule}-{byte_fallback}-{bool(symbols)}-{prefix}"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in STORIES for line in text.split("\n") if line] * 5),
            model_prefix=str(prefix_of_files),
            model_type=model_type,
            vocab_size=350 if byte_fallback else 90,
            hard_vocab_limit=False,
            normalization_rule_name=rule,
            byte_fallback=byte_fallback,
            user_defined_symbols=symbols,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=rule != "identity",
            minloglevel=2,
        )
        file = f"{prefix_of_files}.model"
        return sentencepiece.SentencePieceProcessor(model_file=file), load_tokenizer(file, CONTEXT_LENGTH)

    return train


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("rule", "byte_fallback", "symbols", "prefix"),
    [
        ("identity", True, [], True),
        ("nmt_nfkc", False, ["<sep>", "<user>"], True),
        ("nmt_nfkc", True, ["<sep>"], False),
        ("identity", False, [], False),
    ],
)
def test_sentencepiece_models_give_the_ids_of_the_sentencepiece_library(
    trained_sentencepiece, model_type, rule, byte_fallback, symbols, prefix, tmp_path
):
    original, loaded = trained_sentencepiece(model_type, rule, byte_fallback, symbols, prefix)
    assert len(loaded) == len(original)
    saved = reopened(loaded, tmp_path, LlamaConfig)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text(alphabet="aeot qu.”ﬁ①ａ日🦊\t\n\u00a0", max_size=30) | st.lists(st.sampled_from(PARTS)).map("".join))
    def same(text):
        ids = original.encode(text)
        assert loaded(text)["input_ids"] == saved(text)["input_ids"] == ids
        if byte_fallback:
            assert loaded.decode(ids) == saved.decode(ids) == original.decode(ids)

    same()


PARTS = ["<sep>", "<user>", " ", "  ", "a", "fox", "The quick", "<unk>", "Once upon ", *STORIES[:2]]


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_a_pickled_encoding_of_tiktoken_gives_tiktokens_ids(text):
    """With nanochat's pattern, and tokens that merges made from a text."""
    pattern = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
    pattern += r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"th", b"he", b"the", b" the", b"an", b"and", b" fox", b"  ", b"12", b"\xc3\xa9"):
        ranks[token] = len(ranks)
    encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(ranks)})
    tokenizer = byte_level(ranks, pattern, {"<|bos|>": len(ranks)})
    for sample in (text, f"The fox and {text}the 123 é's"):
        ids = tokenizer.encode(sample).ids
        assert ids == encoding.encode(sample, allowed_special="all")
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_pickle_that_names_another_class_is_refused(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Tokenizer(models.BPE())))
    with pytest.raises(UserError, match="not only text and numbers"):
        load_tokenizer(str(tmp_path / "tokenizer.pkl"), 16)
