import gzip
import json

import pytest
from conftest import ROOT

from fledge.sources.tinystories_instruct import END, parse_record
from fledge.text.stories import ends_happily, happenings, main_character, moral, sentences, speaks


def test_the_main_character_is_right_in_95_of_100_stories():
    """The sheet names 200 of the shipped stories by number and who, to a reader, each is about."""
    text = gzip.decompress((ROOT / "examples" / "tales.txt.gz").read_bytes()).decode()
    stories = [parse_record(f"\n{record.strip()}")["Story"] for record in text.split(END) if record.strip()]
    sheet = (ROOT / "tests" / "text" / "main_characters.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in sheet]
    assert len({row["record"] for row in rows}) == 200
    assert all(" ".join(stories[row["record"]].split()).startswith(row["begins"]) for row in rows)

    found = [(main_character(stories[row["record"]]), row["main_character"]) for row in rows]
    answered = [pair for pair in found if pair[0] is not None]
    assert len(answered) >= 180
    assert sum(given == wanted for given, wanted in answered) / len(answered) >= 0.95


@pytest.mark.parametrize(
    ("story", "name"),
    [
        ("Once upon a time, there was a girl named Lily. Lily had a dog.", "Lily"),
        ("Once there was a boy called Tim. Tim ran.", "Tim"),
        ("Once upon a time, there was a cat. Her name was Mimi. Mimi slept.", "Mimi"),
        ("One day, an old man who was named Mr. Brown sat down. Mr. Brown slept.", "Mr. Brown"),
        ("They went out. Then Lily saw a ball and Lily took it. They were happy.", "Lily"),
        ("Sara and Ben were in the park. Sara ran and Ben sang.", "Sara and Ben"),
        ("Once upon a time there were two friends, Tom and Anna. Tom ran and Anna sang.", "Tom and Anna"),
        ("Tim, Tom and Ann are friends. Tim runs. Tom and Ann sing.", "Tim, Tom and Ann"),
        ("Once upon a time, there was a cat. The cat slept. The cat woke up.", "the cat"),
        ("One day, a fox saw a hen. The little fox ran. The little fox hid.", "the little fox"),
        ('Once upon a time, there was a bear. The bear ate. "Hi, Max!" the bear said.', "the bear"),
        ('"Hello!" Once Mom called, Tom came. Mom said no. Mom left. Mom cried. Then Tom and Mom ate.', "Tom"),
        ("One Monday, Lily sat. On Monday, Lily ate. Every Monday is nice. On Monday it was over.", "Lily"),
        ("Lily went to London with her mom. Lily’s mom sang.", "Lily"),
        ("There was a girl. Her name was Lily. The girl sat. The girl ate. The girl ran. Lily and Lily slept.", "Lily"),
        ("Tom and Anna were in the park. Tom ran. Tom sang.", "Tom and Anna"),
    ],
)
def test_the_main_character_is_found(story, name):
    assert main_character(story) == name


@pytest.mark.parametrize(
    "story",
    [
        "They went to the park. They played. They were happy.",
        "Once upon a time, Mom and Dad were at home. Mom slept.",
        "I went to the park. Lily was there. Lily sang.",
        "Lily had a dog named Max. Max ran. Max barked. Max slept.",
        "Once upon a time, there was a big boat. The boat sailed. The boat saw Tim. Tim liked the boat. Tim left.",
        "A cat and a dog were in the park. The cat ran. The cat slept. The dog barked.",
        "There was a rat. The rat met another rat. The rat sang.",
        "Tom and Anna were in the park. Tom ran. Tom sang. Tom slept.",
        "Tom and Mom were in the park. Tom ran. Tom slept.",
        "It was a town named Riverton. In Riverton it rained. Riverton was wet.",
        "Once there was a girl named Lily and a boy named Tom. Lily sang. Tom danced.",
        "The sun was up. It was warm.",
        "",
    ],
)
def test_it_is_not_named_when_that_is_not_sure(story):
    assert main_character(story) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Tom ran. Ann sat!  Who? ", ["Tom ran.", "Ann sat!", "Who?"]),
        ('"Stop. Wait!" said Tom. He ran.', ['"Stop. Wait!" said Tom.', "He ran."]),
        ('Tom said, "Go." Ann went.', ['Tom said, "Go."', "Ann went."]),
        ("Mr. Fox met Mrs. Hen. Dr. Owl came.", ["Mr. Fox met Mrs. Hen.", "Dr. Owl came."]),
        ("It cost 3.50 in all. Fine.", ["It cost 3.50 in all.", "Fine."]),
        ("", []),
    ],
)
def test_sentences(text, parts):
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("story", "spoken"),
    [
        ('"Hi," said Tom.', True),
        ("“Hi,” she asked.", True),
        ("Tom ran home.", False),
        ("Tom said no.", None),
        ('It was called "Sun".', None),
        ('Tom said "no.', None),
    ],
)
def test_speech_needs_a_quotation_and_a_verb(story, spoken):
    assert speaks(story) is spoken


@pytest.mark.parametrize(
    ("sentence", "is_moral"),
    [
        ("The moral of the story is to share.", True),
        ("The moral of this story is: be kind.", True),
        ("Tom learned that it is good to share.", True),
        ("She learned a valuable lesson: never run away.", True),
        ("She learned a lesson that day.", False),
        ("They learned their lesson.", False),
        ("Tom learned that Ann had gone.", False),
        ('"The moral of the story is to share," he said.', False),
        ("Tom shared his cake.", False),
    ],
)
def test_the_moral_is_a_sentence_that_states_it(sentence, is_moral):
    assert moral(f"Tom had a cake. {sentence}") == (sentence if is_moral else None)


@pytest.mark.parametrize(
    ("story", "character", "told"),
    [
        ("Tim was a boy. One day, Tim ran off. It rained. He came home.", "Tim", "One day, Tim ran off. He came home."),
        ("Tim was a boy. One day, he ran. It rained. He slept.", "Tim", "One day, Tim ran. He slept."),
        ("Tim was a boy. One day, his mom sang. He slept.", "Tim", "One day, Tim's mom sang. He slept."),
        ("Tim was a boy. One day, he ran. He slept. The end.", "Tim", "One day, Tim ran. He slept."),
        ("Tim and Ann sat. One day, they ran. They slept.", "Tim and Ann", "One day, Tim and Ann ran. They slept."),
        ("Tim was a boy. One day, they ran. They slept.", "Tim", None),
        ("Tim was a boy. One day, he ran. He slept.", None, None),
        ("Tim saw Ann. Then Tim saw Ann. One day, he ran. He slept.", "Tim", None),
        ('Tim was a boy. One day, Tim said, "Hi." He slept.', "Tim", None),
        ("Tim was a boy. Tim slept.", "Tim", None),
    ],
)
def test_what_happened(story, character, told):
    assert happenings(story, character) == told


@pytest.mark.parametrize(
    ("close", "sad_by_record", "happy"),
    [
        ("They smiled and were happy.", False, True),
        ("They smiled and were happy.", True, None),
        ("He was sad and cried.", True, False),
        ("He was sad and cried.", False, None),
        ("It rained.", True, None),
        ("It rained.", False, None),
        ("They were happy. The end.", False, True),
    ],
)
def test_an_ending_is_told_only_when_record_and_words_agree(close, sad_by_record, happy):
    assert (
        ends_happily(f"Tim cried and cried. He lost it. It was gone. Then he ate. He ran. {close}", sad_by_record)
        is happy
    )
