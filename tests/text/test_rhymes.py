import pytest

from fledge.text.rhymes import rhymes


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("day", "away", True),
        ("tree", "me", True),
        ("blue", "shoe", True),
        ("bear", "there", True),
        ("said", "bed", True),
        ("flower", "power", True),
        ("weather", "together", True),
        ("light", "night", True),
        ("again", "rain", True),
        ("again", "men", True),
        ("you", "too", True),
        ("love", "move", False),  # alike to the eye only
        ("home", "some", False),
        ("sun", "sing", False),
        ("strong", "wrong", True),
        ("happily", "family", False),
        ("two", "too", False),  # one sound is no rhyme
        ("sea", "see", False),
        ("write", "right", False),
        ("stand", "understand", False),  # the stressed syllable is the same
        ("moon", "afternoon", True),
        ("day", "day", False),
        ("day", "zorble", False),
        ("zorble", "zorble", False),
    ],
)
def test_words_rhyme_by_sound(one, other, expected):
    assert rhymes(one, other) is expected
    assert rhymes(other, one) is expected
    assert rhymes(one.upper(), other.title()) is expected
