import random

import pytest
from conftest import ROOT

from fledge.tasks import TASKS, load_task
from fledge.tasks.story_chat import PHRASINGS

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_the_page_tells_every_metric_and_class_of_a_task(name):
    task, section = load_task(name), PAGE.split(f"## `{name}`\n")[1].split("\n## ")[0]

    assert all(f"`{metric}`" in section for metric in task.MEANING)
    for column, labels in task.COLUMNS.items():
        assert f"`{column}`" in section
        if isinstance(labels, tuple) and column != "ending":
            assert all(label in section for label in labels)


def test_the_page_quotes_the_first_phrasings():
    for kind, phrasings in PHRASINGS.items():
        assert f"| `{kind}` | {phrasings[0]} |" in PAGE


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_what_the_page_says(name):
    task = load_task(name)

    assert isinstance(task.ASKS_ONCE, bool)
    assert task.EXAMPLE[-1]["role"] == "user"
    record = {"Summary": "A cat.", "Story": "A cat sat.", "instruction": "Who sat?", "output": "A cat."}
    made = task.examples(record, random.Random(0))
    assert {frozenset(row) for row in made} == {frozenset({"messages", "group", *task.COLUMNS})}
