"""Topic and ending: write a story about a given topic that ends happily or sadly.

    Write a story about: {summary}
    With: {ending} ending

The prompts and their metrics are defined together, so that they cannot drift apart.
"""

import random
import re

from fledge.errors import UserError
from fledge.judges import AGAINST_READERS
from fledge.judges.coherence import CoherenceJudge
from fledge.judges.endings import EndingJudge, balanced_accuracy
from fledge.judges.sentiment import SentimentJudge
from fledge.judges.topic import judge_topic
from fledge.messages import Answer
from fledge.tasks import RejectedRecord, Scorer, Task
from fledge.text.stories import COMPLETE

SURE = 0.8  # probability of the ending that earns the full reward: above it, a judge is surer but the story no better
KEPT = 20_000  # texts in the cache of judgements: chance scores the same answers again, rewards never do
DAMAGE = {
    "shuffled": "its sentences shuffled",
    "name": "a name swapped half-way",
    "foreign": "a sentence of another story",
    "verb": "a verb replaced",
}


WORDING = "Write a story about: {topic}\nWith: {ending} ending"


def instruction(topic: str, ending: str) -> str:
    return WORDING.format(topic=topic, ending=ending)


def requested(text: str) -> tuple[str, str]:
    """The topic and the ending that an instruction asks for.

    Raises:
        UserError: the instruction has another form, for example because it was cut.
    """
    found = re.fullmatch(r"Write a story about: (.*)\nWith: (\w+) ending", text)
    if not found:
        raise UserError(f"The prompt {text[-60:]!r} asks for no ending; prepare the dataset again.")
    return found[1], found[2]


class TopicEnding(Task):
    """A record of TinyStories-Instruct gives one example: its summary is the topic, `BadEnding` means a sad ending."""

    template = "story"
    purpose = "write a short story about a given topic with a happy or a sad ending"
    example = [{"role": "user", "content": instruction("A little boy found a red kite in the park.", "happy")}]
    fields = {"topic": (), "ending": ("happy", "sad")}
    wording = WORDING
    columns = {"ending": ("happy", "sad")}
    meaning = {
        "ending_match": "the story ends as its prompt asks, by a classifier of endings",
        "ending_match_second": "the same by a second judge, a lexicon of sentiment",
        "topic": "share of the topic's words that the story has; below one half if it contradicts or leaves its topic",
        "coherence": "share of unseen training stories that are less coherent than this one",
        "instruction_following": "right ending by both judges, about its topic, at least as coherent as the weakest "
        "twentieth of the training stories, and stopped by end-of-text",
    }
    constraints = {"ending_match": 1.0, "ending_match_second": 1.0, "topic": 0.5, "coherence": 0.05}
    rewards = {"ending": 1.0, "topic": 1.0}
    done = {"ending": 1.0, "topic": 0.5}
    judged_twice = ("ending_match", "ending_match_second")
    parts = ("topic", "ending")
    asks_once = True

    def examples(self, record: dict, rng: random.Random) -> list[dict]:
        """One example, the same for every `rng`. Its group is its topic.

        Raises:
            RejectedRecord: the record lacks a summary or a story, or its story breaks off.
        """
        topic, story = " ".join(record.get("Summary", "").split()), record.get("Story", "")
        if not topic:
            raise RejectedRecord("no summary")
        if not story:
            raise RejectedRecord("no story")
        if not story.endswith(COMPLETE):
            raise RejectedRecord("the story breaks off")
        ending = "sad" if "BadEnding" in record.get("Features", "") else "happy"
        messages = [
            {"role": "user", "content": instruction(topic, ending)},
            {"role": "assistant", "content": story},
        ]
        return [{"messages": messages, "ending": ending, "group": topic}]

    def exchanged(self, part: str, row: dict, other: dict) -> dict:
        topic, ending = requested(row["messages"][-2]["content"])
        other_topic, other_ending = requested(other["messages"][-2]["content"])
        topic, ending = (other_topic, ending) if part == "topic" else (topic, other_ending)
        messages = [{"role": "user", "content": instruction(topic, ending)}, row["messages"][-1]]
        return row | {"messages": messages, "ending": ending}

    def reward(self, row: dict, answer: Answer) -> dict[str, float]:
        """The probability of the ending by a judge that never evaluates, and the share of topic words in the story.

        The second judge of endings, contradictions of the topic, and coherence are never rewarded.
        """
        topic, ending = requested(row["messages"][-2]["content"])
        sadness = float(EndingJudge.that_rewards().sadness([answer.text])[0])
        probability = sadness if ending == "sad" else 1 - sadness
        return {"ending": min(1.0, probability / SURE), "topic": judge_topic(topic, answer.text).share}

    def scorer(self, train_rows: list[dict], unseen_rows: list[dict]) -> "StoryScorer":
        return StoryScorer(self, train_rows, unseen_rows)


class StoryScorer(Scorer):
    """Scores stories with judges, each measured on rows that it did not learn from. Judgements are cached by text."""

    def __init__(self, task: Task, train_rows: list[dict], unseen_rows: list[dict]):
        super().__init__(task)
        self.endings, self.second = EndingJudge(), SentimentJudge()
        self.coherence = CoherenceJudge([_story(row) for row in train_rows])
        self.found: dict[str, tuple[str, str, float]] = {}
        if unseen_rows:
            self.judge = self._measured([_story(row) for row in unseen_rows], [row["ending"] for row in unseen_rows])

    def _measured(self, stories: list[str], endings: list[str]) -> dict:
        found = self.endings.measure(stories, endings)
        second = balanced_accuracy(self.second.judge(stories), endings)
        coherence = self.coherence.measure(stories)
        pairs = ", ".join(f"{DAMAGE[kind]} {share:.0%}" for kind, share in coherence.items())
        says = [
            f"On {len(stories)} unseen stories the classifier of endings agrees with {found['accuracy']:.1%} of the "
            f"labels, the lexicon of sentiment with {second:.1%}, both endings weighing the same.",
            f"The judge of coherence prefers an unseen story to itself with {pairs}." if pairs else "",
            *AGAINST_READERS,
        ]
        return found | {"second_accuracy": second, "coherence": coherence, "says": list(filter(None, says))}

    def metrics(self, rows: list[dict], answers: list[Answer]) -> list[dict[str, float]]:
        if len(self.found) > KEPT:
            self.found.clear()
        self._look_at({answer.text for answer in answers} - self.found.keys())
        scores = []
        for row, answer in zip(rows, answers, strict=True):
            topic, ending = requested(row["messages"][-2]["content"])
            first, second, coherence = self.found[answer.text]
            scores.append(
                {
                    "ending_match": float(first == ending),
                    "ending_match_second": float(second == ending),
                    "topic": judge_topic(topic, answer.text).score,
                    "coherence": coherence,
                }
            )
        return scores

    def _look_at(self, texts: set[str]) -> None:
        stories = sorted(texts)
        judged = (self.endings.judge(stories), self.second.judge(stories), self.coherence.judge(stories).tolist())
        self.found |= dict(zip(stories, zip(*judged, strict=True), strict=True))


def _story(row: dict) -> str:
    return row["messages"][-1]["content"]
