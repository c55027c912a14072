import pytest

from fledge.judges.topic import heads, judge_topic, opposites

STORY = (
    "Once upon a time, there was a little dog named Spot. Spot lived in a red house with two cats. One day, Spot found "
    "a big bone in the garden. His mom told him to come inside. He was happy and slept well."
)
TOPIC = "A little dog named Spot. One day, Spot found a big bone in the garden."


@pytest.mark.parametrize(
    ("topic", "old", "new", "reason"),
    [
        (TOPIC, "dog named Spot", "cat named Spot", "dog Spot became cat Spot"),
        (TOPIC, "Spot", "Rex", "Spot became Rex"),
        (TOPIC, "bone", "stone", "bone became stone"),
        (TOPIC, "the garden", "the kitchen", "garden became kitchen"),
        ("A dog named Spot. He lived in a house with two cats.", "two cats", "three cats", "two cats became three"),
        ("A dog named Spot. His mom told him to come inside.", "come inside", "go outside", "come became go"),
        ("A dog named Spot. His mom told him to come inside.", "mom told", "mom never told", "tell became not tell"),
    ],
)
def test_what_took_the_place_of_the_topic_is_named(topic, old, new, reason):
    assert judge_topic(topic, STORY).label == "about"

    verdict = judge_topic(topic, STORY.replace(old, new))
    assert (verdict.label, verdict.reason) == ("contradicts", reason)
    assert verdict.score < 0.5


@pytest.mark.parametrize(
    ("old", "new"), [("dog named", "puppy named"), ("found", "was finding"), ("big bone", "big, white bone"), ("", "")]
)
def test_other_words_for_the_same_are_no_contradiction(old, new):
    verdict = judge_topic(TOPIC, STORY.replace(old, new))

    assert (verdict.label, verdict.score) == ("about", 1.0)


@pytest.mark.parametrize("story", ["", "A frog sat in the mud. It was a sunny day and the frog sang."])
def test_another_story_is_not_about_the_topic(story):
    verdict = judge_topic(TOPIC, story)

    assert (verdict.label, verdict.score < 0.5) == ("not", True)
    assert "spot" in verdict.reason


def test_a_topic_without_content_is_always_met():
    assert judge_topic("What she had.", "A frog sat.").score == 1


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("She found a big, juicy radish in the garden.", ["radish", "garden"]),
        ("Lily's mom gave her a red toy car for lunch.", ["car", "lunch"]),
        ("The bird saw three little fish.", ["bird", "fish"]),
    ],
)
def test_the_heads_of_noun_phrases(text, nouns):
    assert heads(text) == nouns


def test_opposites_hold_both_ways():
    assert all(word in opposites()[other] for word, others in opposites().items() for other in others)


def test_the_judge_agrees_with_readers(yardsticks):
    """Measured: 95.0% of 400, of which 361 are about their topic; 26 of 39 others are found."""
    found = [judge_topic(row["topic"], row["story"]).label for row in yardsticks]
    said = [row["agreed"]["topic"] for row in yardsticks]
    agreed = [one == other for one, other in zip(found, said, strict=True)]
    strayed = [one != "about" for one, other in zip(found, said, strict=True) if other != "about"]

    assert sum(agreed) / len(agreed) > 0.94
    assert sum(strayed) / len(strayed) > 0.65


@pytest.mark.parametrize(
    ("topic", "story"),
    [
        (
            "Lily steals a bike from a store and has an accident while riding it, losing her parents' trust and love.",
            "Lily saw a new bike in the store. She took the bike without paying and rode away. She fell and crashed "
            "into a wall. Her mom and dad came. She had lost their trust and love. Lily was very sorry.",
        ),
        (
            "Tom and Anna go on a holiday with their parents, and fly on a big plane to a place with sun and sand.",
            "Tom and Anna are going on a holiday. They packed a lot of toys. Their mum and dad took them to the big "
            "plane. They flew to a place with a lot of sun. They played in the sand all day.",
        ),
    ],
)
def test_a_summary_in_other_words_is_no_contradiction(topic, story):
    assert judge_topic(topic, story).label == "about"
