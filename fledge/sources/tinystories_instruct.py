"""TinyStories-Instruct (Eldan and Li 2023): stories with the fields they were written from.

A record ends with a line `<|endoftext|>`. Its fields, each starting a line, come in any order and also after the
story; a value runs to the next field or the end of the record:

    Features: Dialogue, BadEnding
    Words: quit, oak, gloomy
    Summary: Sara and Ben were playing in the park, but ...
    Random sentence: They were cold.
    Story:

    Sara and Ben were playing in the park. ...
    <|endoftext|>
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fledge.cli import UserError

END = "<|endoftext|>"
FIELD = re.compile(r"^(Features|Words|Summary|Random sentence|Story):[ \t]*", re.MULTILINE)


def records(file: str) -> Iterator[dict[str, str]]:
    """Yields one dictionary a record, field name → value, in the file's order. A repeated field keeps its first value.

    Raises:
        UserError: the file is missing, empty, or not UTF-8.
    """
    for text in _read(Path(file)).split(END):
        if text.strip():
            parts = FIELD.split(text)
            record = {}
            for name, value in zip(parts[1::2], parts[2::2], strict=True):
                record.setdefault(name, value.strip())
            yield record


def _read(file: Path) -> str:
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise UserError(f"There is no data file at {file}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if not text.strip():
        raise UserError(f"{file} is empty.")
    return text
