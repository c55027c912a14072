import json

import pytest

from fledge.errors import UserError
from fledge.sources import load_source


def line(prompt: int, sample: int, **changes) -> dict:
    return {
        "task": "topic_ending",
        "split": "train",
        "prompt": prompt,
        "sample": sample,
        "messages": [{"role": "user", "content": f"Prompt {prompt}"}],
        "ending": "sad",
        "model": {"text": f"{prompt}-{sample}", "tokens": 3, "stopped": True, "rewards": {"topic": 1.0}},
    } | changes


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(part) + "\n" for part in lines), encoding="utf-8")
    return folder / "samples.jsonl"


def texts(records) -> list[list[str]]:
    return [[answer["text"] for answer in record["answers"]] for record in records]


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 5, 6, 100])
def test_all_answers_to_a_prompt_are_one_record(tmp_path, monkeypatch, chunk_rows):
    monkeypatch.setattr("fledge.reading.files.CHUNK_ROWS", chunk_rows)
    file = write(tmp_path / "evaluation", [line(prompt, sample) for prompt in range(3) for sample in range(3)])
    (tmp_path / "evaluation" / "answers.jsonl").write_text("{}\n")  # the journal that lies beside

    source = load_source("answers")
    expected = [[f"{prompt}-{sample}" for sample in range(3)] for prompt in range(3)]
    assert texts(source.records(str(file))) == texts(source.records(str(file.parent))) == expected
    assert [record["ending"] for record in source.records(str(file))] == ["sad"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"row 2, answers a prompt of the test split, which is held out; .*--split train"),
        ({"task": None}, r"row 2, has no task as evaluate_model.py writes it"),
        ({"model": {"text": "a", "stopped": True}}, r"row 2, has no rewards as evaluate_model.py writes it"),
        ({"messages": [{"role": "user", "content": "?"}]}, r"row 2, answers another prompt than row 1, .* number 0"),
    ],
)
def test_what_is_not_of_one_evaluation_is_refused(tmp_path, changes, message):
    file = write(tmp_path, [line(0, 0), line(0, 1, **changes)])
    with pytest.raises(UserError, match=message):
        list(load_source("answers").records(str(file)))


def test_a_folder_without_samples_says_so(tmp_path):
    with pytest.raises(UserError, match=r"There is no data file at .*samples.jsonl"):
        list(load_source("answers").records(str(tmp_path)))
