"""Topic and ending: write a story about a given topic that ends happily or sadly.

    Write a story about: {summary}
    With: {ending} ending

The data and its metric live here together, so that what is asked for and what is scored cannot drift apart.
"""

import random
import re

import numpy as np

from fledge.cli import UserError
from fledge.messages import Answer
from fledge.tasks import RejectedRecord, Scorer, Task
from fledge.text.stories import COMPLETE, last_sentences
from fledge.text.words import content_words

ERRORS_SHOWN = 5


def instruction(topic: str, ending: str) -> str:
    return f"Write a story about: {topic}\nWith: {ending} ending"


def requested(text: str) -> tuple[str, str]:
    """The topic and the ending that an instruction asks for.

    Raises:
        UserError: it does not ask for them, as a prompt does not that was cut.
    """
    found = re.fullmatch(r"Write a story about: (.*)\nWith: (\w+) ending", text)
    if not found:
        raise UserError(f"The prompt {text[-60:]!r} asks for no ending; prepare the dataset again.")
    return found[1], found[2]


class TopicEnding(Task):
    """A record of TinyStories-Instruct gives one example: its summary is the topic, `BadEnding` makes it a sad one."""

    template = "story"
    purpose = "write a short story about a given topic with a happy or a sad ending"
    example = [{"role": "user", "content": instruction("A little boy found a red kite in the park.", "happy")}]
    columns = {"ending": ("happy", "sad")}
    meaning = {
        "ending_match": "the story ends as its prompt asks, by a classifier of endings",
        "topic_words": "share of the topic's content words that occur in the story",
        "instruction_following": "right ending, at least half of the topic's content words, and stopped by end-of-text",
    }
    constraints = {"ending_match": 1.0, "topic_words": 0.5}
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

    def scorer(self, train_rows: list[dict], unseen_rows: list[dict]) -> "EndingScorer":
        return EndingScorer(self, train_rows, unseen_rows)


class EndingScorer(Scorer):
    """Its judge of endings learns from the training rows and is measured on rows that it has not seen."""

    def __init__(self, task: Task, train_rows: list[dict], unseen_rows: list[dict]):
        super().__init__(task)
        stories, endings = ([pick(row) for row in train_rows] for pick in (_story, _ending))
        self.endings = EndingJudge(stories, endings)
        self.judge = self.endings.measure(*([pick(row) for row in unseen_rows] for pick in (_story, _ending)))

    def metrics(self, rows: list[dict], answers: list[Answer]) -> list[dict[str, float]]:
        judged = self.endings.judge([answer.text for answer in answers])
        return [
            score(row["messages"][-2]["content"], answer.text, ending)
            for row, answer, ending in zip(rows, answers, judged, strict=True)
        ]


def score(instruction: str, story: str, judged_ending: str) -> dict[str, float]:
    """Whether a story has the ending and the words of the topic that an instruction asks for."""
    topic, ending = requested(instruction)
    wanted, present = content_words(topic), content_words(story)
    share = len(wanted & present) / len(wanted) if wanted else 1.0
    return {"ending_match": float(judged_ending == ending), "topic_words": share}


def _story(row: dict) -> str:
    return row["messages"][-1]["content"]


def _ending(row: dict) -> str:
    return row["ending"]


class EndingJudge:
    """Tells a happy ending from a sad one: logistic regression on the word pairs of a story's last four sentences.

    It learns from the training split's labels, so it is as good as those; `accuracy` on stories it has not seen is
    printed beside every figure that it produces.

    Raises:
        UserError: the stories have one ending only.
    """

    def __init__(self, stories: list[str], endings: list[str]):
        if len(set(endings)) < 2:
            raise UserError(
                f"The training split has {''.join(set(endings)) or 'no'} endings only, from which no judge can learn; "
                "prepare the dataset from records with both."
            )
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        # A rare class counts as much as a frequent one: real data has one sad story in a hundred.
        self.model = make_pipeline(
            TfidfVectorizer(preprocessor=_end_in_lower_case, ngram_range=(1, 2), sublinear_tf=True, min_df=2),
            LogisticRegression(C=10, max_iter=1000, class_weight="balanced"),
        )
        self.model.fit(stories, endings)

    def judge(self, stories: list[str]) -> list[str]:
        return [str(ending) for ending in self.model.predict(stories)]

    def sadness(self, stories: list[str]) -> np.ndarray:
        """(stories,), the probability that each of them ends sadly."""
        return self.model.predict_proba(stories)[:, list(self.model.classes_).index("sad")]

    def measure(self, stories: list[str], endings: list[str]) -> dict:
        """What the judge is worth on stories it has not seen: accuracy, calibration, and where it is most wrong.

        `brier` is the mean squared distance of its probabilities from the truth (Brier 1950; 0.25 for "one half"
        always). `calibration` has a bin for each fifth of the probabilities of a sad ending that occurs: what it said
        and how often it was so.
        """
        sadness, is_sad = self.sadness(stories), np.array([ending == "sad" for ending in endings])
        bins = np.minimum((sadness * 5).astype(int), 4)
        worst = np.argsort(-np.abs(sadness - is_sad), kind="stable")[:ERRORS_SHOWN]
        return {
            "accuracy": self.accuracy(stories, endings),
            "n": len(stories),
            "brier": float(np.mean((sadness - is_sad) ** 2)),
            "calibration": [
                {
                    "said_sad": float(sadness[bins == number].mean()),
                    "was_sad": float(is_sad[bins == number].mean()),
                    "n": int((bins == number).sum()),
                }
                for number in sorted(set(bins.tolist()))
            ],
            "errors": [
                {"ends": last_sentences(stories[i]), "label": endings[i], "said_sad": float(sadness[i])}
                for i in worst.tolist()
                if (sadness[i] >= 0.5) != is_sad[i]
            ],
        }

    def accuracy(self, stories: list[str], endings: list[str]) -> float:
        """Mean of the accuracies on either ending (0.5 is chance, however rare one of them is)."""
        judged, recalls = self.judge(stories), []
        for label in sorted(set(endings)):
            of_label = [j for j, ending in zip(judged, endings, strict=True) if ending == label]
            recalls.append(sum(j == label for j in of_label) / len(of_label))
        return sum(recalls) / len(recalls)


def _end_in_lower_case(story: str) -> str:
    return last_sentences(story).lower()


def _end_in_lower_case(story: str) -> str:
    return last_sentences(story).lower()
