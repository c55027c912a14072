"""What a user and a model say to each other. Nothing heavy is imported here, so every room may import it."""

from dataclasses import dataclass

Messages = list[dict[str, str]]  # each with `role` (system, user or assistant) and `content`

# An instruction that comes with a text to work on is one message: f"{instruction}{INPUT_MARK}{input}". The template
# `alpaca` writes the mark as it stands, the others write a line break for it.
INPUT_MARK = "\n\n### Input:\n"


@dataclass
class Answer:
    """What a model wrote: its text, how many tokens that took, and whether the model ended it.

    `stopped` is true when the answer ended with the end-of-text token, and false when it ran into a limit. The
    end-of-text token is among the `tokens`.
    """

    text: str
    tokens: int
    stopped: bool
