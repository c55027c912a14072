"""A value of a table → text or messages, in the forms that people write; anything else is refused where it stands."""

import ast
import contextlib
import datetime
import decimal
import json
import math

from fledge.errors import UserError

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
# What calls a tool, and what it answers, as ShareGPT's descendants and Llama 3 name them.
TOOL_ROLES = ("function_call", "tool_call", "observation", "function_response", "tool_response", "ipython")
# ShareGPT's names for who speaks, as its many copies write them.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
OTHER_ROLES = {"model": "assistant", "bot": "assistant", "ai": "assistant", "prompter": "user", "developer": "system"}
ALL_ROLES = ROLES | SHAREGPT_ROLES | dict.fromkeys(TOOL_ROLES, "tool") | OTHER_ROLES
UNLEARNED = "unlearned"
# Roles that a conversation to learn from cannot have, with the reason.
UNUSABLE_ROLES = {
    "tool": "a tool speaks in it, which no template writes",
    UNLEARNED: "an answer in it has weight 0, so it is not to be learnt",
}
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's content parts, in its two interfaces


def as_text(value: object, where: str) -> str:
    """Text of a text, a number, a date, nothing (None, NaN), or OpenAI's content parts, without space around it.

    `where` names the file, the row and the column. A whole number stays one if pandas made a float of it, which it
    does as soon as a value of its column is missing. Content parts are joined by line breaks, as vLLM joins them.

    Raises:
        UserError: any other value, or a text with half of a surrogate pair, which no UTF-8 can hold.
    """
    if isinstance(value, str):
        return checked(value, where).strip()
    if is_nothing(value):
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, (int, decimal.Decimal, datetime.date, datetime.time)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(map(_is_text_part, value)):
        return checked("\n".join(part["text"] for part in value), where).strip()
    raise UserError(f"{where} holds {_shown(value)}, which is no text; write the words that are meant.")


def is_nothing(value: object) -> bool:
    """Whether a cell has no value: JSON's null, or NaN, which pandas makes of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_visible(text: str) -> bool:
    """Whether there is anything in it to see: zero-width spaces, marks of byte order and NULs are nothing."""
    return any(character.isprintable() and not character.isspace() for character in text)


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


def checked(text: str, where: str) -> str:
    """Returns `text` if it can be written as UTF-8. `where` is its place, for the message.

    Raises:
        UserError: the text holds half of a surrogate pair, as JSON's `"\\ud83d"` without its other half.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds {text[error.start]!a} at character {error.start + 1}, half of a pair of surrogates, which "
            "is no text; mend or remove it."
        ) from error
    return text


def as_messages(value: object, where: str) -> list[dict[str, str]]:
    """Messages of `role` and `content`, of ShareGPT's `from` and `value`, or a text that holds either.

    The text is JSON, or Python as pandas writes it. A list of texts is UltraChat's: user and assistant in turn.
    Nothing (None, NaN) is no message. Roles become system, user, assistant and tool, which is also whoever calls a
    tool; an assistant's message of weight 0 is `UNLEARNED`.

    Raises:
        UserError: it is none of these.
    """
    if is_nothing(value):
        return []
    messages = value
    if isinstance(value, str):
        messages = _read(value)
    if not isinstance(messages, list):
        raise UserError(f"{where} holds {_shown(value)}, no list of messages with role and content.")
    if all(isinstance(message, str) for message in messages):
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _read(text: str) -> object:
    """What a text of JSON or of Python holds, which pandas writes into a CSV file; None if it is neither."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return None


def _message(message: object, where: str) -> dict[str, str]:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and isinstance(message.get(role), str):
            name = message[role].strip().lower()
            if name not in ALL_ROLES:
                raise UserError(f"{where}: the role {message[role]!r} is unknown; known are {', '.join(ALL_ROLES)}.")
            said = ALL_ROLES[name]
            if message.get("tool_calls") or message.get("function_call"):
                said = "tool"
            elif said == "assistant" and message.get("weight") == 0:  # OpenAI's way to say that it is not to be learnt
                said = UNLEARNED
            return {"role": said, "content": as_text(message.get(content), where)}
    raise UserError(f"{where} holds {_shown(message)}, no message with role and content, or from and value.")


def _shown(value: object) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:59] + "…"
