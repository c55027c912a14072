"""What goes wrong on a user's side. The lowest room of all: it imports nothing."""


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence: what was found, what was expected, what to do."""
