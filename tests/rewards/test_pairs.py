import json
from pathlib import Path

import pytest
from conftest import ROOT
from small import small_tokenizer

from fledge.encoding import encode, prompt_length
from fledge.errors import UserError
from fledge.rewards.pairs import cut_pairs, longest_pair, open_pairs
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json"), context_length=128)
    add_template(tokenizer, "story")
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write(folder: Path, rows: list[dict]) -> str:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


FORMS = [
    {"prompt": "Who ran?", "chosen": "A fox.", "rejected": "No."},
    {"prompt": [user("Who ran?")], "chosen": [assistant("A fox.")], "rejected": [assistant("No.")]},
    {"prompt": "Who ran?", "chosen": [user("Who ran?"), assistant("A fox.")], "rejected": "No."},
    {"chosen": [user("Who ran?"), assistant("A fox.")], "rejected": [user("Who ran?"), assistant("No.")]},
]


def asked_otherwise(row: dict) -> list[dict]:
    """The pair and two more in its form, to other questions."""
    return [row, *(json.loads(json.dumps(row).replace("ran", other)) for other in ("sat", "ate"))]


@pytest.mark.parametrize("row", FORMS)
def test_every_form_of_a_pair_gives_the_ids_of_inference(tmp_path, tokenizer, row):
    budget, _, rows, lines = open_pairs(write(tmp_path, asked_otherwise(row)), tokenizer, 128, seed=0)
    assert (budget, lines) == (None, ["Rows: 2 in train, 1 in validation"])
    chosen, rejected = (encode(tokenizer, [[user("Who ran?"), assistant(text)]])[0] for text in ("A fox.", "No."))
    whole = [row for split in rows.values() for row in split]
    (found,) = [row for row in whole if row["input_ids"] == chosen.input_ids]
    assert found["input_ids"][: prompt_length(found["labels"])] == rejected.prompt_ids
    assert found["rejected_ids"] == rejected.completion_ids
    assert longest_pair(rows) == max(len(row["input_ids"]) for row in whole)
    assert cut_pairs(rows, 200) == cut_pairs(rows, None) == []
    shorter = min(len(row["input_ids"]) for row in whole) - 1
    assert cut_pairs(rows, shorter) == [f"Pairs cut 2 of 2 by max_length {shorter}, with their end-of-text"]
    with pytest.raises(UserError, match="--max_length 3 cuts the answers off every pair"):
        cut_pairs(rows, 3)


def test_what_teaches_no_preference_is_left_out_and_counted(tmp_path, tokenizer):
    rows = [*asked_otherwise(FORMS[0]), FORMS[0]]
    rows += [FORMS[0] | {"rejected": text} for text in ("A fox.", "no " * 200)]
    rows += [FORMS[0] | {"prompt": ""}, FORMS[0] | {"chosen": ""}]
    _, _, _, lines = open_pairs(write(tmp_path, rows), tokenizer, 128, seed=0)
    assert lines == [
        "Rows: 2 in train, 1 in validation, left out 2 (a question or an answer is empty), "
        "left out 1 (chosen and rejected are the same), left out 1 (longer than 128 tokens), "
        "left out 1 (an exact duplicate)"
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Who?", "completion": "A fox."},
            "has the columns prompt, completion; give prompt, chosen and rejected",
        ),
        ({"chosen": "A fox.", "rejected": "No."}, "row 1, column chosen has no prompt; give a column prompt"),
        (
            {"chosen": [user("Who?"), assistant("A.")], "rejected": [user("Why?"), assistant("No.")]},
            "row 1, column rejected answers another prompt; a pair is two answers to the same one",
        ),
        (
            {"prompt": "Who?", "chosen": [user("Why?"), assistant("A.")], "rejected": "No."},
            "row 1, column chosen answers another prompt",
        ),
        (
            {"prompt": "Who?", "chosen": "A.", "rejected": [user("No.")]},
            "rejected ends with a message of the user, not",
        ),
        ({"prompt": "Who?", "chosen": "A.", "rejected": True}, "column rejected holds true, which is no text"),
        (FORMS[0] | {"rejected": "A fox."}, r"has 0 rows to train on, left out 2 \(chosen and rejected are the same\)"),
    ],
)
def test_a_table_that_holds_no_pairs_is_refused(tmp_path, tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        open_pairs(write(tmp_path, [row] * 2), tokenizer, 128, seed=0)


def test_a_model_without_a_template_cannot_read_a_table(tmp_path):
    with pytest.raises(UserError, match="The model has no chat template, so it cannot answer a prompt yet"):
        open_pairs(write(tmp_path, FORMS[:1] * 2), small_tokenizer(), 128, seed=0)
