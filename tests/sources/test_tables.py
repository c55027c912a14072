import bz2
import csv
import datetime
import decimal
import gzip
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fledge import sources
from fledge.errors import UserError
from fledge.reading.values import as_text
from fledge.sources import load_source, source_names
from fledge.tasks import RejectedRecord, load_task

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    # Two frames, as tools that compress in parallel write them.
    ".zst": lambda content: b"".join(
        pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:9], content[9:])
    ),
}
ROWS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "Translate to French.", "input": "a café,\nplease", "output": '"un café, s’il vous plaît" 🦊'},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]


def write(file, rows):
    if file.suffix.lower() in COMPRESS:
        inner = file.with_suffix("")
        write(inner, rows)
        file.write_bytes(COMPRESS[file.suffix.lower()](inner.read_bytes()))
    elif file.suffix.isupper():
        write(file.with_suffix(file.suffix.lower()), rows)
        file.with_suffix(file.suffix.lower()).rename(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


FORMS = ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"]
FORMS += ["a.jsonl.zst", "a.json.xz", "a.csv.bz2", "A.JSON", "A.JSONL", "A.CSV", "A.PARQUET", "A.JSONL.GZ"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_gives_the_same_records(tmp_path, name, monkeypatch):
    monkeypatch.setattr("fledge.reading.files.CHUNK_ROWS", 2)  # several chunks
    write(tmp_path / name, ROWS)

    assert list(load_source("alpaca").records(str(tmp_path / name))) == ROWS


def test_an_array_may_lie_in_an_object_and_lines_may_be_called_json(tmp_path):
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    write(tmp_path / "lines.jsonl", ROWS)
    (tmp_path / "lines.jsonl").rename(tmp_path / "lines.json")

    for name in ("object.json", "lines.json"):
        assert list(load_source("alpaca").records(str(tmp_path / name))) == ROWS


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_of_any_country_is_read(tmp_path, delimiter):
    fields = list(ROWS[0]), ["Add;\t\r\n2, 3.", "", "5"], ["Halve 1.", "", "½"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(fields)

    assert list(load_source("alpaca").records(str(tmp_path / "a.csv"))) == [
        {"instruction": "Add;\t\n2, 3.", "input": "", "output": "5"},
        {"instruction": "Halve 1.", "input": "", "output": "½"},
    ]


def test_a_row_may_leave_out_what_it_has_no_value_for(tmp_path):
    rows = [{"instruction": "Name one.", "output": "A fox."}, ROWS[1], {"instruction": "Name two."}]
    write(tmp_path / "some.jsonl", rows)
    assert [row["input"] for row in load_source("alpaca").records(str(tmp_path / "some.jsonl"))] == [
        "",
        ROWS[1]["input"],
        "",
    ]

    write(tmp_path / "none.jsonl", [rows[0], rows[2]])
    for source in (load_source("alpaca"), load_source("columns", "instruction=instruction,response=output")):
        assert list(source.records(str(tmp_path / "none.jsonl"))) == [rows[0], {**rows[2], "output": ""}]


@pytest.mark.parametrize("nothing", ["<noinput>", "Noinput", "`< no input >`", "<nooutput>"])
def test_alpacas_word_for_nothing_is_nothing(tmp_path, nothing):
    write(tmp_path / "a.jsonl", [{"instruction": "Sing.", "input": nothing, "output": nothing}, *ROWS])
    (record, *others) = load_source("alpaca").records(str(tmp_path / "a.jsonl"))

    assert record == {"instruction": "Sing.", "input": "", "output": ""}
    assert others == ROWS


def test_a_folder_is_read_file_by_file_and_their_names_tell_the_split(tmp_path):
    names = ["b-train.jsonl", "a_valid.jsonl", "c.dev.jsonl", "test-00000-of-00001.jsonl", "contest.jsonl"]
    for name in names:
        write(tmp_path / name, [{**ROWS[0], "output": name}])
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / "._b-train.jsonl").write_bytes(b"\0\5\26\7")  # macOS writes it beside the file

    chunks = list(load_source("alpaca").chunks(str(tmp_path)))
    assert [(chunk.content[0]["output"], chunk.split) for chunk in chunks] == [
        ("a_valid.jsonl", "validation"),
        ("b-train.jsonl", "train"),
        ("c.dev.jsonl", "validation"),
        ("contest.jsonl", None),
        ("test-00000-of-00001.jsonl", "test"),
    ]


def test_a_copy_of_a_hub_repository_has_its_files_in_data(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    for name in ("README.md", "dataset_infos.json", "budget.json"):
        (tmp_path / name).write_text("{}")

    assert [chunk.split for chunk in load_source("alpaca").chunks(str(tmp_path))] == ["train"]


def test_dolly_is_read_under_either_name_of_its_columns(tmp_path):
    original = {"instruction": "Who?", "context": "Ann ran.", "response": "Ann", "category": "closed_qa"}
    copy = {"instruction": "Who?", "input": "Ann ran.", "output": "Ann", "category": "closed_qa"}
    write(tmp_path / "original.jsonl", [original, {**original, "context": None}])
    write(tmp_path / "copy.jsonl", [copy])

    assert list(load_source("dolly").records(str(tmp_path / "original.jsonl"))) == [copy, {**copy, "input": ""}]
    assert list(load_source("dolly").records(str(tmp_path / "copy.jsonl"))) == [copy]


@pytest.mark.parametrize(
    "names",
    [
        ("story", "context", "question", "answer", "attribute"),
        ("story_name", "content", "question", "answer1", "attribute"),
        ("story_name", "story_section", "question", "answer1", "attribute"),
    ],
)
def test_questions_about_one_story_are_one_group(tmp_path, names):
    values = ("fox", "A fox ran.", "Who ran?", "a fox", "character")
    write(tmp_path / "qa.jsonl", [dict(zip(names, values, strict=True))])

    assert list(load_source("story_qa").records(str(tmp_path / "qa.jsonl"))) == [
        {"instruction": "Who ran?", "input": "A fox ran.", "output": "a fox", "category": "character", "group": "fox"}
    ]


def test_columns_are_named_by_the_user(tmp_path):
    write(tmp_path / "own.jsonl", [{"q": " Who? ", "a": 7, "from": None, "unused": []}])
    source = load_source("columns", "instruction=q, response=a,category=from")

    assert list(source.records(str(tmp_path / "own.jsonl"))) == [{"instruction": "Who?", "output": "7", "category": ""}]


def test_messages_are_taken_as_they_are(tmp_path):
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho.", "name": "x"}]
    write(tmp_path / "chats.parquet", [{"chat": chat, "id": "s1"}])
    source = load_source("columns", "messages=chat,group=id")

    assert list(source.records(str(tmp_path / "chats.parquet"))) == [
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}], "group": "s1"}
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}],
        '[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]',
        "[{'role': 'user', 'content': 'Hi.', 'tool_calls': None}, {'role': 'assistant', 'content': \"Ho.\"}]",
        [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}, {"role": "Assistant", "content": " Ho. "}],
        ["Hi.", "Ho."],
        [{"role": "prompter", "content": "Hi.", "tool_calls": None}, {"role": "assistant", "content": "Ho."}],
    ],
    ids=["ShareGPT", "as text", "as pandas' text", "content parts", "UltraChat", "OpenAssistant"],
)
def test_messages_in_every_usual_form_are_the_same(tmp_path, messages):
    write(tmp_path / "chats.jsonl", [{"m": messages}])

    assert list(load_source("columns", "messages=m").records(str(tmp_path / "chats.jsonl"))) == [
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}
    ]


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "Let me see.", "function_call": {"name": "see"}},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "5"},
        {"role": "ipython", "content": "5"},
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_left_out_and_no_other(tmp_path, call):
    asked, answered = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}
    bad = {**answered, "weight": 0}
    chats = [[asked, call, answered], None, [], [asked, bad, asked, answered], [asked, {**answered, "weight": 1}]]
    write(tmp_path / "a.jsonl", [{"m": chat} for chat in chats])
    tool, none, empty, unlearned, whole = load_source("columns", "messages=m").records(str(tmp_path / "a.jsonl"))

    task = load_task("instructions")
    with pytest.raises(RejectedRecord, match="a tool speaks in it"):
        task.examples(tool, random.Random(0))
    with pytest.raises(RejectedRecord, match="weight 0, so it is not to be learnt"):
        task.examples(unlearned, random.Random(0))
    for record in (none, empty):
        with pytest.raises(RejectedRecord, match="not questions and answers"):
            task.examples(record, random.Random(0))
    assert task.examples(whole, random.Random(0))[0]["messages"] == [asked, answered]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" a ", "a"),
        (7, "7"),
        (7.0, "7"),
        (0.25, "0.25"),
        (None, ""),
        (float("nan"), ""),
        ([{"type": "text", "text": "Look."}, {"type": "output_text", "text": "There."}], "Look.\nThere."),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (decimal.Decimal("1.50"), "1.50"),
    ],
)
def test_a_value_is_read_as_the_text_that_it_means(value, text):
    assert as_text(value, "here") == text


PLAIN_JSON = st.recursive(
    st.booleans() | st.just(float("inf")), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(value=PLAIN_JSON, row=st.integers(1, 3))
def test_a_nested_value_is_refused_where_it_stands(tmp_path_factory, value, row):
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    rows = [{"q": "Who?", "a": value if number == row else "Ann"} for number in (1, 2, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(UserError, match=f"row {row}, column a holds .*, which is no text"):
        list(load_source("columns", "instruction=q,response=a").records(str(file)))


def test_a_picture_in_content_parts_is_refused(tmp_path):
    parts = [{"type": "text", "text": "Look."}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(UserError, match=r"here holds .*image_url.*which is no text"):
        as_text([*parts[1:], *parts], "here")


def test_the_row_is_told_in_later_chunks_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fledge.reading.files.CHUNK_ROWS", 2)
    write(tmp_path / "a.jsonl", [*ROWS, *ROWS, {**ROWS[0], "output": "half \ud800"}])
    with pytest.raises(UserError, match=r"a.jsonl, row 7, column output holds '\\ud800' at character 6"):
        list(load_source("alpaca").records(str(tmp_path / "a.jsonl")))


def test_a_long_field_is_read(tmp_path):
    write(tmp_path / "a.csv", [{**ROWS[0], "input": "word " * 40_000 + "end"}])
    (record,) = load_source("alpaca").records(str(tmp_path / "a.csv"))

    assert len(record["input"]) == 200_003


def test_a_hub_dataset_is_streamed_split_by_split(monkeypatch):
    asked = []

    def load_dataset(name, config, streaming):
        asked.append((name, config, streaming))
        return {"train": iter(ROWS[:2]), "validation": iter(ROWS[2:])}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    chunks = list(load_source("alpaca").chunks("someone/alpaca-like"))
    assert asked == [("someone/alpaca-like", None, True)]
    list(load_source("alpaca").chunks("someone/alpaca-like:small"))
    assert asked[1] == ("someone/alpaca-like", "small", True)
    assert [(chunk.split, chunk.content) for chunk in chunks] == [("train", ROWS[:2]), ("validation", ROWS[2:])]


def test_a_network_that_fails_on_the_way_is_one_sentence(monkeypatch):
    def rows():
        yield ROWS[0]
        raise ConnectionError("502\nBad Gateway")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": rows()})
    with pytest.raises(UserError, match="me/alpaca, split train, gives no more rows after row 1: 502 Bad Gateway"):
        list(load_source("alpaca").chunks("me/alpaca"))


@pytest.mark.parametrize(
    ("source", "columns", "name", "content", "message"),
    [
        (
            "alpaca",
            None,
            "a.jsonl",
            '{"instruction": "a"}'.encode("utf-16"),
            "a.jsonl is not UTF-8 .* like UTF-16; save",
        ),
        (
            "alpaca",
            None,
            "a.csv",
            "instruction;output\n".encode("utf-16-le"),
            "a.csv is not UTF-8 .* like UTF-16; save",
        ),
        ("alpaca", None, "a.jsonl.xz", lzma.compress(b"{}")[:-9], "a.jsonl.xz cannot be read"),
        ("alpaca", None, "a.jsonl.zst", b"(\xb5/\xfd none", "a.jsonl.zst cannot be read"),
        ("alpaca", None, "a.jsonl", b"", "a.jsonl is empty"),
        ("alpaca", None, "a.json", b" \n", "a.json is empty"),
        ("alpaca", None, "a.json", b"[]", "a.json is empty"),
        ("alpaca", None, "a.csv", b"instruction,input,output\n", "a.csv is empty"),
        ("alpaca", None, "a.json", b'[{"instruction": ', "a.json is damaged after row 0"),
        ("alpaca", None, "a.jsonl", b'{"instruction": "a", "input": "", "output": ""}\n{"inst', "damaged after row 1"),
        ("alpaca", None, "a.jsonl", b'{"instruction": "a"}\n["b"]\n', "row 2 is .*, not a record with named columns"),
        ("alpaca", None, "a.jsonl", b'{"instruction": "caf\xe9"}', "a.jsonl is not UTF-8 text: byte 20 cannot"),
        ("alpaca", None, "a.parquet", b"PAR0", "a.parquet is damaged"),
        ("alpaca", None, "a.txt", b"text", "a.txt is no table; this source reads .json"),
        ("alpaca", None, "a.jsonl", b'{"question": 1, "answer": 2}', "has not the columns .*; it has question, answer"),
        ("dolly", None, "a.jsonl", b'{"instruction": 1}', "has not the columns .*; it has instruction"),
        ("tinystories_instruct", None, "a.jsonl", b'{"story": "a"}', "a.jsonl has no column text; it has story"),
        ("columns", "instruction=q,response=a", "a.jsonl", b'{"q": "", "r": ""}', "has no column a; it has q, r"),
        (
            "columns",
            "messages=m",
            "a.jsonl",
            b'{"m": [{"who": "me"}]}',
            "row 1, column m, message 1 holds .*, or from and",
        ),
        ("columns", "messages=m", "a.jsonl", b'{"m": [{"role": "cat"}]}', "message 1: the role 'cat' is unknown"),
        ("columns", "messages=m", "a.jsonl", b'{"m": "hello"}', 'row 1, column m holds "hello", no list of messages'),
        ("alpaca", None, "a.csv", b"input,output,input\n1,2,3\n", "a.csv is damaged .*names the column input twice"),
        (
            "alpaca",
            None,
            "a.csv",
            b"instruction,input,output\na,b,c\na,b,c,d\n",
            "after row 1: .* has 4 fields, .* names 3",
        ),
        (
            "alpaca",
            None,
            "a.csv",
            b'instruction,input,output\na,"b,c\na,b,c\n',
            "a.csv is damaged after row 0: unexpected",
        ),
        (
            "tinystories_instruct",
            None,
            "a.jsonl",
            b'{"text": "a \\ud83d"}',
            r"row 1, column text holds '\\ud83d' at character 3",
        ),
        ("columns", "messages=m", "a.jsonl", b'{"m": 7}', "holds 7, no list of messages"),
    ],
)
def test_bad_data_is_named_in_one_sentence(tmp_path, source, columns, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=message) as raised:
        list(load_source(source, columns).records(str(tmp_path / name)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", ["nowhere.jsonl", "no/where.jsonl", "/no/where/at/all"])
def test_data_that_is_not_there(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"There is no data file at {data}"):
        list(load_source("alpaca").records(data))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        list(load_source("alpaca").records(str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "columns", "message"),
    [
        ("novels", None, f"'novels' is unknown; choose one of {', '.join(source_names())}"),
        ("dolly", "instruction=a,response=b", "--columns goes with --source columns; dolly knows its own"),
        ("columns", None, "--columns is missing: it does not name what a record needs"),
        ("columns", "instruction=a", "--columns instruction=a does not name"),
        ("columns", "instruction=a,response=", "does not name"),
        ("columns", "instruction=a,response=b,answer=c", "does not name"),
        ("columns", "instruction", "does not name"),
    ],
)
def test_a_source_that_cannot_be(source, columns, message):
    with pytest.raises(UserError, match=message):
        load_source(source, columns)


@pytest.mark.parametrize("name", ["tales.txt.gz", "two_endings.txt.gz"])
def test_the_shipped_tales_are_the_projects_own(name, tmp_path):
    tales, source = str(ROOT / "examples" / name), load_source("tinystories_instruct")
    (tmp_path / "tales.txt.gz").write_bytes(b"others'")

    assert source.license([tales]) == "apache-2.0"
    assert source.license([tales, str(tmp_path / "tales.txt.gz")]) == "cdla-sharing-1.0"
    assert source.license(["owner/name"]) == "cdla-sharing-1.0"
    assert load_source("alpaca").license([str(tmp_path / "tales.txt.gz")]) is None


def test_one_file_in_the_folder_is_a_source(tmp_path, monkeypatch):
    rows = tmp_path / "rows.csv"
    rows.write_text("ask,say\nWhy?,Because.\n", encoding="utf-8")
    (tmp_path / "faq.py").write_text(
        "from fledge.sources.columns import parse_form\n\nLICENSE = None\nEND = None\n\n\n"
        "def parse(chunk, columns):\n    return parse_form(chunk, ({'instruction': 'ask', 'response': 'say'},))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("fledge.sources.__path__", [*sources.__path__, str(tmp_path)])
    assert list(load_source("faq").records(str(rows))) == [{"instruction": "Why?", "output": "Because."}]
