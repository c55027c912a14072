import functools
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.reading.documents import END, names_and_sizes, pieces
from fledge.reading.files import decoded
from fledge.tokenizers import gpt2


def documents(*data, **keywords) -> list[str]:
    """Pieces put together again."""
    found, held = [], ""
    for text, is_end in pieces([str(source) for source in data], **keywords):
        held += text
        if is_end:
            found.append(held)
            held = ""
    assert held == ""
    return found


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "anything"])
def test_documents_of_a_text_lie_between_marks(write, name):
    file = write(name, f"\n One. \n{END}\n\n  {END}Two\n\nlines{END}")
    assert documents(file) == ["One.", "Two\n\nlines"]


def test_rows_are_documents(write, tmp_path):
    from datasets import Dataset

    rows = [
        {"text": "One"},
        {"text": f"Two{END}Three"},
        {"text": ""},
        {"text": None},
        {},
        {"text": "Four \N{SNOWMAN}\u2028x"},
    ]
    expected = ["One", "Two", "Three", "Four \N{SNOWMAN}\u2028x"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert documents(write("a.jsonl", lines)) == expected
    assert documents(write("a.jsonl.gz", lines + "\n")) == expected
    Dataset.from_list(rows).rename_column("text", "story").to_parquet(tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", text_column="story") == expected


def test_a_document_starts_at_a_line_that_matches(write):
    wiki = " = Ant = \n\n Ants . \n = = Food = = \n Leaves . \n = Bee = \n\n Bees . \n"
    expected = ["= Ant = \n\n Ants . \n = = Food = = \n Leaves .", "= Bee = \n\n Bees ."]
    start = "^ = [^=]"
    assert documents(write("wiki.txt", wiki), document_start=start) == expected
    rows = "".join(json.dumps({"text": line}) + "\n" for line in wiki.splitlines(keepends=True))
    assert documents(write("wiki.jsonl", rows), document_start=start) == expected


def test_folders_are_read_in_the_order_of_their_names(write, tmp_path):
    write("b.txt", "second"), write("a.jsonl", '{"text": "first"}'), write("c.log", "no")
    assert documents(tmp_path) == ["first", "second"]
    assert [name for name, _, _ in names_and_sizes([str(tmp_path)])] == ["a.jsonl", "b.txt"]


def test_files_larger_than_a_read_are_the_same(write, monkeypatch):
    text = END.join(f"{n} = \n = {n} = \n" + "word " * n for n in range(60))
    file = write("a.txt", text)
    expected = [documents(file), documents(file, document_start="^ = ")]
    assert len(expected[1]) > len(expected[0]) == 60
    for size in (1, 7, 13, 64, 1000):
        monkeypatch.setattr("fledge.reading.documents.PIECE", size)
        assert [documents(file), documents(file, document_start="^ = ")] == expected


@pytest.mark.parametrize("gap", [" ", "\n"])
def test_a_file_is_read_in_parts_wherever_it_has_spaces_or_lines(write, monkeypatch, gap):
    monkeypatch.setattr("fledge.reading.files.CHUNK_BYTES", 100)
    file = write("a.txt", gap.join(["\u4e2d" * 9] * 50))

    parts = list(decoded(file, " ", "\n"))
    assert max(map(len, parts)) < 100
    assert "".join(parts) == file.read_text(encoding="utf-8")


WORDS = st.text(st.sampled_from("ab'\u00e9 \n\t\u20099.,\u4e2d\U0001f600"), min_size=1, max_size=80)


@given(text=WORDS, size=st.integers(1, 30))
def test_pieces_of_a_document_have_the_ids_of_the_whole(text, size, tmp_path_factory):
    tokenizer = gpt2_once()
    file = tmp_path_factory.mktemp("pieces") / "a.txt"
    file.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(UserError, match="no text"):
            documents(file, size=size)
        return
    found = list(pieces([str(file)], size=size))
    assert "".join(piece for piece, _ in found) == text.strip()
    assert [is_end for _, is_end in found] == [False] * (len(found) - 1) + [True]
    assert [i for piece, _ in found for i in tokenizer.encode(piece).ids] == tokenizer.encode(text.strip()).ids


@functools.cache
def gpt2_once():
    return gpt2()


@pytest.mark.parametrize(
    ("name", "content", "keywords", "message"),
    [
        ("a.txt", "", {}, "there is no text"),
        ("a.txt", f" \n{END}\n", {}, "there is no text"),
        ("a.txt", b"caf\xe9", {}, "is not UTF-8"),
        ("a.jsonl", '{"text": "x"}\n{"text"', {}, "damaged after row 1"),
        ("a.jsonl", '["x"]', {}, "not a record with named columns"),
        ("a.jsonl", '{"story": "x"}', {}, r"no column text \(it has story\); name it by --text_column"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', {}, "row 2, column text holds no text"),
        ("a.jsonl", '{"text": "x\\ud83d"}', {}, r"row 1, column text holds '\\ud83d' at character 2"),
        ("a.parquet", "no", {}, "damaged after row 0"),
        ("a.txt", "x", {"document_start": "("}, "is no regular expression"),
    ],
)
def test_a_bad_corpus_is_one_sentence(write, name, content, keywords, message):
    with pytest.raises(UserError, match=message) as error:
        documents(write(name, content), **keywords)
    assert "\n" not in str(error.value)


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no data file"):
        documents(tmp_path / "corpus.txt")
    with pytest.raises(UserError, match="holds no data file"):
        documents(tmp_path)
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        documents(tmp_path)
