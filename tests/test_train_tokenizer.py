import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fledge.cli import run
from fledge.errors import UserError
from fledge.reading.documents import END, pieces
from fledge.scripts import train_tokenizer
from fledge.tokenizers.training import HeldOut, measure_tokenizer, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(corpus):
    return AutoTokenizer.from_pretrained(corpus.tokenizer), Tokenizer.from_file(
        str(corpus.tokenizer / "tokenizer.json")
    )


def test_auto_tokenizer_opens_it(opened):
    tokenizer, _ = opened
    assert tokenizer.convert_tokens_to_ids([END, "<|user|>", "<|assistant|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (END, END, END)
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert tokenizer("a<|user|>b")["input_ids"][1] == 1
    assert tokenizer.encode("Lily had a") == tokenizer.encode("Lily had a", add_special_tokens=False)


@given(st.text())
def test_any_text_comes_back_as_it_was(opened, text):
    tokenizer, own = opened
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    if END not in text and "<|" not in text:
        assert own.encode(text).ids == ids


ENCODE = """
const { AutoTokenizer, env } = require("@huggingface/transformers");
(async () => {
  env.allowRemoteModels = false;
  env.localModelPath = process.argv[1];
  const tokenizer = await AutoTokenizer.from_pretrained(process.argv[2]);
  const texts = JSON.parse(process.argv[3]);
  console.log(JSON.stringify(texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }))));
})();
"""
TEXTS = ["Lily had a ball.", "", "  two  spaces\n\n\ttab", "it's we'll I'D", "naïve Ünicode ÅÄÖ", f"a{END}b<|user|>c"]
TEXTS += [
    "日本語 한국어 العربية हिन्दी",
    "🙂👩\u200d👩\u200d👧 e\u0301",
    "\0\x7f 1234567890 ½²",
    "\u00a0\u2003\u200b\ufeff \U0001d518",
]


def test_transformers_js_gives_the_same_ids(corpus, opened, run_node):
    given = run_node(ENCODE, str(corpus.tokenizer.parent), corpus.tokenizer.name, json.dumps(TEXTS))
    assert given == [opened[0].encode(text, add_special_tokens=False) for text in TEXTS]


def test_the_report_measures_unseen_text(corpus, opened):
    found = json.loads((corpus.tokenizer / "tokenizer_report.json").read_text())
    held_out = [text for number, (text, _) in enumerate(pieces([str(corpus.file)]), 1) if number % 20 == 0]
    size = len("".join(held_out).encode())
    tokens = sum(len(opened[1].encode(text).ids) for text in held_out)
    assert (found["documents"], found["report_on"], found["report_bytes"]) == (120, "held out", size)
    assert found["bytes_per_token"] == pytest.approx(size / tokens)
    assert found["gpt2_bytes_per_token"] > found["bytes_per_token"] / 3
    assert len(found["longest_tokens"][0]) >= len(found["longest_tokens"][1]) > 5


def test_held_out_pieces_are_not_passed_on():
    held_out = HeldOut([(f"text {n}", True) for n in range(1, 61)])
    passed = list(held_out)
    assert held_out.text == ["text 20", "text 40", "text 60"]
    assert sorted([*passed, *held_out.text]) == sorted(f"text {n}" for n in range(1, 61))
    few = HeldOut([("one", False), ("two", True)])
    assert (list(few), few.text, few.is_unseen, few.documents) == (["one", "two"], ["one"], False, 1)


def test_the_same_text_gives_the_same_tokenizer(corpus):
    made = {train(HeldOut(pieces([str(corpus.file)])), 420, [END], 2).to_str() for _ in range(2)}
    assert len(made) == 1


def test_more_tokens_than_the_text_supports_are_refused():
    with pytest.raises(UserError, match=r"supports 260 tokens .* asks for 5,000; ask for fewer or give more text"):
        train(["ab ab abc"] * 3, 5000, [END], 2)


def test_report_without_gpt2(monkeypatch):
    def missing():
        raise UserError("neither wheel nor network")

    monkeypatch.setattr("fledge.tokenizers.training.gpt2", missing)
    held_out = HeldOut([("aa aa aa", True)])
    tokenizer = train(held_out, 258, [END], 2)
    found = measure_tokenizer(tokenizer, held_out)
    assert found["gpt2_bytes_per_token"] is None
    assert found["report_on"] == "of the training text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", 257], "leaves no merge"),
        (["--vocab_size", 99999], "supports"),
        (["--special_tokens", ""], "names '', which is empty or there twice"),
        (["--special_tokens", "<a>", END], f"names {END!r}, which is empty or there twice"),
        (["--data", "nowhere.txt"], "There is no data file"),
    ],
)
def test_a_mistake_writes_nothing(corpus, tmp_path, monkeypatch, capsys, arguments, message):
    command = ["train_tokenizer.py", "--data", corpus.file, "--output_dir", tmp_path / "t", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as stopped:
        run(train_tokenizer.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())
