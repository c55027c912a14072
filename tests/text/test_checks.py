import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.text import checks

STORY = 'Tom had a kite. "Is it red?" asked Mia. The wind blew.'


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("Tom ran", 1),
        ("Tom ran. He fell.", 2),
        ("Tom ran!!! He fell?!", 2),
        ("Mr. Fox met Mrs. Hen. Dr. Owl slept.", 2),
        ("He ran... and fell. He waited...", 2),
        ('"Hi," said Tom.', 1),
        ('"Hi!" said Tom.', 1),
        ('"Why not?" the little old man asked.', 1),
        ('"Hi!" Tom ran home.', 2),
        ('"I am Tom. I am five!" said Tom. He ran.', 2),
        ('Tom said, "Hi. I am Tom." He ran.', 2),
        ('Tom said, "Go!" Then Mia ran and said no.', 2),
        ('"Hi." Tom said, "Bye."', 2),
        ("They came at 3.30 to see it.", 1),
    ],
)
def test_sentences_are_counted_as_a_reader_does(text, count):
    assert len(checks.parts(text)) == count


# Each check with a literal text that keeps it and one that does not, and the share that it gives.
TRUTH = [
    (lambda text: checks.uses(["boat", "brave"], text), "The boats were old. She was braver now.", 1.0),
    (lambda text: checks.uses(["boat", "brave"], text), "The boats were old.", 0.5),
    (lambda text: checks.uses(["boat", "brave"], text), "Boat, brave. Boat! Brave boats.", 0.0),  # a list
    (lambda text: checks.uses(["ice cream"], text), "They ate all the ice cream.", 1.0),
    (lambda text: checks.uses(["boat"], text), "", 0.0),
    (lambda text: checks.avoids("run", text), "Tom went home.", 1.0),
    (lambda text: checks.avoids("run", text), "Tom ran home.", 0.0),
    (lambda text: checks.avoids("run", text), "The runner went home.", 1.0),
    (lambda text: checks.avoids("run", text), "", 0.0),
    (lambda text: checks.has_sentences(2, text), "Tom ran. He fell.", 1.0),
    (lambda text: checks.has_sentences(2, text), "Tom ran. He fell. He cried.", 0.5),
    (lambda text: checks.has_sentences(4, text), "Tom ran. He fell. He cried.", 0.75),
    (lambda text: checks.has_sentences(2, text), "A. B. C. D. E. F.", 0.0),
    (lambda text: checks.has_sentences(2, text), "", 0.0),
    (lambda text: checks.begins("Once there was", text), "Once, there was a fox.", 1.0),
    (lambda text: checks.begins("Once there was", text), "Once there is a fox.", 2 / 3),
    (lambda text: checks.begins("Once there was", text), "Hi. Once there was", 0.0),
    (lambda text: checks.begins("Once there was", text), "Once", 1 / 3),
    (lambda text: checks.ends("The end.", text), "They slept. The end!", 1.0),
    (lambda text: checks.ends("The end.", text), "The end. They slept.", 0.0),
    (lambda text: checks.ends("in the end.", text), "They slept at the end.", 2 / 3),
    (lambda text: checks.has_name("Tom", text), "A boy was called Tom.", 1.0),
    (lambda text: checks.has_name("Tom", text), "It was Tom's big kite.", 1.0),
    (lambda text: checks.has_name("Tom", text), "A tomato fell down.", 0.0),
    (lambda text: checks.has_name("Tom", text), "A boy fell down. Tom.", 0.0),
    (lambda text: checks.has_name("Mr. Fox", text), "There was Mr. Fox.", 1.0),
    (lambda text: checks.has_speakers(2, text), '"Hi," said Tom. "Hi," said Mia.', 1.0),
    (lambda text: checks.has_speakers(2, text), '"Hi," said Tom.', 0.5),
    (lambda text: checks.has_speakers(1, text), '"Hi." Tom ran.', 0.0),
    (lambda text: checks.has_speakers(1, text), "Tom ran.", 0.0),
    (lambda text: checks.asks(True, text), '"Why?" asked Tom.', 1.0),
    (lambda text: checks.asks(True, text), "Tom ran.", 0.0),
    (lambda text: checks.asks(True, text), "? Tom ran.", 0.0),
    (lambda text: checks.asks(False, text), "Tom ran.", 1.0),
    (lambda text: checks.asks(False, text), "Did Tom run?", 0.0),
    (lambda text: checks.asks(False, text), "", 0.0),
    (lambda text: checks.quotes(True, text), '"Hi," said Tom.', 1.0),
    (lambda text: checks.quotes(True, text), 'Tom saw a "boat".', 0.0),
    (lambda text: checks.quotes(True, text), "Tom said hello.", 0.0),
    (lambda text: checks.quotes(True, text), 'Tom said "".', 0.0),
    (lambda text: checks.quotes(False, text), "Tom said hello.", 1.0),
    (lambda text: checks.quotes(False, text), '"Hi," said Tom.', 0.0),
    (lambda text: checks.quotes(False, text), "", 0.0),
    (lambda text: checks.is_titled("The Kite", text), "The Kite\n\nTom ran.", 1.0),
    (lambda text: checks.is_titled("The Kite", text), '**"The Kite"**\nTom ran.', 1.0),
    (lambda text: checks.is_titled("The Kite", text), "The Boat\n\nTom ran.", 0.0),
    (lambda text: checks.is_titled("The Kite", text), "The Kite.\n\nTom ran.", 0.0),
    (lambda text: checks.is_titled("The Kite", text), "The Kite", 0.0),
    (lambda text: checks.is_titled("", text), "The Kite\n\nTom had a kite.", 1.0),
    (lambda text: checks.is_titled("", text), "The Kite\n\nTom ran.", 0.0),
    (lambda text: checks.is_titled("", text), "Tom had a kite that was as big as him\nand red, a kite", 0.0),
    (lambda text: checks.is_at_most(3, text), "Tom ran home.", 1.0),
    (lambda text: checks.is_at_most(3, text), "Tom ran home to his mom.", 0.5),
    (lambda text: checks.is_at_most(3, text), "", 0.0),
    (lambda text: checks.is_at_least(4, text), "Tom ran home fast.", 1.0),
    (lambda text: checks.is_at_least(4, text), "Tom ran.", 0.5),
    (lambda text: checks.ends_in_rhyme(text), "They ran all day. Then they went away.", 1.0),
    (lambda text: checks.ends_in_rhyme(text), "They ran all day\nThen they went away", 1.0),
    (lambda text: checks.ends_in_rhyme(text), "They ran all day. Then they went home.", 0.0),
    (lambda text: checks.ends_in_rhyme(text), "They ran all day. It was a day.", 0.0),
    (lambda text: checks.ends_in_rhyme(text), "They ran all day, and went away.", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("check", "text", "share"), TRUTH, ids=[f"{number}" for number in range(len(TRUTH))])
def test_a_check_gives_its_share(check, text, share):
    assert check(text) == pytest.approx(share)


def typographic(text: str) -> str:
    """Every second double quote closes; a single one is an apostrophe."""
    marks = iter("“”" * text.count('"'))
    return re.sub('"', lambda _: next(marks), text).replace("'", "’")


SPELLINGS = [str.upper, str.lower, typographic, lambda text: re.sub(" ", "  ", text), lambda text: f" {text}\n"]
SPELLINGS += [lambda text: re.sub("\n+", "\n\n \n", text)]
TEXTS = st.lists(
    st.sampled_from(
        [
            "Tom",
            "said",
            "the",
            "boat",
            "brave",
            "day",
            "away",
            '"',
            "'s",
            ",",
            ".",
            "!",
            "?",
            "...",
            "Mr.",
            "\n",
            "kite",
        ]
    ),
    max_size=30,
).map(" ".join)


@given(TEXTS)
def test_case_quotes_and_spacing_do_not_count(text):
    for check, literal, _ in TRUTH:
        for each in (text, literal):
            share = check(each)
            assert 0 <= share <= 1
            for spell in SPELLINGS:
                assert check(spell(each)) == share, (spell(each), share)


@given(TEXTS, st.sampled_from([" ", "\n", "  \n "]))
def test_white_space_of_any_kind_counts_only_for_titles_and_rhymes(text, space):
    plain = " ".join(text.split())
    assert checks.parts(plain.replace(" ", space)) == checks.parts(plain)
    assert checks.quotes(True, plain.replace(" ", space)) == checks.quotes(True, plain)


@pytest.mark.parametrize(
    ("text", "is_story"),
    [
        ("Tom had a kite. It was red. He lost it.", True),
        ("", False),
        ("Tom had a kite.", False),
        ("Boat. Brave. Laugh. Kite.", False),
        ("It was too late. It was too late. It was too late. It was too late.", False),
        ("Tom had a kite. It was red. He lost it. No. No. No. No.", False),
        ("Write a short story.\nUse these words: boat, brave\nAsk a question in it.", False),
        ("Write a short story. Tom had a kite. It was red. He lost it.", False),
        ("Tom had a red kite in the park. A wind took it away. Use these words: boat, brave", True),
    ],
)
def test_a_list_a_copy_and_a_repetition_are_no_story(text, is_story):
    prompt = "Write a short story.\nUse these words: boat, brave\nBegin with: Tom had a kite.\nAsk a question in it."
    assert checks.tells(text, prompt) is is_story


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("The boat was brave.", 2 / 3),  # two words a sentence at most
        ("The boat had a brave red kite.", 2 / 3),
        ("The boat was old. Tom was brave. He had a kite.", 1),
        ("The boat was old. A boat was brave. The boat had a kite.", 1),  # whichever sentence has to count for which
        ("Think of a red boat today.", 0),  # four words in a row from the prompt
        ("Think of a blue boat today.", 1 / 3),
        ("", 0),
    ],
)
def test_words_count_apart_from_one_another_and_from_the_prompt(text, share):
    prompt = "Tell me of a red boat that sails."
    assert checks.uses_apart(["boat", "brave", "kite"], text, prompt) == pytest.approx(share)
