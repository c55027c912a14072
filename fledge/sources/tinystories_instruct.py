"""TinyStories-Instruct (Eldan and Li 2023): stories with the fields they were written from.

A record ends with a line `<|endoftext|>`. Its fields, each starting a line, come in any order and also after the
story; a value begins on the field's line or on one below and runs to the next field or the end of the record:

    Features: Dialogue, BadEnding
    Words: quit, oak, gloomy
    Summary: Sara and Ben were playing in the park, but ...
    Random sentence: They were cold.
    Story:

    Sara and Ben were playing in the park. ...
    <|endoftext|>

A line of the story may begin as a field does ("Words: that was all he had."). After `Story:` such a line is a field
only if it has the form of one. `Features` and `Words` are one line that is no sentence, `Random sentence` is one line;
nothing but another field may follow these three. A further `Story:` stands alone on its line. A `Summary` is one line
if the record has another before its story. Anything else belongs to the story.
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
    """Yields one dictionary a record, field name → value, in the record's order.

    Of a repeated field the first value that is not empty counts; repeated `Features` and `Words` are one list.
    """
    for text in chunk.text.split(END):
        if text.strip():
            yield parse_record("\n" + text)


def parse_record(text: str) -> dict[str, str]:
    """`text` is what stands between two ends, after a line break."""
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
    """Leaves out the matches after the one at `story` that only begin a line of it."""
    has_summary = any(match[1] == "Summary" for match in found[:story])
    kept, end = [], len(text)
    for match in reversed(found[story + 1 :]):  # from the end, where it is known what follows
        may_be_long = match[1] == "Summary" and not has_summary
        if may_be_long or FORMS[match[1]].fullmatch(text, match.end(), end):
            kept.append(match)
            end = match.start()
    return found[: story + 1] + kept[::-1]
