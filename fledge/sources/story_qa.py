"""Questions about stories, in FairytaleQA's form (Xu et al. 2022): a passage, a question by experts, and its answer.

Questions about one story lie in one split. The Hub's copies name the same columns in other ways.
"""

from collections.abc import Iterator

from fledge.reading.files import Chunk
from fledge.sources.columns import parse_form

LICENSE = None
END = None
FORMS = (
    {"instruction": "question", "input": "context", "response": "answer", "category": "attribute", "group": "story"},
    {
        "instruction": "question",
        "input": "content",
        "response": "answer1",
        "category": "attribute",
        "group": "story_name",
    },
    {
        "instruction": "question",
        "input": "story_section",
        "response": "answer1",
        "category": "attribute",
        "group": "story_name",
    },
)


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict]:
    return parse_form(chunk, FORMS)
