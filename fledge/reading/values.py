"""A value of a table → text or messages, in all usual forms. Other values are refused by row and column."""

import ast
import contextlib
import datetime
import decimal
import json
import math

from fledge.errors import UserError

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
# Roles of tool calls and tool answers in ShareGPT's descendants and in Llama 3.
TOOL_ROLES = ("function_call", "tool_call", "observation", "function_response", "tool_response", "ipython")
# The roles of ShareGPT and its copies.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
OTHER_ROLES = {"model": "assistant", "bot": "assistant", "ai": "assistant", "prompter": "user", "developer": "system"}
ALL_ROLES = ROLES | SHAREGPT_ROLES | dict.fromkeys(TOOL_ROLES, "tool") | OTHER_ROLES
UNLEARNED = "unlearned"
# Roles that training data cannot have, with the reason.
UNUSABLE_ROLES = {
    "tool": "a tool speaks in it, which no template writes",
    UNLEARNED: "an answer in it has weight 0, so it is not to be learnt",
}
NOT_IN_TURN = "its messages are not questions and answers in turn"
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's content parts, in its two interfaces


def as_text(value: object, where: str) -> str:
    """The text of a string, a number, a date, an empty value (None, NaN) or OpenAI's content parts, stripped.

    `where` names the file, the row and the column, for messages. A whole number is written as one even if pandas made
    it a float, which pandas does if a value of the column is missing. Content parts are joined by line breaks, as in
    vLLM.

    Raises:
        UserError: any other value, or a string with an unpaired surrogate, which UTF-8 cannot encode.
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
    """Whether a cell is empty: JSON's null, or NaN, which pandas makes of null."""
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
    """Messages from a list of `role` and `content`, a list of ShareGPT's `from` and `value`, or a string of either.

    The string is JSON, or Python as pandas writes it. A list of strings is UltraChat's form: user and assistant in
    turn. An empty value (None, NaN) gives no messages. Roles become system, user, assistant and tool, which includes
    tool calls; an assistant's message of weight 0 gets the role `UNLEARNED`.

    Raises:
        UserError: it has none of these forms.
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


def why_unusable(messages: list[dict[str, str]]) -> str | None:
    """The reason why a conversation cannot be learnt from; `None` if it can.

    A system message may come first. Then questions and answers take turns, and the last is an answer.
    """
    roles = [message["role"] for message in messages]
    for role, why in UNUSABLE_ROLES.items():
        if role in roles:
            return why
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in turns:
        return "a system message stands after another message"
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        return NOT_IN_TURN
    if not all(is_visible(message["content"]) for message in messages if message["role"] != "system"):
        return "a question or an answer is empty"
    return None


def _read(text: str) -> object:
    """The value of a string of JSON, or of Python, which pandas writes into CSV files; `None` if it is neither."""
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
            # OpenAI marks answers that must not be learned by the weight 0.
            elif said == "assistant" and message.get("weight") == 0:
                said = UNLEARNED
            return {"role": said, "content": as_text(message.get(content), where)}
    raise UserError(f"{where} holds {_shown(message)}, no message with role and content, or from and value.")


def _shown(value: object) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:59] + "…"
