"""TinyStories-Instruct (Eldan and Li 2023): stories with the fields they were written from.

A record ends with a line `<|endoftext|>`. Its fields, each at the beginning of a line, come in any order, before or
after the story. A value begins on the line of its field or below it and runs to the next field or the end of the
record:

    Features: Dialogue, BadEnding
    Words: quit, oak, gloomy
    Summary: Sara and Ben were playing in the park, but ...
    Random sentence: They were cold.
    Story:

    Sara and Ben were playing in the park. ...
    <|endoftext|>

A line of the story may begin with a field's name ("Words: that was all he had."). After `Story:` such a line is a field
only if it has the form of one. `Features` and `Words` are one line that is not a sentence, `Random sentence` is one
line, and only another field may follow these three. A second `Story:` stands alone on its line. A `Summary` is one line
if the record already has one before its story. Every other line belongs to the story.
"""

import re
from collections.abc import Iterator

from fledge.reading.files import Chunk

LICENSE = "cdla-sharing-1.0"
END = "<|endoftext|>"
FIELD = re.compile(r"\n(Features|Words|Summary|Random sentence|Story):[ \t]*")  # three times as fast as with ^
STORY_WITHIN_A_LINE = re.compile(r"[ \t]Story:")
LISTS = ("Features", "Words")
FORMS = {
    "Features": re.compile(r"\s*(.*[^\s.!?\"”'’])?\s*"),
    "Words": re.compile(r"\s*(.*[^\s.!?\"”'’])?\s*"),
    "Random sentence": re.compile(r"\s*.*\s*"),
    "Summary": re.compile(r"\s*.*\s*"),
    "Story": re.compile(r"(?:\n.*)?", re.DOTALL),
}


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yields a dictionary per record, field name → value, in the order of the record.

    If a field is repeated, its first non-empty value counts; repeated `Features` and `Words` are joined into one list.
    """
    for text in chunk.text.split(END):
        if text.strip():
            yield parse_record("\n" + text)


def parse_record(text: str) -> dict[str, str]:
    """The fields of one record. `text` is the part between two end marks, after a line break."""
    found = list(FIELD.finditer(text))
    names = [match[1] for match in found]
    if "Story" not in names and STORY_WITHIN_A_LINE.search(text):
        return parse_record(STORY_WITHIN_A_LINE.sub("\nStory:", text, count=1))
    if "Story" in names[:-1]:
        found = _fields(text, found, names.index("Story"))
    record: dict[str, str] = {}
    ends = [*(match.start() for match in found[1:]), len(text)]
    for match, end in zip(found, ends, strict=False):  # a record without a field has one end and no match
        name, value = match[1], text[match.end() : end].strip()
        if name in LISTS and record.get(name) and value:
            record[name] += f", {value}"
        elif not record.get(name):
            record[name] = value
    return record


def _fields(text: str, found: list[re.Match], story: int) -> list[re.Match]:
    """Removes the matches after the one at `story` that are lines of the story."""
    has_summary = any(match[1] == "Summary" for match in found[:story])
    kept, end = [], len(text)
    for match in reversed(found[story + 1 :]):  # backwards, because whether a line is a field depends on the next one
        may_be_long = match[1] == "Summary" and not has_summary
        if may_be_long or FORMS[match[1]].fullmatch(text, match.end(), end):
            kept.append(match)
            end = match.start()
    return found[: story + 1] + kept[::-1]
