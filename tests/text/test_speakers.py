import json
from pathlib import Path

import pytest
from conftest import ROOT

from fledge.sources import load_source
from fledge.text.speakers import speakers


@pytest.mark.parametrize(
    ("story", "count"),
    [
        ("Tom ran home.", 0),
        ('"Hi," said Tom.', 1),
        ('Tom said, "Hi."', 1),
        ('"Hi!" Tom said. "I am here."', 1),
        ('"Hi," said Tom, "I am here."', 1),
        ('"Hi." Tom smiled and said, "I am here."', None),  # who says the first?
        ('"Hi," said Tom. "Hi," said Mia.', 2),
        ('Tom asked, "Why?" Mia said, "No." Tom said, "Oh."', 2),
        ('Tom looked at Mia and said, "Hi." Mia smiled and said, "Hi!"', 2),
        ('"Hi," said the cat. "Hi," said the dog. "Hi," said the old, grey owl.', 3),
        ('A cat named Tom ran. The cat said, "Hi." Tom said, "Bye."', 1),
        ('A bee named Bo flew. "Hi," said Bo. The queen bee said, "Hi."', 2),
        ('"Hi," said Mom. Her mother said, "Bye."', 1),
        ('The boy said, "Hi." The boy\'s mom was glad and said, "Hi."', 2),
        ('A girl named Lily met a boy named Tim. "Hi," she said. "Hi," said Tim.', 2),
        ('A girl named Lily had a mom. "Hi," she said.', None),
        ('Tom and Mia said, "Hi."', None),
        ('"Hi," everyone said.', None),
        ('"Hi." Tom ran away.', None),
        ('Tom said, "Hi.', None),
    ],
)
def test_speakers_are_counted_or_it_is_not_sure(story, count):
    assert speakers(story) == count
    assert speakers(story.upper()) == count
    assert speakers(story.replace('"', "”").replace("'", "’").replace(" ", " \n ")) == count


def test_stories_that_were_read_have_as_many_speakers():
    """Drawn at random among the shipped stories where the rules are sure; a crowd that speaks counts as one."""
    stories = [
        record["Story"] for record in load_source("tinystories_instruct").records(ROOT / "examples/tales.txt.gz")
    ]
    read = [json.loads(line) for line in (Path(__file__).parent / "speakers.jsonl").open(encoding="utf-8")]
    for line in read:
        story = " ".join(stories[line["record"]].split())
        assert story.startswith(line["begins"])
        assert speakers(story) == line["speakers"], story
