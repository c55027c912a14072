import gzip
import json
import re

import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.sources import load_source

records = load_source("tinystories_instruct").records
FIELDS = ("Features", "Words", "Summary", "Random sentence", "Story")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "Features: Dialogue, BadEnding\nWords: quit, oak\nSummary: A lost kite.\nRandom sentence: They were cold.\n"
            "Story: \n\nSara ran.\nShe fell.\n<|endoftext|>\n",
            [
                {
                    "Features": "Dialogue, BadEnding",
                    "Words": "quit, oak",
                    "Summary": "A lost kite.",
                    "Random sentence": "They were cold.",
                    "Story": "Sara ran.\nShe fell.",
                }
            ],
            id="every field, story last",
        ),
        pytest.param(
            "Story:\n\nTom hid.\n\nHe slept.\nFeatures: Twist\nSummary: Tom hides.\n<|endoftext|>\n",
            [{"Story": "Tom hid.\n\nHe slept.", "Features": "Twist", "Summary": "Tom hides."}],
            id="fields after the story",
        ),
        pytest.param(
            "Words: a, b\nStory:\nTom hid.\nSummary: Tom hides.\n<|endoftext|>\n",
            [{"Words": "a, b", "Story": "Tom hid.", "Summary": "Tom hides."}],
            id="fields around the story",
        ),
        pytest.param(
            "Summary: Tom hides.\nStory: Tom hid.\nHe slept.\n<|endoftext|>\n",
            [{"Summary": "Tom hides.", "Story": "Tom hid.\nHe slept."}],
            id="story on the line of its name",
        ),
        pytest.param(
            "Summary: Tom hides.\r\nStory: \r\n\r\nTom hid.\r\nHe slept.\r\n<|endoftext|>\r\nStory: B.\r\n",
            [{"Summary": "Tom hides.", "Story": "Tom hid.\nHe slept."}, {"Story": "B."}],
            id="CRLF",
        ),
        pytest.param(
            "Story: A.\n<|endoftext|>\nStory: B.",
            [{"Story": "A."}, {"Story": "B."}],
            id="last terminator missing",
        ),
        pytest.param(
            "Summary: first\nStory: A.\nSummary: second\n<|endoftext|>\n",
            [{"Summary": "first", "Story": "A."}],
            id="a repeated field keeps its first value",
        ),
        pytest.param(
            "Summary: Tom hides\nin the barn.\nStory: A.\n<|endoftext|>\n",
            [{"Summary": "Tom hides\nin the barn.", "Story": "A."}],
            id="summary over two lines",
        ),
        pytest.param(
            "Story: Mom said: Words: are not enough.\nHer Summary: short.\n<|endoftext|>\n",
            [{"Story": "Mom said: Words: are not enough.\nHer Summary: short."}],
            id="a field's name within a line is text",
        ),
        pytest.param(
            "Summary:\nStory:\n<|endoftext|>\n",
            [{"Summary": "", "Story": ""}],
            id="empty values",
        ),
        pytest.param(
            "Just text.\n<|endoftext|>\n\n<|endoftext|>\nStory: A.\n<|endoftext|>\n",
            [{}, {"Story": "A."}],
            id="a record without a field is one, blank space is none",
        ),
        pytest.param("\ufeffSummary: x\nStory: A.\n", [{"Summary": "x", "Story": "A."}], id="byte order mark"),
    ],
)
def test_records_are_read_as_written(tmp_path, text, expected):
    file = tmp_path / "corpus.txt"
    file.write_bytes(text.encode())

    assert list(records(str(file))) == expected


def test_gzip_holds_the_same_records(tmp_path):
    text = "Summary: Zoë’s kite.\nStory: A.\n<|endoftext|>\nStory: B.\n"
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    (tmp_path / "corpus.txt.gz").write_bytes(gzip.compress(text.encode()))

    unpacked = list(records(str(tmp_path / "corpus.txt")))
    assert unpacked == [{"Summary": "Zoë’s kite.", "Story": "A."}, {"Story": "B."}]
    assert list(records(str(tmp_path / "corpus.txt.gz"))) == unpacked


STORY_LINES = [
    "Words: that was all he had.",
    "Words: a, b and c, said Mom.",
    "Features: it had a big nose!",
    "Story: time was her best time.",
    'Summary: "We won," said Tom.\nThen they slept.',
    "Random sentence: said the card.\nTom laughed.",
    "Story time was over.",
    "Words failed her.",
]


@pytest.mark.parametrize("line", STORY_LINES)
@pytest.mark.parametrize("before", ["Summary: Tom hides.\n", "Words: a, b\nSummary: Tom hides.\nFeatures: Twist\n"])
@pytest.mark.parametrize("after", ["", "Words: c, d\n", "Features: Dialogue\n\nSummary: Tom hides again.\n"])
def test_a_line_of_the_story_that_begins_as_a_field_stays_in_the_story(tmp_path, line, before, after):
    (tmp_path / "corpus.txt").write_text(f"{before}Story: \n\nTom hid.\n{line}\n{after}<|endoftext|>\n")

    (record,) = records(str(tmp_path / "corpus.txt"))
    assert record["Story"] == f"Tom hid.\n{line}"
    assert record["Summary"] == "Tom hides."


def is_plain(line: str) -> bool:
    return (
        "<|endoftext|>" not in line
        and not line.startswith(tuple(f"{name}:" for name in FIELDS))
        and not re.search(r"[ \t]Story:", line)
    )


lines = st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"]), max_size=30).filter(is_plain)
texts = st.lists(lines, min_size=1, max_size=4).map("\n".join).map(str.strip).filter(is_plain)
words = st.lists(st.text("abcdefghijklmnopqrstuvwxyzé-", min_size=1, max_size=8), min_size=1, max_size=4).map(", ".join)
names = st.lists(st.sampled_from(["Dialogue", "BadEnding", "Twist", "MoralValue"]), min_size=1).map(", ".join)
VALUES = {"Features": names, "Words": words, "Summary": texts, "Random sentence": lines.map(str.strip), "Story": texts}
truths = st.permutations(FIELDS).flatmap(
    lambda names: st.integers(1, len(names)).flatmap(
        lambda count: st.fixed_dictionaries({name: VALUES[name] for name in names[:count]})
    )
)


@st.composite
def corpora(draw):
    """The text of a corpus and the records it was written from: any order and placement, repeats, line endings."""
    truth, text = draw(st.lists(truths, min_size=1, max_size=4)), ""
    for number, record in enumerate(truth):
        for name, value in record.items():
            gap = draw(st.sampled_from(["", " ", "  ", "\t", "\n", " \n", " \n\n"]))
            text += f"{name}:{gap}{value}" + draw(st.sampled_from(["\n", "\n\n"]))
        for name in draw(st.lists(st.sampled_from(["Summary", "Random sentence", "Story"]), max_size=2)):
            if record.get(name):  # a second value of a field that has one does not count
                text += f"{name}:\n" + draw(st.sampled_from(["Once more.", "Never mind."])) + "\n"
        is_last = number == len(truth) - 1
        text += draw(st.sampled_from(["", "<|endoftext|>", "<|endoftext|>\n"] if is_last else ["<|endoftext|>\n"]))
        text += draw(st.sampled_from(["", "\n"]))
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))), truth


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "corpus.txt"


@pytest.mark.slow
@settings(deadline=None, max_examples=75)
@given(corpora())
def test_a_corpus_is_read_back_exactly(corpus_file, corpus):
    text, truth = corpus
    corpus_file.write_bytes(text.encode())

    read = list(records(str(corpus_file)))
    assert read == truth
    assert [list(record) for record in read] == [list(record) for record in truth]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Features: Twist\nFeatures: BadEnding\nStory: A.\n", {"Features": "Twist, BadEnding", "Story": "A."}),
        ("Words: a, b\nStory: A.\nWords: c\n", {"Words": "a, b, c", "Story": "A."}),
        ("Summary:\nStory: A.\nSummary: Tom.\n", {"Summary": "Tom.", "Story": "A."}),
        ("Words: a, b Story: Tom hid.\nHe slept.\nSummary: Tom.\n",
         {"Words": "a, b", "Story": "Tom hid.\nHe slept.", "Summary": "Tom."}),
    ],
    ids=["features are one list", "words too", "an empty value does not count", "the story on another field's line"],
)  # fmt: skip
def test_repeated_and_shared_lines(tmp_path, text, expected):
    (tmp_path / "corpus.txt").write_text(text)

    assert list(records(str(tmp_path / "corpus.txt"))) == [expected]


@settings(deadline=None, max_examples=30)
@given(corpora(), st.integers(20, 200))
def test_the_size_of_a_chunk_changes_nothing(corpus_file, corpus, size):
    text, truth = corpus
    corpus_file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fledge.reading.files.CHUNK_BYTES", size)
        assert list(records(str(corpus_file))) == truth


def test_the_record_of_the_document_is_read_as_it_says(tmp_path):
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(document.split("```text\n")[1].split("```")[0])

    assert list(records(str(tmp_path / "corpus.txt"))) == [
        {
            "Features": "Dialogue, BadEnding",
            "Words": "quit, oak, gloomy",
            "Random sentence": "They were cold.",
            "Story": 'Sara and Ben were playing in the park. Ben said, "Let\'s go."\n'
            "Words: that was all he ever had, Sara thought.\nThey went home.",
            "Summary": "Sara and Ben play in the park\nuntil it is cold.",
        }
    ]


def test_a_table_holds_a_line_a_row_as_on_the_hub(tmp_path):
    text = "Summary: Tom hides.\nStory: \n\nTom hid.\n\nHe slept.\n<|endoftext|>\nWords: a, b\nStory: B.\n<|endoftext|>"
    (tmp_path / "corpus.txt").write_text(text)
    rows = pyarrow.table({"text": text.split("\n")})
    pyarrow.parquet.write_table(rows, tmp_path / "corpus.parquet", row_group_size=3)

    assert list(records(str(tmp_path / "corpus.parquet"))) == list(records(str(tmp_path / "corpus.txt")))


def test_a_table_may_hold_a_record_a_row(tmp_path):
    texts = ["Summary: A.\nStory: Tom hid.", "Story: B.\n<|endoftext|>\n", "Words: a\nStory: C."]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    assert [record["Story"] for record in records(str(tmp_path / "corpus.jsonl"))] == ["Tom hid.", "B.", "C."]


PACKED = gzip.compress(b"Summary: A kite.\nStory: It flew.\n<|endoftext|>\n" * 50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("none.txt", None, "There is no data file at .*none.txt", id="missing"),
        pytest.param("void.txt", b"", "void.txt is empty", id="empty"),
        pytest.param("blank.txt", b" \r\n\n", "blank.txt is empty", id="blank"),
        pytest.param("void.txt.gz", gzip.compress(b""), "void.txt.gz is empty", id="empty gzip"),
        pytest.param("latin.txt", b"Story: caf\xe9.\n", "latin.txt is not UTF-8 text: byte 10 ", id="not UTF-8"),
        pytest.param("latin.gz", gzip.compress(b"Story: \xff"), "gz is not UTF-8 text: byte 7 ", id="gz no UTF-8"),
        pytest.param("text.gz", b"Story: A.\n", "text.gz cannot be read: Not a gzipped file", id="no gzip"),
        pytest.param("cut.gz", PACKED[:-10], "cut.gz cannot be read", id="gzip cut off"),
        pytest.param("sum.gz", PACKED[:-8] + bytes(8), "sum.gz cannot be read", id="gzip checksum wrong"),
        pytest.param("hit.gz", PACKED[:10] + b"\xff" + PACKED[11:], "hit.gz cannot be read", id="gzip damaged"),
    ],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=message):
        list(records(str(tmp_path / name)))


def test_a_byte_that_is_no_text_is_named_by_its_place_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("fledge.reading.files.CHUNK_BYTES", 64)
    good = "Summary: Zoë.\nStory: It flew.\n<|endoftext|>\n".encode() * 50
    (tmp_path / "corpus.txt").write_bytes(good + b"Story: caf\xe9.\n")

    with pytest.raises(UserError, match=f"corpus.txt is not UTF-8 text: byte {len(good) + 10} cannot be decoded"):
        list(records(str(tmp_path / "corpus.txt")))
