import pytest

from fledge.text.limits import limits_met, refused


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I can’t do this.", True),
        ("I cannot answer that question.", True),
        ("Sorry. I won't write that.", True),
        ("I am unable to say.", True),
        ("I'd rather not.", True),
        ("That is not something I can help with.", True),
        ("As an AI, I do not have experiences of my own.", True),
        ("I must decline.", True),
        ("I simply cannot in good conscience recommend it.", True),
        ("I will not succeed.", False),
        ("Since it is raining, I cannot go to the park.", False),
        ("I can't believe you gave me an answer!", False),
        ("I'm sorry, but I'm unable to come into work today.", False),
        ('Put an exclamation mark: "Oh, I cannot help you!"', False),
        ("He said: 'I won't answer.' Then he left.", False),
        ("I can't say enough about this book.", False),
        ("I can't tell you how happy I am.", False),
        ("I can't help but smile.", False),
        ("As an AI, I do not taste, but I can suggest a pie.", False),
        ("I can't wait to tell you!", False),
        ("I'm sorry to hear that. Drink some tea.", False),
        ("You can't park there.", False),
        ("Lisbon.", False),
        ("One. I can't help you.", True),
        ("One. Two. I can't help you.", False),
        ("", False),
    ],
)
def test_refusals(text, refuses):
    assert refused(text) == refuses


@pytest.mark.parametrize(
    ("asked", "text", "met"),
    [
        ("Answer in one sentence.", "It rained.", True),
        ("Answer in one sentence.", "It rained. It snowed.", False),
        ("Answer in two sentences.", "It rained. It snowed.", True),
        ("Say it in at most 3 words.", "a b c", True),
        ("Say it in at most 3 words.", "a b c d", False),
        ("Say it with 5 words", "a b", True),
        ("Describe it in exactly four words.", "a b c", False),
        ("Answer with one word.", "two words", False),
        ("In under 3 sentences, tell it.", "A. B. C.", False),
        ("Say it in at least three words.", "a b", False),
        ("Say it in three words or more.", "a b c d", True),
        ("Describe it in 4 words or less.", "a b c d", True),
        ("Describe it in three sentences or fewer.", "A.", True),
        ("Write a story of less than 3 words.", "a b c", False),
        ("Write no more than three words.", "a b c", True),
        ("Keep it to a maximum of 3 words.", "a b c d", False),
        ("Describe it. It should not be longer than 2 words.", "a b c", False),
        ("Shorten the text to one sentence.", "It rained. It snowed.", False),
        ("List it in three words.", "1. a\n2. b\n3. c", True),
        ("Generate a series of 8 words that describe running.", "anything", None),
        ("Think of two words that mean the same thing.", "anything", None),
        ("Write four articles with a minimum of 300 words each.", "anything", None),
        ("Describe each of them in one sentence.", "A. B. C.", None),
        ("Write a post of 50 words about puppies.", "anything", None),
        ("Write a poem with two words that rhyme.", "anything", None),
        ("Do not answer in one word.", "two words", None),
        ('Translate: "Say it in one word."', "two words", None),
        ("Say it in two or three sentences.", "A. B. C.", None),
        ("Sum it up in 3-5 sentences.", "A. B. C.", None),
        ("Find the noun in one sentence of the text.", "a noun", None),
        ("Write one-word answers in two sentence-like lines.", "a b c", None),
        ("Tell me about words.", "anything", None),
        ("Define the two words.", "anything", None),
    ],
)
def test_stated_limits(asked, text, met):
    assert limits_met(asked, text) is met


@pytest.mark.parametrize(
    ("limit", "met"),
    [
        ("fewer than 3 words", [1, 2]),
        ("at most 3 sentences", [1, 2, 3]),
        ("3 words or less", [1, 2, 3]),
        ("exactly 3 words", [3]),
        ("at least 3 sentences", [3, 4, 5]),
        ("3 words or more", [3, 4, 5]),
        ("more than 3 words", [4, 5]),
        ("3 words", [1, 2, 3]),
        ("3 sentences", [3]),
        ("1 word", [1]),
    ],
)
def test_a_limit_is_met_by_these_numbers_only(limit, met):
    assert [count for count in range(6) if limits_met(f"Say it in {limit}.", "So. " * count)] == met
