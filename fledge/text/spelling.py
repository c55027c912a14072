"""One spelling for texts that differ in nothing that counts: quotes become straight, white space one space."""

MARKS = str.maketrans(dict.fromkeys("“”„«»", '"') | dict.fromkeys("‘’", "'") | {"…": "..."})


def straight(text: str) -> str:
    """Straight quotes and single spaces.

    >>> straight(" “Hi…” \\n  she  said. ")
    '"Hi..." she said.'
    """
    return " ".join(text.translate(MARKS).split())
