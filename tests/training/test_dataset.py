import gzip
import json
import random

import pytest
from datasets import Dataset, DatasetDict
from small import small_tokenizer

from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.reading.values import NOT_IN_TURN, as_messages
from fledge.tasks import RejectedRecord, load_task
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer
from fledge.training.dataset import check_supervised, open_dataset

PAIR = [{"instruction": f"t{n} t3", "response": f"t{n}"} for n in range(4, 24)]


def opened(file, tokenizer=None):
    return open_dataset(str(file), tokenizer or small_tokenizer(), "story_chat", 20, seed=1)


def texts(rows, tokenizer) -> list[str]:
    return sorted(tokenizer.decode(ids) for split in rows.values() for ids in split["input_ids"])


def write(file, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix.lower() == ".gz" else content)
    return file


def turns(row, one="role", two="content", roles=("user", "assistant")):
    return [{one: roles[0], two: row["instruction"]}, {one: roles[1], two: row["response"]}]


FORMS = {
    "pair.jsonl": PAIR,
    "Pair.JSONL": PAIR,
    "pair.jsonl.gz": PAIR,
    "alpaca.jsonl": [{"instruction": row["instruction"], "input": "", "output": row["response"]} for row in PAIR],
    "trl.jsonl": [{"prompt": turns(row)[:1], "completion": turns(row)[1:]} for row in PAIR],
    "chat.jsonl": [{"messages": turns(row)} for row in PAIR],
    "text.jsonl": [{"messages": json.dumps(turns(row))} for row in PAIR],
    "parts.jsonl": [
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in turns(row)]} for row in PAIR
    ],
    "sharegpt.jsonl": [{"conversations": turns(row, "from", "value", ("human", "gpt"))} for row in PAIR],
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_gives_the_same_rows(tmp_path, name):
    _, tokenizer, rows, lines = opened(write(tmp_path / name, FORMS[name]))

    expected = [f"<|user|>{row['instruction']}<|assistant|>{row['response']}t0" for row in PAIR]
    assert [text.replace(" ", "") for text in texts(rows, tokenizer)] == sorted(t.replace(" ", "") for t in expected)
    assert lines == ["Rows: 19 in train, 1 in validation"]


def test_an_input_is_not_left_behind(tmp_path):
    rows = [{"instruction": "t5", "input": f"t{n}", "response": "t6"} for n in (7, 8)]
    _, tokenizer, rows, _ = opened(write(tmp_path / "a.jsonl", rows))

    assert ["t7" in text or "t8" in text for text in texts(rows, tokenizer)] == [True, True]


def test_files_named_after_splits_are_those_splits(tmp_path):
    write(tmp_path / "train.jsonl", PAIR[:12])
    write(tmp_path / "valid.jsonl", PAIR[12:])

    assert opened(tmp_path)[3] == ["Rows: 12 in train, 8 in validation"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "t5", "response": None}, "a question or an answer is empty"),
        ({"instruction": "t5"}, "a question or an answer is empty"),
        ({"instruction": " ", "response": "t5"}, "a question or an answer is empty"),
        ({"instruction": "t5", "response": "\u200b\ufeff"}, "a question or an answer is empty"),
        (PAIR[3], "an exact duplicate"),
        ({"instruction": "t5 " * 30, "response": "t5"}, "longer than 20 tokens"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted(tmp_path, row, reason):
    *_, lines = opened(write(tmp_path / "a.jsonl", [row, *PAIR]))

    assert lines == [f"Rows: 19 in train, 1 in validation, left out 1 ({reason})"]


def test_files_of_one_split_are_put_together(tmp_path):
    write(tmp_path / "train.jsonl", PAIR[:12])
    write(tmp_path / "more.jsonl", PAIR[12:])

    assert opened(tmp_path)[3] == ["Rows: 19 in train, 1 in validation"]


def test_a_row_that_is_also_held_out_does_not_train(tmp_path):
    write(tmp_path / "train.jsonl", PAIR[:12])
    write(tmp_path / "valid.jsonl", PAIR[10:])
    *_, rows, lines = opened(tmp_path)

    assert lines == ["Rows: 10 in train, 10 in validation, left out 2 (an exact duplicate)"]
    assert not set(map(tuple, rows["train"]["input_ids"])) & set(map(tuple, rows["validation"]["input_ids"]))


def test_a_question_with_several_answers_is_held_out_whole(tmp_path):
    asked = [{"instruction": f"t{n % 10 + 40}", "response": f"t{n}"} for n in range(4, 40)]
    rows = opened(write(tmp_path / "a.jsonl", asked))[2]
    questions = {name: {ids[1] for ids in split["input_ids"]} for name, split in rows.items()}

    assert not questions["train"] & questions["validation"]
    assert len(questions["train"] | questions["validation"]) == 10


def test_one_question_for_all_rows_is_held_out_by_rows(tmp_path):
    rows = [{"instruction": "t3", "response": row["response"]} for row in PAIR]

    assert opened(write(tmp_path / "a.jsonl", rows))[3] == ["Rows: 19 in train, 1 in validation"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [
                {"role": "user", "content": "t5"},
                {"role": "tool", "content": "t6"},
                {"role": "assistant", "content": "t7"},
            ],
            "a tool speaks in it, which no template writes",
        ),
        (
            [{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6", "weight": 0}] * 2,
            "an answer in it has weight 0, so it is not to be learnt",
        ),
        *(
            ([{"role": role, "content": "t5"} for role in roles.split()], NOT_IN_TURN)
            for roles in (
                "",
                "user",
                "assistant",
                "system",
                "user user assistant",
                "user assistant assistant",
                "assistant user assistant",
                "user assistant user",
            )
        ),
        *(
            (
                [{"role": role, "content": "t5"} for role in roles.split()],
                "a system message stands after another message",
            )
            for roles in ("user system assistant", "system system user assistant", "user assistant system")
        ),
    ],
)
def test_a_conversation_that_cannot_be_used_is_counted(tmp_path, messages, reason):
    rows = [*FORMS["chat.jsonl"], {"messages": messages}]

    assert f"left out 1 ({reason})" in opened(write(tmp_path / "a.jsonl", rows))[3][0]
    with pytest.raises(RejectedRecord, match=f"^{reason}$"):
        load_task("instructions").examples({"messages": as_messages(messages, "here")}, random.Random(0))


def test_a_template_that_cannot_write_a_conversation_is_one_sentence(tmp_path):
    tokenizer = small_tokenizer()
    add_template(tokenizer, "story_chat")
    tokenizer.chat_template = "{{ raise_exception('Only user\n and model') }}"

    with pytest.raises(UserError, match="cannot write this conversation: Only user and model; change"):
        open_dataset(str(write(tmp_path / "a.jsonl", PAIR)), tokenizer, None, 20, seed=1)


def test_an_empty_cell_of_a_csv_is_counted_and_numbers_are_read(tmp_path):
    file = tmp_path / "A.CSV"
    file.write_text("instruction,response\n" + "".join(f"t{n},{n}\n" for n in range(3, 9)) + "t9,\n")

    assert opened(file)[3] == ["Rows: 5 in train, 1 in validation, left out 1 (a question or an answer is empty)"]


def test_a_vocabulary_of_characters_leaves_out_what_it_cannot_write(tmp_path):
    tokenizer = load_tokenizer(None, 64, {character: i for i, character in enumerate("\n abc")})
    rows = [{"instruction": "a", "response": answer} for answer in ("a", "b", "c", "d", "é", "dé")]
    add_template(tokenizer, "story_chat")

    lines = opened(write(tmp_path / "a.jsonl", rows), tokenizer)[3]
    assert lines == ["Rows: 2 in train, 1 in validation, left out 3 (the vocabulary lacks something in it: 'd', 'é')"]


def test_answers_with_the_token_for_unknown_text_are_counted(tmp_path):
    vocabulary = ["<unk>", *"\n abc"]
    tokenizer = load_tokenizer(None, 64, {character: i for i, character in enumerate(vocabulary)})
    rows = [{"instruction": asked, "response": answer} for asked, answer in (("a", "b"), ("é", "c"), ("c", "dé"))]
    add_template(tokenizer, "story_chat")

    lines = opened(write(tmp_path / "a.jsonl", rows), tokenizer)[3]
    assert lines[0] == "Rows: 2 in train, 1 in validation"
    assert lines[1].startswith("Unknown text: 1 of the rows have an answer with the token for it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "t5", "response": "t6"}\n', "has 1 rows to train on; give at least two"),
        ('{"instruction": "t5", "response": "t6"}\n' * 3, r"has 1 rows to train on, left out 2 \(an exact duplicate\)"),
        ('{"instruction": "t5", "response": null}\n', r"has 0 rows to train on, left out 1 \(a question or"),
        ('{"instruction": "t5", "response": true}\n', "row 1, column response holds true, which is no text"),
        ('{"messages": "t5"}\n', 'row 1, column messages holds "t5", no list of messages'),
        ('{"messages": [{"role": "cat", "content": "t5"}]}\n', "the role 'cat' is unknown"),
        ('{"instruction": "t5", "response": "\\ud83d"}\n', r"row 1, column response holds '\\ud83d' at character 1"),
        ('{"a": 1}\n', "has the columns a; give messages, instruction and response"),
        ("", "is empty"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        opened(tmp_path / "a.jsonl")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[IGNORED, 5]], None),
        ([[IGNORED], [IGNORED, 5]], None),
        ([[5, 6]], None),
        ([[IGNORED], [IGNORED] * 2], "No token of the test split is supervised"),
        (None, "The test split lacks labels"),
    ],
)
def test_a_split_in_which_nothing_is_supervised_is_refused(labels, said):
    columns = {"input_ids": [[1]]} if labels is None else {"input_ids": labels, "labels": labels}
    rows = DatasetDict(train=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[IGNORED, 2]]}))
    rows["test"] = Dataset.from_dict(columns)
    if said is None:
        check_supervised(rows)
    else:
        with pytest.raises(UserError, match=said):
            check_supervised(rows)
