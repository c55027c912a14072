import multiprocessing
import os
import select
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, write_records
from datasets import Features, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.messages import INPUT_MARK
from fledge.preparation import chunks, shards
from fledge.preparation.chunks import Facts, Found, NamedChunk, Preparation, named_chunks, prepare_chunks, spread
from fledge.preparation.curation import Splits
from fledge.preparation.shards import Shards, bytes_of, parquet_writer, write_splits
from fledge.preparation.tables import columns_of, hash_of, read_table
from fledge.sources import Chunk, load_source
from fledge.tasks import load_task
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer
from fledge.tokenizers.fast import TextEncoder, UnequalIds

SOURCE = load_source("tinystories_instruct")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "records.txt"
    write_records(file, 60)
    return str(file)


@pytest.fixture
def preparation(tmp_path):
    tokenizer = load_tokenizer(str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json"), context_length=128)
    add_template(tokenizer, "story")
    return Preparation(SOURCE, "topic_ending", tokenizer, TextEncoder(tokenizer), 128, "drop", 0, folder=tmp_path)


def bytes_of_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def double(chunk: NamedChunk) -> tuple[str, int]:
    return chunk.name * 2, os.getpid()


def named(count: int) -> list[NamedChunk]:
    return [NamedChunk(f"{number:02d}", Chunk("", None, "")) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 30])
def test_results_come_in_the_order_of_the_chunks(count):
    results = list(spread(double, named(count), num_proc=2))

    assert [name for name, _ in results] == [chunk.name * 2 for chunk in named(count)]
    assert all((pid == os.getpid()) == (count < 2) for _, pid in results)


def test_no_more_chunks_are_read_than_wait():
    taken = []
    results = spread(double, (taken.append(chunk.name) or chunk for chunk in named(50)), num_proc=2)
    next(results)

    assert len(taken) <= 6
    results.close()


def die(chunk: NamedChunk) -> None:
    if chunk.name == "03":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_no_silence():
    with pytest.raises(UserError, match="A process was killed"):
        list(spread(die, named(8), num_proc=2))


def test_no_process_outlives_a_run_that_is_killed():
    """Only the run and its processes hold the pipe's other end, so that it is at its end when all of them are gone."""
    reading, writing = os.pipe()

    def wait(chunk: NamedChunk) -> None:
        os.write(writing, b".")
        signal.pause()

    a_run = multiprocessing.get_context("fork").Process(target=lambda: list(spread(wait, named(4), num_proc=2)))
    a_run.start()
    os.close(writing)
    rest = os.read(reading, 1)
    assert rest == b"."
    a_run.kill()
    a_run.join()
    while rest and select.select([reading], [], [], 60)[0]:
        rest = os.read(reading, 10)
    assert rest == b""
    os.close(reading)


def fail(chunk: NamedChunk) -> None:
    raise UserError(f"chunk {chunk.name} is wrong")


def test_the_error_of_a_process_reaches_the_user():
    with pytest.raises(UserError, match="chunk 00 is wrong"):
        list(spread(fail, named(8), num_proc=2))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("fledge.reading.files.CHUNK_BYTES", 2000)
    monkeypatch.setattr(chunks, "RECORDS", 5)


@pytest.mark.parametrize("limit", [None, 1, 60, 70, 119, 120, 500])
def test_chunks_hold_the_records_in_order(records, limit):
    made = list(named_chunks(SOURCE, [records, records], limit))
    read = [record for chunk in made for record in SOURCE.parse(chunk.chunk)[: chunk.limit]]

    assert read == (list(SOURCE.records(records)) * 2)[:limit]
    assert len(made) == len({chunk.name for chunk in made})
    assert [chunk.name for chunk in made] == sorted(chunk.name for chunk in made)
    assert all(chunk.limit != 0 for chunk in made)


@pytest.mark.parametrize(("files", "tasks"), [(1, 1), (1, 3), (2, 3), (2, 2), (5, 2)])
def test_tasks_share_the_chunks(records, files, tasks):
    def content(**share):
        return [(chunk.name, chunk.chunk.content) for chunk in named_chunks(SOURCE, [records] * files, **share)]

    shares = [content(rank=rank, tasks=tasks) for rank in range(tasks)]
    assert all(shares)
    assert sorted(chunk for share in shares for chunk in share) == content()


def test_a_chunk_without_a_record_has_no_row(preparation):
    preparation(NamedChunk("empty", Chunk("", None, "\n<|endoftext|>\n")))

    facts = Facts.read(preparation.folder)
    assert (facts.total, facts.rows.tolist(), +facts.found.counts, +facts.found.rejected) == (0, [0], {}, {})


def test_an_error_in_a_task_of_ones_own_names_the_record(preparation, records, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from fledge.tasks.topic_ending import TopicEnding\n\n\n"
        "class Own(TopicEnding):\n    def examples(self, record, rng):\n        return record['Abstract']\n"
    )
    preparation.task = str(file)
    with pytest.raises(UserError, match=r"own.py fails with KeyError: 'Abstract', on the record .*'Summary'.*records"):
        prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc=1)


def test_an_answer_with_the_token_for_unknown_text_is_told(preparation, tmp_path):
    """Of a byte-level vocabulary none has it, even where that token is also end-of-text."""
    text = "".join(f"Summary: A fox.\nStory:\nA fox {did}.\n<|endoftext|>\n" for did in ("ran", "hid", "sang"))
    words = ["A", "fox", "ran", "sang", ".", "<|endoftext|>", "<|unk|>"]
    by_words = load_tokenizer(None, 400, {word: number for number, word in enumerate(words)})
    add_template(by_words, "story")
    preparation.tokenizer.unk_token = preparation.tokenizer.eos_token
    for tokenizer, is_known in ((preparation.tokenizer, [True] * 3), (by_words, [True, False, True])):
        preparation.tokenizer, preparation.encoder = tokenizer, TextEncoder(tokenizer)
        preparation(NamedChunk("all", Chunk("", None, text)))
        assert Facts.read(tmp_path).columns["is_known"].tolist() == is_known


def test_any_number_of_processes_writes_the_same_bytes(preparation, records, tmp_path):
    written = []
    for num_proc in (1, 2, 3):
        preparation.folder = tmp_path / str(num_proc)
        preparation.folder.mkdir()
        prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc)
        written.append(bytes_of_files(preparation.folder))

    assert len(written[0]) > 10
    assert written[0] == written[1] == written[2]


def test_ids_that_differ_on_the_data_mean_the_slow_way_from_the_start(
    monkeypatch, preparation, records, tmp_path, capsys
):
    """tiktoken is made to err in the third chunk: its rows are then those of the slow way, all of them."""
    right = TextEncoder.__call__
    calls = []

    def err_once(self, texts, control=False):
        calls.append(self.encoding)
        if self.encoding and len(calls) == 5:
            raise UnequalIds
        return right(self, texts, control)

    monkeypatch.setattr(TextEncoder, "__call__", err_once)
    prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc=1)
    assert "tiktoken, ids checked" in capsys.readouterr().out
    assert all(calls[:5])
    assert not any(calls[5:])
    slow = bytes_of_files(tmp_path)

    monkeypatch.setattr(TextEncoder, "__call__", right)
    prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc=1)
    assert bytes_of_files(tmp_path) == slow


def test_facts_are_those_of_the_rows(preparation, records):
    prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc=1)
    facts = Facts.read(preparation.folder)
    rows = [r for name in facts.chunks for r in read_table(preparation.folder / f"{name}.rows.arrow").to_pylist()]

    assert +facts.found.counts == {"read": 60, "used": 60, "examples": 60}
    assert not facts.found.rejected
    assert len(facts.rows) == len(facts.chunks) > 5
    assert facts.total == len(rows) == 60
    for number, row in enumerate(rows):
        of_row = facts.of([number])
        supervised = sum(label != -100 for label in row["labels"])
        assert of_row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert of_row["completion_length"] == of_row["supervised"] == supervised
        assert of_row["ending"] == row["ending"]
        assert of_row["group"] == hash_of(row["messages"][0]["content"].split(": ")[1].split("\n")[0])
        assert of_row["is_ended"]
        assert not of_row["was_cut"]
    assert len(set(facts.columns["fingerprint"])) == 60


@pytest.mark.parametrize("state_is_known", [True, False])
def test_splits_are_written_as_datasets_writes_them(preparation, records, tmp_path, state_is_known, monkeypatch):
    if not state_is_known:  # to another release of datasets, which then describes the rows itself
        monkeypatch.setattr(shards, "load_from_disk", {}.__getitem__)
    prepare_chunks(preparation, lambda: named_chunks(SOURCE, [records], None), num_proc=1)
    facts = Facts.read(preparation.folder)
    rows = [r for name in facts.chunks for r in read_table(tmp_path / f"{name}.rows.arrow").to_pylist()]
    split_of = np.arange(60, dtype=np.int8) % 4 - 1
    columns = Features({"messages": columns_of(load_task("topic_ending"))["messages"]})
    (tmp_path / "out").mkdir()
    write_splits(tmp_path / "out", facts, Splits(("a", "b", "c"), split_of, seed=3), columns, 1500)

    tokenized = load_from_disk(str(tmp_path / "out" / "tokenized"))
    assert tuple(tokenized) == ("a", "b", "c")
    for number, (name, dataset) in enumerate(tokenized.items()):
        files = sorted((tmp_path / "out" / "data").glob(f"{name}-*.parquet"))
        assert len(files) > 1
        assert [file.name for file in files] == [
            f"{name}-{n:05d}-of-{len(files):05d}.parquet" for n in range(len(files))
        ]
        text = [row for file in files for row in pa.parquet.read_table(file).to_pylist()]
        wanted = [row for row, split in zip(rows, split_of, strict=True) if split == number]
        together = [(str(a["messages"]), b["input_ids"], b["labels"]) for a, b in zip(text, dataset, strict=True)]
        assert together != [(str(row["messages"]), row["input_ids"], row["labels"]) for row in wanted]
        assert sorted(together) == sorted((str(row["messages"]), row["input_ids"], row["labels"]) for row in wanted)
        saved = tmp_path / "by_datasets" / name
        dataset.save_to_disk(saved)
        assert load_from_disk(str(saved)).features == dataset.features
        assert {file.name for file in saved.glob("*.json")} == {
            file.name for file in (tmp_path / "out" / "tokenized" / name).glob("*.json")
        }


@settings(deadline=None, max_examples=50)
@given(
    tables=st.lists(st.lists(st.integers(1, 60), max_size=10), min_size=1, max_size=5),
    max_bytes=st.integers(1, 400),
)
def test_shards_hold_every_row_in_order_and_keep_to_their_size(tmp_path_factory, tables, max_bytes):
    folder = tmp_path_factory.mktemp("shards")
    features = Features({"text": Value("string")})
    shards = Shards(folder / "train", ".parquet", features, parquet_writer, max_bytes)
    for lengths in tables:
        shards.write(pa.table({"text": ["x" * length for length in lengths], "other": [0] * len(lengths)}))
    files = shards.close()

    parts = [pa.parquet.read_table(file) for file in files]
    assert [len(text) for part in parts for text in part["text"].to_pylist()] == [n for table in tables for n in table]
    assert len(files) == 1 or all(len(part) for part in parts)
    assert all(part.schema.names == ["text"] for part in parts)
    assert sorted(folder.iterdir()) == sorted(files)


@pytest.mark.parametrize(("size", "count"), [("500MB", 500_000_000), ("1KB", 1000), ("2GiB", 2 << 30)])
def test_sizes(size, count):
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "big", "5 parsecs", "MB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(UserError, match="is no size; write it as 500MB or 2GB"):
        bytes_of(size)


CUT_PROMPT, CUT_COMPLETION, LONGER = "--overflow cut_prompt", "--overflow cut_completion", "--max_length 128"
# The policy; how many words of one token the question, the text it is about, and the answer have; what would help.
REMEDIES = [
    ("drop", 3, 60, 3, {LONGER, CUT_PROMPT}),
    ("drop", 3, 400, 3, {CUT_PROMPT}),
    ("drop", 3, 0, 60, {LONGER, CUT_COMPLETION}),
    ("drop", 3, 0, 400, {CUT_COMPLETION}),
    ("drop", 60, 0, 3, {LONGER}),
    ("drop", 400, 400, 400, set()),
    ("cut_prompt", 3, 0, 60, {LONGER, CUT_COMPLETION}),
    ("cut_prompt", 50, 30, 3, {LONGER}),
    ("cut_completion", 60, 0, 3, {LONGER}),
    ("cut_completion", 400, 0, 3, set()),
]


def test_each_key_is_named_that_would_keep_a_long_example(preparation):
    """40 tokens may be kept, and 128 fit into the model."""
    for overflow, question, text, answer, remedies in REMEDIES:
        made, found = replace(preparation, task="instructions", max_length=40, overflow=overflow), Found()
        asked = "dog " * question + (INPUT_MARK + "dog " * text if text else "")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "dog " * answer}]
        assert made._encoded([{"messages": messages}], found) == []
        assert found.remedies == dict.fromkeys(remedies, 1), (overflow, question, text, answer)
        assert sum(found.rejected.values()) == 1
