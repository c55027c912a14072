import pytest

from fledge.text.words import as_written, content_words, in_order, is_run, used


@pytest.mark.parametrize(
    ("requested", "text"),
    [
        ("run", "They run."),
        ("run", "He ran home."),
        ("run", "She was running."),
        ("run", "A dog runs."),
        ("ran", "They like to run."),
        ("running", "He ran."),
        ("happy", "She was happier than he."),
        ("happy", "It was the happiest day."),
        ("happiest", "They were happy."),
        ("big", "a bigger one"),
        ("good", "It is the best."),
        ("bad", "It got worse."),
        ("quit", "He was quitting."),
        ("quit", "She quits."),
        ("begin", "It had begun."),
        ("go", "They went away."),
        ("be", "There was a cat."),
        ("fly", "It flew and had flown."),
        ("eat", "The apple was eaten."),
        ("wrapped", "She wraps it up."),
        ("carry", "He carries it."),
        ("lie", "It is lying there."),
        ("die", "It died."),
        ("panic", "They panicked."),
        ("see", "He saw her."),
        ("travel", "They travelled far."),
        ("travel", "They traveled far."),
        ("child", "Two children played."),
        ("mouse", "Three mice ran."),
        ("foot", "His feet hurt."),
        ("leaf", "The leaves fell."),
        ("wolf", "Wolves howl."),
        ("person", "Many people came."),
        ("box", "two boxes"),
        ("tomato", "red tomatoes"),
        ("stomach", "their stomachs"),
        ("cry", "She cried and cries."),
        ("Truck", "the TRUCK"),
        ("mom", "her mom’s hat"),
        ("ice cream", "an ice-cream"),
        ("ice cream", "two ice creams"),
        ("ice-cream", "some ice cream"),
        ("don't", "Don’t go!"),
    ],
)
def test_an_inflection_counts_as_used(requested, text):
    assert used([requested], text) == [True]


@pytest.mark.parametrize(
    ("requested", "text"),
    [
        ("run", "The runner won."),
        ("run", "It rained."),
        ("happy", "Great happiness."),
        ("happy", "They lived happily."),
        ("happy", "He was unhappy."),
        ("teach", "The teacher came."),
        ("quick", "She quickly left."),
        ("play", "a playful cat"),
        ("friend", "a friendly dog"),
        ("friend", "their friendship"),
        ("care", "Be careful."),
        ("car", "They care."),
        ("hop", "They hope."),
        ("hop", "He was hoping."),
        ("plan", "a plane"),
        ("new", "the news"),
        ("bus", "a busy day"),
        ("see", "a seed"),
        ("we", "a wing"),
        ("cat", "The caterpillar ate."),
        ("ice cream", "cream on ice"),
        ("ice cream", "ice, and then more cream"),
        ("run", ""),
        ("!", "What!"),
    ],
)
def test_a_derivation_or_another_word_does_not(requested, text):
    assert used([requested], text) == [False]


def test_each_word_has_its_own_answer():
    assert used(["dog", "sing", "moon"], "The dogs sang.") == [True, True, False]
    assert used([], "The dogs sang.") == []


def test_words_as_they_are_written():
    assert as_written("Don’t stop, Zoë! It's 3 o'clock.") == ["don't", "stop", "zoë", "it's", "3", "o'clock"]


def test_words_of_a_text_in_order():
    assert in_order("“Tom’s dog,” she said: don't!") == ["tom", "dog", "she", "said", "don't"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The red ball", {"red", "ball"}),
        ("She was very, very HAPPY!", {"happy"}),
        ("dogs dog Dog", {"dog"}),
        ("boxes box", {"box"}),
        ("jumped jumping jumps jump", {"jump"}),
        ("bus red sing", {"bus", "red", "sing"}),
        ("Lily's ball", {"lily", "ball"}),
        ("'sad,' she said", {"sad", "said"}),
        ("a café", {"café"}),
        ("and then they were", set()),
        ("", set()),
    ],
)
def test_content_words(text, words):
    assert content_words(text) == words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cake", "cakes"),
        ("horse", "horses"),
        ("smile", "smiled"),
        ("tree", "trees"),
        ("toy", "toys"),
        ("Lily’s dog", "Lily's dog"),
    ],
)
def test_plural_past_and_apostrophe_make_no_other_word(one, other):
    assert content_words(one) == content_words(other)


@pytest.mark.parametrize(
    ("words", "text", "stands"),
    [
        ("The cat sat.", "Then the CAT sat down.", True),
        ("Tom's cat", "It was Tom’s cat.", True),
        ("cat down", "The cat sat down.", False),
        ("sat cat", "The cat sat.", False),
        ("cat", "The cats sat.", False),
        ("The cat sat.", "The cat", False),
    ],
)
def test_a_run_of_words_stands_in_a_text_in_one_piece(words, text, stands):
    assert is_run(words, text) is stands
