"""Any table whose columns are named by the user, or that holds conversations: JSON, JSON lines, CSV, parquet, Hub.

--source columns --data records.csv --columns instruction=question,input=passage,response=answer
--source columns --data chats.jsonl --columns messages=conversation
"""

from collections.abc import Iterator

from fledge.cli import UserError
from fledge.sources.reading import Chunk

LICENSE = None
END = None
NEEDED = {"instruction", "response"}
OPTIONAL = ("input", "category", "group")
ROLES = ("system", "user", "assistant")


def parse_columns(text: str) -> dict[str, str]:
    """`instruction=question,response=answer` → what a record needs → the column that holds it.

    Raises:
        UserError: not of this form, or neither `messages` nor both `instruction` and `response` are named.
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
    """Records of `instruction`, `input`, `output`, or of `messages`; `category` and `group` where they are named.

    Raises:
        UserError: a row lacks a column that was named, or its messages are not messages.
    """
    for row in chunk.content:
        for column in columns.values():
            if column not in row:
                raise UserError(f"{chunk.origin} has no column {column}; it has {', '.join(map(str, row))}.")
        record = {("output" if name == "response" else name): row[column] for name, column in columns.items()}
        if "messages" in record:
            record["messages"] = _messages(chunk.origin, record["messages"])
        yield {name: value if name == "messages" else as_text(value) for name, value in record.items()}


def parse_form(chunk: Chunk, forms: tuple[dict[str, str], ...]) -> Iterator[dict]:
    """The records of a table that is known to have one of `forms`; the first row tells which.

    Raises:
        UserError: it has none of them.
    """
    row = chunk.content[0]
    for form in forms:
        if set(form.values()) <= set(row):
            return parse(chunk, form)
    raise UserError(
        f"{chunk.origin} has not the columns {', '.join(forms[0].values())}; it has {', '.join(map(str, row))}. "
        "Name them: --source columns --columns instruction=COLUMN,response=COLUMN."
    )


def _messages(origin: str, messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise UserError(f"{origin} holds {str(messages)[:60]}, no list of messages with role and content.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{origin}: {str(message)[:60]!r} is no message with a role of {', '.join(ROLES)}.")
    return [{"role": message["role"], "content": as_text(message.get("content"))} for message in messages]


def as_text(value: object) -> str:
    return "" if value is None else str(value).strip()
