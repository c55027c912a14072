"""Messages and answers. Nothing heavy is imported here, so that all modules can import it."""

from dataclasses import dataclass

Messages = list[dict[str, str]]  # each with `role` (system, user or assistant) and `content`

# An instruction with a text to work on is one message: f"{instruction}{INPUT_MARK}{input}". The template `alpaca` keeps
# the mark; the others replace it with a line break.
INPUT_MARK = "\n\n### Input:\n"


@dataclass
class Answer:
    """The answer of a model: its text, its number of tokens, and whether the model ended it.

    `stopped` is true if the answer ended with the end-of-text token, and false if it ran into a limit. `tokens`
    includes the end-of-text token.
    """

    text: str
    tokens: int
    stopped: bool
