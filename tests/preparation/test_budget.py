import json
import re
from collections import Counter

import numpy as np
import pytest

from fledge.preparation.budget import Budget
from fledge.preparation.reasons import DUPLICATE, Reason, surplus, too_long, unwritable

CLASSES = {"ending": ("sad", "happy")}
UNKNOWN = 7  # an answer of so many tokens has the unknown one
JOINED = 124  # before an answer of so many tokens are three that are not supervised


def facts(rows: list[tuple[int, int, bool]], endings: list[str]) -> dict[str, np.ndarray]:
    """Of rows with a prompt of so many tokens and an answer of so many, and end-of-text after it unless it was cut."""
    prompt, answer, end = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "length": prompt + answer + end,
        "completion_length": answer + end,
        "supervised": answer + end,
        "is_ended": end,
        "unlearned": np.where(answer == JOINED, 3, 0),
        "is_known": np.array([answer != UNKNOWN for answer in answer]),
        "was_cut": ~end,
        "ending": np.array([CLASSES["ending"].index(ending) for ending in endings]),
    }


TRAIN = facts(
    [(1, 1, True), (2, 3, True), (3, 5, False), (4, 7, True), (5, 124, True)], ["happy", "sad", "happy", "sad", "happy"]
)
HELD_OUT = facts([(2, 1, True), (1, 2, True)], ["sad", "happy"])


@pytest.fixture
def budget():
    budget = Budget("records", "poems", "story", seed=7, max_length=130, overflow="cut_completion")
    budget.rows_read, budget.records_used, budget.examples = 1010, 1009, 1009
    budget.rejected = Counter({Reason("no summary"): 1, DUPLICATE: 2, too_long(130): 1000})
    budget.describe("train", TRAIN, CLASSES)
    budget.describe("test", HELD_OUT, CLASSES)
    return budget


def test_what_was_read_is_what_was_kept_and_what_was_left_out(budget):
    content = budget.as_dict()

    assert content["rows_kept"] == 7
    assert content["rows_read"] == content["rows_kept"] + sum(content["rejected"].values())


def test_figures_of_a_split_match_a_hand_count(budget):
    """Prompts of 1 to 5 tokens, completions of 2, 4, 5, 8 and 125; quantiles lie between and are rounded down."""
    assert budget.as_dict()["splits"]["train"] == {
        "rows": 5,
        "labels": {"happy": 3, "sad": 2},
        "classes": {"ending": {"happy": 3, "sad": 2}},
        "tokens": 159,
        "supervised_share": pytest.approx(144 / 159),
        "eos_supervised": 4,
        "cut": 1,
        "unknown": 1,
        "unlearned": 3,
        "prompts_cut": 0,
        "lengths": {
            "prompt": {"0": 1, "0.05": 1, "0.25": 2, "0.5": 3, "0.75": 4, "0.95": 4, "0.99": 4, "1": 5},
            "completion": {"0": 2, "0.05": 2, "0.25": 4, "0.5": 5, "0.75": 8, "0.95": 101, "0.99": 120, "1": 125},
            "total": {"0": 3, "0.05": 3, "0.25": 6, "0.5": 8, "0.75": 12, "0.95": 106, "0.99": 125, "1": 130},
        },
        "longer_than": {"128": 1, "256": 0, "512": 0, "1024": 0, "2048": 0},
    }


def test_a_length_at_the_limit_is_not_longer_than_it():
    budget = Budget("records", "poems", "story", 0, 512, "drop")
    budget.describe("train", facts([(28, 100, False), (29, 100, False)], ["sad", "sad"]), CLASSES)

    assert budget.splits["train"]["longer_than"]["128"] == 1


def test_the_most_frequent_reason_comes_first(budget):
    assert list(budget.as_dict()["rejected"]) == ["longer than 130 tokens", "an exact duplicate", "no summary"]


def test_the_report_names_every_reason_and_every_split(budget):
    report = budget.markdown()

    assert "# Budget: poems from records" in report
    assert "Read 1,010 records and kept 7." in report
    assert "Template `story`, max_length 130, overflow `cut_completion`, seed 7." in report
    assert "| no summary | 1 |" in report
    assert "| an exact duplicate | 2 |" in report
    assert "| longer than 130 tokens | 1,000 |" in report
    assert "| train | 5 | 3 happy, 2 sad | 159 | 90.6% | 4 of 5 | 8 | 106 | 130 |" in report
    assert "| test | 2 | 1 happy, 1 sad | 8 | 62.5% | 2 of 2 | 4 | 4 | 4 |" in report
    assert "Training rows longer than 128: 1, 256: 0, 512: 0, 1024: 0, 2048: 0" in report


def test_nothing_left_out_needs_no_table_of_reasons():
    budget = Budget("records", "poems", "story", 0, 130, "drop", rows_read=2)
    budget.describe("train", HELD_OUT, CLASSES)

    assert "left out" not in budget.markdown()


def test_the_same_figures_are_saved_as_json_text_and_picture(budget, tmp_path):
    budget.save(tmp_path, TRAIN)

    assert json.loads((tmp_path / "budget.json").read_text(encoding="utf-8")) == budget.as_dict()
    assert (tmp_path / "budget.md").read_text(encoding="utf-8") == budget.markdown()
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {file.name for file in tmp_path.iterdir()} == {"budget.json", "budget.md", "budget.png"}


def warnings_of(rows, endings=None, rejected=None, examples=1000, **found) -> list[str]:
    counts = {"rows_read": 2000, "records_used": 500, "examples": examples, **found}
    budget = Budget("records", "poems", "story", 0, 130, "drop", **counts)
    budget.describe("train", facts(rows, endings or ["happy", "sad"] * (len(rows) // 2)), CLASSES)
    budget.rejected = Counter(rejected or {})
    return budget.as_dict()["warnings"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"rows": [(5, 5, True)] * 2}, []),
        ({"rows": [(98, 0, True)] * 2}, []),
        ({"rows": [(5, JOINED, True)] * 2}, ["6 earlier answers of conversations are not supervised.* story_chat"]),
        ({"rows": [(5, 5, True), (5, UNKNOWN, True)]}, ["1 of 2 rows have an answer with the token for unknown text"]),
        ({"rows": [(100, 0, True)] * 2}, [r"Only 0\.99% of the training tokens are supervised\.$"]),
        (
            {"rows": [(100, 0, True)] * 2, "cuttable": 1},
            [r"Only 0\.99% of the training tokens .* --overflow cut_prompt"],
        ),
        ({"rows": [(5, 5, True)] * 11, "endings": ["happy"] * 10 + ["sad"]}, []),
        (
            {"rows": [(5, 5, True)] * 12, "endings": ["happy"] * 11 + ["sad"]},
            [r"ending sad is rare: 1 of 12 training rows, happy has 11; --balance ending makes them equal\."],
        ),
        ({"rows": [(5, 5, True)] * 2, "rejected": {too_long(130): 50}}, []),
        (
            {"rows": [(5, 5, True)] * 2, "rejected": {too_long(130): 51}},
            [r"5\.1% .* left out \(longer than 130 tokens\); only a base with a longer context changes that\.$"],
        ),
        (
            {
                "rows": [(5, 5, True)] * 2,
                "rejected": {too_long(130): 51},
                "remedies": {"--max_length 512": 51, "--overflow cut_prompt": 7},
            },
            [r".*; --max_length 512 would keep 51 of them, --overflow cut_prompt would keep 7 of them\.$"],
        ),
        (
            {"rows": [(5, 5, True)] * 2, "rejected": {unwritable("'#'"): 60}},
            [r"6\.0% of the examples are left out \(.*: '#'\); a base with a larger vocabulary changes that\.$"],
        ),
        (
            {"rows": [(5, 5, True)] * 2, "rejected": {Reason("no summary"): 120, surplus("ending"): 80}},
            [
                r"6\.0% of the records are left out \(no summary\); another --task changes that\.",
                r"8\.0% of the examples are left out \(surplus of one ending\); --balance changes that\.",
            ],
        ),
    ],
)
def test_a_warning_names_the_key_that_changes_it(made, expected):
    found = warnings_of(**made)

    assert len(found) == len(expected)
    for sentence, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, sentence)


def test_warnings_stand_in_the_report():
    budget = Budget("records", "poems", "story", 0, 130, "drop", rows_read=2, records_used=2, examples=2)
    budget.describe("train", facts([(200, 0, True)] * 2, ["sad", "happy"]), CLASSES)

    (sentence,) = budget.warnings()
    assert sentence in budget.markdown()
