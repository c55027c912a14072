import re

import pytest
from conftest import ROOT

from fledge.tasks import load_task, story_chat
from fledge.text.constraint_kinds import KINDS

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_tells_every_metric_and_class_of_a_task(name):
    task, section = load_task(name), SECTIONS[name]

    assert all(f"`{metric}`" in section for metric in task.meaning)
    for column, labels in task.columns.items():
        assert f"`{column}`" in section
        if isinstance(labels, tuple) and column != "ending":
            assert all(label in section for label in labels)


def test_the_page_quotes_the_first_phrasings():
    for kind, phrasings in story_chat.PHRASINGS.items():
        assert f"| `{kind}` | {phrasings[0]} |" in SECTIONS["story_chat"]
    for name, kind in KINDS.items():
        shown = [phrasings[0] for phrasings in kind.phrasings.values()]
        line = next(line for line in SECTIONS["constraints"].splitlines() if line.startswith(f"| `{name}` |"))
        assert any(f"| {phrasing} " in line for phrasing in shown)
