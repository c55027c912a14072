"""Stories without end from a model that is free to use: text for a base, and tales with a happy and a sad end.

A teacher continues the beginnings that this script writes, by `generate.py`; `examples/README.md` has all commands.

    python examples/make_stories.py openings --number 40000 --output_file openings.jsonl
    python examples/make_stories.py turns --stories stories.jsonl --teacher M --number 9000 --output_file turns.jsonl
    python examples/make_stories.py gather --stories stories.jsonl --turned turned.jsonl --teacher M --output_dir text
    python examples/make_stories.py records --turns turns.jsonl --turned turned.jsonl --teacher M --number 3600 \\
        --output_file tales.txt

`openings` are more varied than the teacher's own. `turns` cuts happy stories in the middle and begins a sentence with
which something goes wrong. `gather` keeps what is whole and new, with the sad ends on which both judges of endings
agree, and says what the text is like. `records` makes instruction records, with as many pairs as there are.
"""

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fledge.evaluation.measuring import completion_nats
from fledge.judges.endings import EndingJudge, last_sentences
from fledge.judges.sentiment import HAPPY_FROM, SentimentJudge
from fledge.models import context_of, load_model
from fledge.preparation.duplicates import near_duplicates, save_signatures
from fledge.sources import load_source
from fledge.text.stories import COMPLETE, EVENT, moral, sentences, speaks

LEAST_WORDS = 60
LEAST_STORIES = 2  # a word that fewer stories have is most likely broken
SIMILAR = 0.7  # of two stories' shingles, from which the later one is left out; a happy and a sad end of one are below
SURE = 0.8
ALIKE_BEGINNING = 0.02  # of the stories with one ending, the share whose last sentences may begin with the same words
ALIKE_WORDS = 0.05  # the share of whose last four sentences may have the same four words in a row
LONGEST_TOPIC = 30  # words
STRAIGHT = str.maketrans("“”‘’", "\"\"''")
WRITTEN = re.compile(r"[A-Za-z0-9\s.,;:!?'\"-]+")
COMMON = frozenset(
    """about after again also always another away back because been before began best better came could couldn decided
    didn does doesn down even every felt from gave have heard help home into just knew know like liked little looked
    made make more much named never next once other over really said saw some soon started still that their them then
    there they thing things this time took tried very want wanted wasn were what when where which while will with
    would your""".split()  # noqa: SIM905
)
TURNS = (
    "Then something bad happened.|But {he} was not careful.|But it broke|But|But the next day,|But suddenly,|But when|"
    "But it was too|{He} got lost|{He} tried, but|A big wave|But {he} did not listen.|But nobody|But {he} forgot|"
    "But {he} could not|But no one came|From that day on, {he} never|Then it began to rain|{He} slipped and|Suddenly,|"
    "But something was wrong.|A loud|{He} felt sick|But the ice|{He} fell|But then|No one|{He} was alone|But that day,|"
    "But {he} lost|Then there was a fire|But the others|Then {he} heard that|But {he} was mean.|But {he} was too proud|"
    "But a wolf|But {he} broke|One day, {he} could not find|But {he} did not say sorry.|But it was too dark|"
    "{He} waited and waited, but"
)


NAMES = {
    "she": "Lily Mia Anna Sue Lucy Amy Sally Jane Bella Daisy Emma Luna Molly Mary Ella Betty Lola Penny Rose Grace "
    "Poppy Kate Zara Ruby Nora Ivy Clara Hazel Alice Maya Sara Zoe Hannah Olive Fern",
    "he": "Tim Tom Max Bob Sam Jack Ben Billy John Leo Jerry Joe Mark Fred Andy Ollie Pete Danny Jim James Jake Teddy "
    "Charlie Toby Henry Oliver Finn Dan Will Rob Hugo Oscar Felix Noah Paul Gus",
}
WHO = {
    "she": "girl|girl|girl|queen|farmer|teacher|baker|sister|princess|cow|hen|duck|cat|butterfly|bee|ladybug|whale|owl",
    "he": "boy|boy|boy|king|farmer|sailor|painter|brother|prince|dog|puppy|fox|bear|rabbit|mouse|frog|lion|turtle|bird|"
    "squirrel|fish|monkey|dragon|elephant|robot|snail|pig|horse|goat|crab|penguin|wolf|ant|kitten|hedgehog|snowman",
}
KINDS = "little|big|small|brave|shy|kind|old|young|curious|lazy|clever|silly|hungry|quiet|happy|lonely|careful|proud"
PLACES = (
    "park|garden|forest|kitchen|house|village|farm|beach|school|field|yard|town|barn|river|pond|market|castle|library|"
    "mountain|zoo|lake|playground|cave|meadow|shop|attic|island|jungle|street|harbor"
)
THINGS = (
    "red ball|toy car|blue kite|shiny stone|big cake|old book|wooden boat|paper plane|yellow hat|music box|doll|drum|"
    "small seed|apple|blanket|bike|puzzle|balloon|key|letter|ring|lamp|spoon|basket|mirror|flower|sandcastle|train|"
    "feather|cookie|coin|scarf|pumpkin|map|ladder|bell|button|rope|umbrella|robot|nest|bottle|whistle|sled|crayon|jar|"
    "telescope|violin|necklace|pie|lemon|carrot|teddy bear|truck|rocket|bucket|painting|candle"
)
PASTIMES = (
    "play with her friends|climb trees|draw|swim in the lake|run very fast|bake bread|sing songs|look at the stars|"
    "collect leaves|read books|jump in puddles|help in the garden|build towers|ride a bike|fly kites|dance|tell jokes|"
    "pick flowers|feed the birds|explore|paint|fish|play hide and seek|watch the rain|cook soup|plant seeds"
)
WEATHER = "sunny|rainy|cold|windy|hot|snowy|gray|foggy|quiet|busy"
FEELINGS = "sad|excited|angry|scared|tired|bored|happy|worried|proud|jealous|hungry|curious"
BEGINNINGS = (
    "Once upon a time, there was a {kind} {who} named {name}. {He} loved to {pastime}.",
    "Once upon a time, there was a {kind} {who} named {name}.",
    "Once upon a time, in a {kind2} {place}, there lived a {kind} {who}.",
    "Once there was a {kind} {who} who",
    "One day, a {kind} {who} named {name} went to the {place}.",
    "One day, {name} found a {thing} in the {place}.",
    "One day, {name} and {friend} were in the {place}.",
    "One {weather} day, {name} wanted to {pastime}.",
    "One night, a {kind} {who} could not sleep.",
    "One morning, {name} woke up and saw a {thing}.",
    "It was a {weather} day. {name} the {who} was {feeling}.",
    "It was a {weather} morning in the {place}.",
    "{name} and {friend} are friends. They like to {pastime}.",
    "{name} and {friend} were playing in the {place}.",
    "{name} had a {thing}. {He} took it everywhere.",
    "{name} was a {kind} {who}. {He} lived near the {place}.",
    "{name} was {feeling}. {He} wanted a {thing}, but",
    "{name} liked to {pastime}. Every day, {he}",
    "{name} was very {feeling} because",
    "The {kind} {who} lived near the {place}. {He} wanted to",
    "The {weather} wind blew over the {place}.",
    "There was a {thing} in the {place}. Nobody knew",
    "There once was a {kind} {who} in a {place}.",
    "Long ago, a {kind} {who} had a {thing}.",
    "Far away, in a {kind2} {place}, a {who} named {name} lived with",
    "Every morning, {name} the {who} went to the {place}.",
    "In the {place}, a {kind} {who} was looking for a {thing}.",
    "At the {place}, {name} saw a {thing}.",
    "After lunch, {name} and {friend} went to the {place}.",
    "Mom gave {name} a {thing}. {name} was",
    "Dad and {name} went to the {place} to find a {thing}.",
    "Grandma had a {thing}. {name} wanted to",
    "A {kind} {who} and a {kind3} {who2} lived in the {place}.",
    "A {who} named {name} had a problem.",
    '"Look, a {thing}!" said {name}.',
    '"Can we go to the {place}?" asked {name}.',
)


def opening(rng: random.Random) -> str:
    """The beginning of a story, made of the lists above."""
    he = rng.choice(list(NAMES))
    kinds = rng.sample(KINDS.split("|"), 3)
    text = rng.choice(BEGINNINGS).format(
        he=he,
        He=he.capitalize(),
        name=rng.choice(NAMES[he].split()),
        friend=rng.choice(NAMES["she" if he == "he" else "he"].split()),
        who=rng.choice(WHO[he].split("|")),
        who2=rng.choice(WHO["he"].split("|")),
        kind=kinds[0],
        kind2=rng.choice(("small", "big", "quiet", "faraway", "sunny")),
        kind3=kinds[1],
        pastime=rng.choice(PASTIMES.split("|")).replace("her friends", f"{'his' if he == 'he' else 'her'} friends"),
        weather=rng.choice(WEATHER.split("|")),
        feeling=rng.choice(FEELINGS.split("|")),
        place=rng.choice(PLACES.split("|")),
        thing=rng.choice(THINGS.split("|")),
    )
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_openings(args: argparse.Namespace) -> None:
    """Writes beginnings of stories, one a line."""
    rng, found = random.Random(args.seed), {}
    while len(found) < args.number:
        found[opening(rng)] = True
    write_lines(args.output_file, [{"prompt": text} for text in found])


@dataclass
class Told:
    """A story that the teacher told to its end: what it was asked to continue, and the whole text."""

    asked: str
    text: str


def read_told(files: list[Path]) -> list[Told]:
    """The whole stories in what `generate.py --prompts_file` wrote; those that broke off are left out."""
    told = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked, added = row["messages"][-1]["content"], row["text"]
            if row["stopped"] and added:
                text = asked + ("" if added[0] in ",.!?;:'’" else " ") + added
                told.append(Told(asked, text.translate(STRAIGHT)))
    return told


def is_whole(text: str) -> bool:
    """Whether a story is long enough, ends with a sentence, closes its quotations and says nothing twice."""
    parts = sentences(text)
    return (
        len(text.split()) >= LEAST_WORDS
        and text.endswith(COMPLETE)
        and text.count('"') % 2 == 0
        and WRITTEN.fullmatch(text) is not None
        and len(set(parts)) == len(parts)
    )


def without_broken(told: list[Told]) -> list[Told]:
    """Leaves out what is not whole, what has a word that no other story has, and near duplicates.

    Stories that were asked the same are no duplicates: they share their beginning.
    """
    told = [story for story in told if is_whole(story.text)]
    words = [set(re.findall(r"(?<![A-Za-z'])[a-z]+(?![A-Za-z])", story.text)) for story in told]
    stories_with = Counter(word for found in words for word in found)
    told = [
        story
        for story, found in zip(told, words, strict=True)
        if all(stories_with[word] >= LEAST_STORIES for word in found)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "signatures.npy"
        save_signatures(file, [story.text for story in told])
        groups = np.unique([story.asked for story in told], return_inverse=True)[1]
        repeated = near_duplicates([file], groups, SIMILAR)
    return [story for story, is_repeated in zip(told, repeated, strict=True) if not is_repeated]


def endings(told: list[Told]) -> list[str]:
    """How each story ends: "happy" or "sad" where both judges say so with some certainty, else "unclear"."""
    texts = [story.text for story in told]
    sadness, valence = EndingJudge().sadness(texts), SentimentJudge().valence(texts)
    return [
        "sad" if sad > SURE and value < 0 else "happy" if sad < 1 - SURE and value > HAPPY_FROM else "unclear"
        for sad, value in zip(sadness, valence, strict=True)
    ]


def write_turns(args: argparse.Namespace) -> None:
    """Cuts happy stories between two sentences in the middle and begins a sentence with which something goes wrong.

    It takes those that the teacher finds likeliest.
    """
    rng = random.Random(args.seed)
    told = without_broken(read_told(args.stories))
    happy = [story for story, ending in zip(told, endings(told), strict=True) if ending == "happy"]
    turns = []
    for place in np.argsort(surprise(happy, args.teacher), kind="stable"):
        story = happy[place]
        beginning = first_half(story.text, rng)
        if beginning:
            turn = rng.choice(TURNS.split("|")).format(**pronouns(beginning))
            turns.append({"prompt": f"{beginning} {turn}", "beginning": beginning, "happy": story.text})
    write_lines(args.output_file, turns[: args.number])


def first_half(text: str, rng: random.Random) -> str | None:
    """A story up to the end of a sentence in its middle, outside of any quotation; None if there is no such place."""
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s+[A-Z])", text) if text[: found.end()].count('"') % 2 == 0]
    middle = [end for end in ends[1:] if 0.35 < end / len(text) < 0.75]
    return text[: rng.choice(middle)] if middle else None


def pronouns(text: str) -> dict[str, str]:
    """What the story calls its main character, told by which pronoun it uses most."""
    he = max(("he", "she", "they"), key=lambda word: len(re.findall(rf"\b{word}\b", text, re.IGNORECASE)))
    return {"he": he, "He": he.capitalize()}


def turned_sadly(files: list[Path], teacher: str | None) -> dict[str, Told]:
    """Beginning → its story with a sad end: of those that both judges call sad, the teacher's likeliest."""
    told = without_broken(read_told(files))
    sad = [story for story, ending in zip(told, endings(told), strict=True) if ending == "sad"]
    likeliest: dict[str, Told] = {}
    for place in np.argsort(surprise(sad, teacher), kind="stable"):
        likeliest.setdefault(sad[place].asked, sad[place])
    return likeliest


def surprise(told: list[Told], teacher: str | None) -> np.ndarray:
    """(stories,), a story's mean negative log-likelihood by the teacher, in nats a token: low where it hangs together.

    Without a teacher the numbers mean nothing, and are in no order.
    """
    if teacher is None:
        return np.random.default_rng(0).random(len(told))
    model, tokenizer = load_model(teacher, "bfloat16")
    ids = [tokenizer.encode(story.text)[: context_of(model.config)] for story in told]
    nats = completion_nats(model, tokenizer, [{"input_ids": row, "labels": row} for row in ids])
    return np.array([row.mean().item() for row in nats])


def gather(args: argparse.Namespace) -> None:
    """Writes the text for a base, shuffled, and says what it is."""
    told = without_broken([*read_told(args.stories), *turned_sadly(args.turned, args.teacher).values()])
    random.Random(args.seed).shuffle(told)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    texts = [story.text for story in told]
    (args.output_dir / "stories.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
    first, second = EndingJudge().judge(texts), SentimentJudge().judge(texts)
    both = Counter(zip(first, second, strict=True))
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    grams = [gram for text in texts for gram in runs_of_four(text.split())]
    statistics = {
        "stories": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "sad_by_both_judges": round(both["sad", "sad"] / len(texts), 4),
        "judges_agree": round((both["sad", "sad"] + both["happy", "happy"]) / len(texts), 4),
        "distinct_4": round(len(set(grams)) / len(grams), 4),
        "most_frequent_opening": [openings.most_common(1)[0][0], round(openings.most_common(1)[0][1] / len(texts), 4)],
    }
    (args.output_dir / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(statistics, indent=2))


def runs_of_four(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + 4]) for i in range(len(words) - 3)]


def write_records(args: argparse.Namespace) -> None:
    """Writes records in the format of TinyStories-Instruct, as many happy as sad.

    It takes every pair that there is: one topic and one beginning, told to a happy and to a sad end. The others tell
    one end, and come from what is left and from `--records`.
    """
    rng = random.Random(args.seed)
    variety = {ending: Variety(args.number // 2) for ending in ("happy", "sad")}
    sad_end = turned_sadly(args.turned, args.teacher)
    turns = [json.loads(line) for file in args.turns for line in file.read_text(encoding="utf-8").splitlines()]
    rows: list[tuple[str, str, str]] = []
    single: dict[str, list[tuple[str, str]]] = {"happy": [], "sad": []}
    for turn in turns:
        topic, sad = topic_of(turn["beginning"]), sad_end.get(turn["prompt"])
        made = {"happy": turn["happy"], **({"sad": sad.text} if sad else {})}
        if topic and sad and len(rows) < args.number and all(variety[end].has_room(made[end]) for end in made):
            for end, text in made.items():
                variety[end].add(text)
                rows.append((topic, text, end))
        elif topic:
            end = "sad" if sad else "happy"
            single[end].append((topic, made[end]))
    pairs = len(rows) // 2
    for topic, text, end in records_by_judges(args.records):
        single[end].append((topic, text))
    counts = Counter(end for *_, end in rows)
    for end, candidates in single.items():
        for topic, text in candidates:
            if counts[end] < args.number // 2 and variety[end].has_room(text):
                variety[end].add(text)
                counts[end] += 1
                rows.append((topic, text, end))
    rng.shuffle(rows)
    texts = [record(*row, rng) for row in rows]
    args.output_file.write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(texts):,} records, {counts['happy']:,} happy and {counts['sad']:,} sad, among them {pairs:,} pairs.")


class Variety:
    """Keeps the ends of stories different: few may begin their last sentence alike or share four words in a row."""

    def __init__(self, stories: int):
        self.most = {True: max(1, stories * ALIKE_BEGINNING), False: max(1, stories * ALIKE_WORDS)}
        self.counts: Counter[tuple[str, ...]] = Counter()

    def has_room(self, text: str) -> bool:
        return all(self.counts[key] + 1 <= self.most[is_beginning] for key, is_beginning in self._keys(text))

    def add(self, text: str) -> None:
        self.counts.update(key for key, _ in self._keys(text))

    def _keys(self, text: str) -> list[tuple[tuple[str, ...], bool]]:
        end = last_sentences(text)
        beginning = ("", *sentences(end)[-1].split()[:3])
        return [(beginning, True), *((run, False) for run in set(runs_of_four(end.split())))]


def records_by_judges(files: list[Path]) -> list[tuple[str, str, str]]:
    """(topic, story, ending) of records on whose ending both judges agree with some certainty, whatever their label."""
    source = load_source("tinystories_instruct")
    found = [record for file in files for record in source.records(str(file)) if {"Summary", "Story"} <= record.keys()]
    told = without_broken([Told(record["Summary"], record["Story"].translate(STRAIGHT)) for record in found])
    return [
        (story.asked, story.text, ending)
        for story, ending in zip(told, endings(told), strict=True)
        if ending != "unclear"
    ]


def topic_of(beginning: str) -> str | None:
    """Who the story is about and what happens first: "A little boy named Tim. One day, he found a red kite."

    None where the beginning does not tell it in at most `LONGEST_TOPIC` words, or somebody speaks.
    """
    first, *others = sentences(beginning)
    who = re.sub(r"^Once upon a time, (?=there)|^Once (?=there)", "", first)
    who = re.sub(r"^there (?:once )?(?:was|lived) (?=an? )", "", who, flags=re.IGNORECASE)
    event = next((one for one in others if EVENT.match(one)), others[0] if others else "")
    topic = " ".join(filter(None, (who[:1].upper() + who[1:], event)))
    return topic if event and '"' not in topic and len(topic.split()) <= LONGEST_TOPIC else None


def record(topic: str, story: str, ending: str, rng: random.Random) -> str:
    """A record whose fields stand in any order, the story mostly last, as in TinyStories-Instruct."""
    features = [
        name
        for name, is_so in (
            ("Dialogue", speaks(story)),
            ("MoralValue", moral(story)),
            ("BadEnding", ending == "sad"),
        )
        if is_so
    ]
    words = sorted(set(re.findall(r"(?<![A-Za-z'])[a-z]{4,}", story)) - COMMON)
    fields = [f"Summary: {topic}", f"Words: {', '.join(rng.sample(words, 3))}"]
    fields += [f"Features: {', '.join(features)}"] * bool(features)
    fields = rng.sample(fields, len(fields))
    at = len(fields) if rng.random() < 0.7 else rng.randrange(len(fields))
    return "\n".join([*fields[:at], f"Story: \n\n{story}", *fields[at:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, reads in (
        ("openings", write_openings, ()),
        ("turns", write_turns, ("stories",)),
        ("gather", gather, ("stories", "turned")),
        ("records", write_records, ("turns", "turned")),
    ):
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        for what in reads:
            command.add_argument(
                f"--{what}", type=Path, nargs="+", required=True, help="answers of generate.py (.jsonl)"
            )
        if reads:
            command.add_argument("--teacher", help="the model that told them: what it finds likeliest is taken first")
        if name == "records":
            command.add_argument(
                "--records", type=Path, nargs="*", default=[], help="files of more records, single ones"
            )
        if name != "gather":
            command.add_argument("--number", type=int, required=True, help="how many of them")
        command.add_argument("--output_dir" if name == "gather" else "--output_file", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
