import pytest

from fledge.errors import UserError
from fledge.journal import Journal

SETTINGS = {"--temperature": 0.8, "--seed": 0}


def test_what_was_finished_is_there_again(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    journal = Journal(file, SETTINGS)
    journal.add({("base", 0): {"text": "Zoë\u2028said"}})
    journal.add({("base", 1): {"text": ""}, ("model", 0): {"text": "x"}})
    assert (
        Journal(file, SETTINGS).done
        == journal.done
        == {
            ("base", 0): {"text": "Zoë\u2028said"},
            ("base", 1): {"text": ""},
            ("model", 0): {"text": "x"},
        }
    )


@pytest.mark.parametrize("torn", [1, 9, 30])
def test_half_a_line_is_done_again(tmp_path, torn):
    file = tmp_path / "answers.jsonl"
    journal = Journal(file, SETTINGS)
    for i in range(3):
        journal.add({("base", i): f"a long enough answer, number {i}"})
    whole = file.read_bytes()
    file.write_bytes(whole[:-torn])
    again = Journal(file, SETTINGS)
    assert set(again.done) == {("base", 0), ("base", 1)}
    again.add({("base", 2): "a long enough answer, number 2"})
    assert file.read_bytes() == whole


def test_a_file_that_was_killed_before_its_first_line_begins_anew(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"--temp')
    Journal(file, SETTINGS).add({("base", 0): 1})
    assert Journal(file, SETTINGS).done == {("base", 0): 1}


def test_other_settings_are_refused_by_name(tmp_path):
    file = tmp_path / "answers.jsonl"
    Journal(file, SETTINGS)
    with pytest.raises(UserError, match=r"another --temperature; .*--overwrite"):
        Journal(file, {"--temperature": 0.7, "--seed": 0})
    with pytest.raises(UserError, match="another --temperature and another --seed"):
        Journal(file, {"--temperature": 0.7, "--seed": 1})


@pytest.mark.parametrize("content", ["mine", "[]\n", "1\n", "no JSON\n", "{}\n{}\n", '{}\n{"key": 3, "value": 1}\n'])
def test_a_damaged_file_is_refused(tmp_path, content):
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="damaged"):
        Journal(file, {})
    assert file.read_text() == content


def test_a_full_disk_keeps_what_was_finished(tmp_path):
    resource = pytest.importorskip("resource")
    file, earlier = tmp_path / "answers.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(file, SETTINGS)
    journal.add({("base", 0): "finished"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, earlier[1]))
    try:
        with pytest.raises(UserError, match=r"answers.jsonl cannot be written: .*; make room and go on with --resume"):
            journal.add({("base", 1): "too long for this disk"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert Journal(file, SETTINGS).done == {("base", 0): "finished"}
