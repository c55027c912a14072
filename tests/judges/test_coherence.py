import random
import re

import numpy as np
import pytest

from fledge.errors import UserError
from fledge.judges.coherence import FEATURES, CoherenceJudge, content, first_mentions, tokens
from fledge.judges.corruption import ALL, TESTED, Corrupter, verb_form
from fledge.judges.ngrams import WordModel


@pytest.mark.parametrize(
    ("kind", "least"),
    [("shuffled", 0.95), ("name", 0.9), ("foreign", 0.75), ("verb", 0.75), ("repeated", 0.95), ("cut", 0.95)],
)
def test_a_story_is_told_from_itself_broken(coherence, tales, kind, least):
    whole = tales[:100]
    corrupter = Corrupter(whole, random.Random(0))
    pairs = [(story, getattr(corrupter, kind)(story)) for story in whole]
    pairs = [pair for pair in pairs if pair[1] is not None]
    first, second = (coherence.score(list(side)) for side in zip(*pairs, strict=True))

    assert len(pairs) > 60
    assert np.mean(first > second) >= least


def test_a_new_story_lies_evenly_among_the_ones_that_set_the_scale(coherence, tales):
    found = coherence.judge(tales[:100])

    assert 0.35 < found.mean() < 0.65
    assert (found < 0.05).mean() < 0.15


def test_readers_and_the_judge_agree_a_little(coherence, yardsticks):
    """Spearman's correlation is 0.24 over all stories: far from a reader, but not by chance (p < 1e-5)."""
    from scipy.stats import spearmanr

    said = [row["agreed"]["coherence"] for row in yardsticks]

    assert spearmanr(coherence.score([row["story"] for row in yardsticks]), said)[0] > 0.15


def test_the_judge_measures_itself_on_other_stories(coherence, tales):
    measured = coherence.measure(tales[:30])

    assert list(measured) == list(TESTED)
    assert all(0 <= value <= 1 for value in measured.values())


def test_few_stories_are_enough_to_begin(tales):
    judge = CoherenceJudge(tales[:2])

    assert judge.judge(["", tales[0], "one"]).shape == (3,)
    assert np.isfinite(judge.score(["", tales[0], "one"])).all()


def test_without_stories_there_is_nothing_to_learn_from():
    with pytest.raises(UserError, match="training split is empty"):
        CoherenceJudge([])


@pytest.mark.parametrize("kind", ALL)
def test_what_cannot_be_broken_is_left_out(kind):
    corrupter = Corrupter(["", "One two."], random.Random(0))

    assert getattr(corrupter, kind)("") is None


def test_a_swapped_name_is_one_of_the_other_stories():
    corrupter = Corrupter(["One day Tom met Sue.", "She saw Ben."], random.Random(0))

    broken = corrupter.name("Once a boy named Tim ran. Then Tim sat. So Tim slept.")
    assert broken.startswith("Once a boy named Tim ran.")
    assert any(name in broken for name in ("Tom", "Sue", "Ben"))


def test_a_name_changes_from_the_middle_of_its_mentions_on():
    corrupter = Corrupter(["One day Sue met Sue."], random.Random(0))
    story = "Once a boy named Tim ran. " + "Then Tim sat. " * 5
    assert re.findall("Tim|Sue", corrupter.name(story)) == ["Tim"] * 3 + ["Sue"] * 3


@pytest.mark.parametrize("story", ["One dog ran.", "One dog ran. Two sat.", "A cat ran. It sat. It ate. It slept."])
@pytest.mark.parametrize("other", ["Sue sang.", "Sue sang. Tom sang.", "Sue sang. Tom sang. Max sang."])
def test_only_a_sentence_from_inside_a_story_becomes_a_foreign_one(story, other):
    broken = Corrupter([other], random.Random(0)).foreign(story)
    if story.count(".") < 3 or other.count(".") < 3:
        assert broken is None
    else:
        assert broken in ("A cat ran. Tom sang. It ate. It slept.", "A cat ran. It sat. Tom sang. It slept.")


def test_a_pronoun_that_fits_nobody_is_counted():
    told = ["Once Tom ran. He sat. He ate. He slept.", "Once Sue ran. She sat. She ate. She slept."] * 4
    judge, at = CoherenceJudge(told), FEATURES.index("gender")
    stories = {
        "Then Tom ran. He slept.": 0,
        "Then Tom ran. She sat. She slept.": 2,
        "Then Sue ran. He slept.": 1,
        "Then Sue met Tom. He ran. She slept.": 0,
        "Then Tom met a girl. She ran.": 0,
        'Then Tom ran. "She is here," he said.': 0,
    }
    assert judge.features(list(stories))[:, at].tolist() == list(stories.values())


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("went", "past"),
        ("barked", "past"),
        ("going", "ing"),
        ("dog", None),
        ("want", None),
        ("had", None),
        ("did", None),
    ],
)
def test_forms_of_verbs(word, form):
    assert verb_form(word) == form


def test_the_word_model_is_a_distribution():
    """The probabilities of all known words after a context, and of an unknown one, sum to one."""
    model = WordModel([tokens("the dog ran. the dog sat. the cat ran.")] * 2 + [["once"]])
    words = [*model.number, "never"]
    bits = model.surprise([["the", "dog", word] for word in words])

    assert sum(2.0 ** -float(part[2]) for part in bits) == pytest.approx(1)
    assert min(words, key=lambda word: float(bits[words.index(word)][2])) in ("ran", "sat")


def test_first_mentions_and_content():
    assert first_mentions("He saw a dog. The dog bit the man.") == {"dog": False, "man": True}
    assert content("The dogs were barking at Lily's bunny.") == ["dog", "bark", "lil", "bunn"]
