"""The error for a user's mistake. This module imports nothing, so all others can import it."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence: what was found, what was expected, what to do."""
