"""The kinds of characters in stories: which words mean the same kind, and which are male or female."""

from collections.abc import Iterable

# Who can be a story's main character without a name.
BEINGS = frozenset(
    """alien angel animal ant baby bear beaver bee beetle bird birdie boy brother bug bull bunny butterfly camel captain
    cat caterpillar chef chick chicken child clown cook cop cow crab creature cricket crocodile crow dad daddy
    dancer daughter deer dinosaur doctor dog dolphin donkey dove dragon driver duck duckling eagle elephant elf
    explorer fairy farmer father fireman fish fisherman fly fox friend frog ghost giant giraffe girl goat goose
    gorilla grandma grandpa guard hamster hawk hedgehog hen hero hippo horse human hunter infant jellyfish judge
    kangaroo kid king kitten kitty knight lady lamb leopard lion lizard lobster man mermaid mole mom mommy monkey
    monster mosquito mother mouse mule musician nurse octopus ostrich otter owl painter panda parrot peacock
    penguin person pig pigeon pilot pirate policeman pony prince princess puppy queen rabbit raccoon rat raven
    reindeer rhinoceros robot sailor seal shark sheep sister skeleton snail snake soldier son spider squirrel
    swan teacher tiger toad troll turkey turtle unicorn vet warrior whale witch wizard wolf woman worm zebra
    """.split()  # noqa: SIM905
)
# Words for the same person or animal; the first stands for all of them.
SYNONYMS = (
    ("mom", "mommy", "mother", "mama", "mum", "mummy", "momma"),
    ("dad", "daddy", "father", "papa"),
    ("grandma", "grandmother", "granny", "nana"),
    ("grandpa", "grandfather", "grandad", "granddad"),
    ("cat", "kitty", "kitten"),
    ("dog", "doggy", "pup", "puppy"),
    ("bird", "birdie"),
    ("rabbit", "bunny"),
)
STANDARD = {word: words[0] for words in SYNONYMS for word in words}


def with_synonyms(beings: Iterable[str]) -> frozenset[str]:
    """The `beings`, which are standard words, and all words that mean one of them.

    >>> sorted(with_synonyms(["boy", "dad"]))
    ['boy', 'dad', 'daddy', 'father', 'papa']
    """
    beings = frozenset(beings)
    return beings | {word for word, standard in STANDARD.items() if standard in beings}


FEMALE = with_synonyms(
    ("girl", "mom", "sister", "grandma", "aunt", "woman", "lady", "queen", "princess", "daughter", "witch")
)
MALE = with_synonyms(
    ("boy", "dad", "brother", "grandpa", "uncle", "man", "king", "prince", "son", "policeman", "fisherman", "wizard")
)
