"""Normalises texts: straight quotation marks and single spaces."""

MARKS = str.maketrans(dict.fromkeys("“”„«»", '"') | dict.fromkeys("‘’", "'") | {"…": "..."})


def straight(text: str) -> str:
    """Straight quotes and single spaces.

    >>> straight(" “Hi…” \\n  she  said. ")
    '"Hi..." she said.'
    """
    return " ".join(text.translate(MARKS).split())
