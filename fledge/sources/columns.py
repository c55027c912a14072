"""Any table with columns that the user names, or with conversations: JSON, JSON lines, CSV, parquet, Hub.

--source columns --data records.csv --columns instruction=question,input=passage,response=answer
--source columns --data chats.jsonl --columns messages=conversation
"""

from collections.abc import Iterator

from fledge.errors import UserError
from fledge.reading.files import Chunk
from fledge.reading.values import as_messages, as_text

LICENSE = None
END = None
NEEDED = {"instruction", "response"}
OPTIONAL = ("input", "category", "group")


def parse_columns(text: str) -> dict[str, str]:
    """`instruction=question,response=answer` → a dictionary from field to column.

    Raises:
        UserError: the text has another form, or names neither `messages` nor both `instruction` and `response`.
    """
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    columns = {pair[0].strip(): pair[1].strip() if pair[1:] else "" for pair in pairs}
    unknown = set(columns) - {*NEEDED, *OPTIONAL, "messages"}
    if unknown or not all(columns.values()) or not (set(columns) >= NEEDED or "messages" in columns):
        raise UserError(
            f"--columns {text or 'is missing: it'} does not name what a record needs; give instruction=COLUMN,response="
            f"COLUMN (and {', '.join(OPTIONAL)} where there are such columns), or messages=COLUMN."
        )
    return columns


def parse(chunk: Chunk, columns: dict[str, str]) -> Iterator[dict]:
    """Records with `instruction`, `input` and `output`, or with `messages`; `category` and `group` if named.

    A row of JSON may leave out a column that has no value.

    Raises:
        UserError: no row at the beginning of a table has a column that was named, or a value is neither text nor
            messages.
    """
    for column in columns.values() if chunk.first_row == 1 else ():
        if not any(column in row for row in chunk.rows):
            raise UserError(f"{chunk.origin} has no column {column}; it has {', '.join(map(str, chunk.rows[0]))}.")
    for number, row in enumerate(chunk.rows, chunk.first_row):
        record = {}
        for name, column in columns.items():
            read = as_messages if name == "messages" else as_text
            value = read(row.get(column), f"{chunk.origin}, row {number}, column {column}")
            record["output" if name == "response" else name] = value
        yield record


def parse_form(chunk: Chunk, forms: tuple[dict[str, str], ...]) -> Iterator[dict]:
    """The records of a table in one of `forms`: the first form whose columns the rows have.

    Raises:
        UserError: the table has none of these forms.
    """
    found = {column for row in chunk.rows for column in row}
    for form in forms:
        if set(form.values()) <= found:
            return parse(chunk, form)
    raise UserError(
        f"{chunk.origin} has not the columns {', '.join(min(forms, key=len).values())}; it has "
        f"{', '.join(map(str, chunk.rows[0]))}. "
        "Name them: --source columns --columns instruction=COLUMN,response=COLUMN."
    )
