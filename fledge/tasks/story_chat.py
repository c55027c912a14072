"""Story chat: write a story, summarize it, and answer questions about it, in single turns or in a conversation.

The answers come from the record (TinyStories-Instruct) and from rules that answer only if they are certain
(`fledge.text.stories`). The phrasings and the turns of a conversation are chosen at random.
"""

import hashlib
import random
import re
from collections import Counter

from fledge.messages import INPUT_MARK, Answer
from fledge.tasks import RejectedRecord, Task
from fledge.text import checks
from fledge.text.overlap import exact_match, f1, rouge
from fledge.text.stories import COMPLETE, ends_happily, happenings, main_character, moral, sentences, speaks
from fledge.text.words import content_words, is_run, used

SYSTEM = {
    "role": "system",
    "content": "You are a storyteller. You write short stories and answer questions about them.",
}
KINDS = ("summary", "moral", "words", "who", "what", "happy", "talk")

# The first phrasing of each kind is the plain one, which `CAPABILITIES` uses.
PHRASINGS = {
    "summary": ("Summarize this story.", "What is this story about?", "Give a short summary of the story."),
    "moral": ("What is the moral of the story?", "What does this story teach?", "Which lesson does the story state?"),
    "words": (
        "Write a story using these words: {words}",
        "Write a short story with the words {words}",
        "Tell me a story in which these words occur: {words}",
    ),
    "who": ("Who is the main character?", "Who is this story about?", "Name the main character of the story."),
    "what": (
        "What happened in the story?",
        "What happens in this story, and how does it end?",
        "Tell me what happened and how it ended.",
    ),
    "happy": ("Does the story have a happy ending?", "Does it end happily?", "Is the ending of the story a happy one?"),
    "talk": ("Does anyone speak in the story?", "Is there dialogue in the story?", "Do the characters talk?"),
}
DIALOGUE = "\nThe story should contain dialogue."
ROLE_TOKEN = re.compile(r"<\|\w+\|>|^(?:user|assistant|system) ?:", re.MULTILINE | re.IGNORECASE)
# Nearly every story ends happily and has dialogue. If all were asked about, a model would learn to always say yes.
SHARE_OF_YES = {"happy": 1 / 3, "talk": 1 / 2}
LONGEST_CONVERSATION = 4  # answers


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


_STORY = (
    "Once upon a time, there was a small fox named Rusty. Rusty lived near a river and loved to skip stones. One day, "
    "Rusty saw a duck who could not get out of the reeds. Rusty pulled the reeds apart with his teeth. "
    '"Thank you," said the duck. "Come and swim with me!" Rusty was afraid of the water, but the duck showed him how '
    "to paddle. At night they sat on the bank and watched the moon, and they were happy."
)
# The fixed prompts of `evaluate_model.py --capabilities`.
CAPABILITIES = {
    "summary": [SYSTEM, _user(PHRASINGS["summary"][0] + INPUT_MARK + _STORY)],
    "words": [SYSTEM, _user(PHRASINGS["words"][0].format(words="boat, brave, laugh"))],
    "who": [SYSTEM, _user(PHRASINGS["who"][0] + INPUT_MARK + _STORY)],
    "what": [SYSTEM, _user(PHRASINGS["what"][0] + INPUT_MARK + _STORY)],
}


class StoryChat(Task):
    """A record of TinyStories-Instruct gives an example of each kind that it supports, and a conversation of several.

    The kinds are those of `PHRASINGS`.
    """

    template = "story_chat"
    purpose = "write short stories, sum them up, and answer questions about them"
    example = CAPABILITIES["words"]
    text = "story"
    columns = {
        "kind": KINDS,
        "form": ("single", "conversation"),
        "words": "strings",
        "features": "strings",
    }
    meaning = {
        "instruction_following": "meets every constraint its prompt states and stopped by end-of-text; docs/tasks.md "
        "has the constraints of each kind of prompt",
        "rouge1": "single words shared with the reference summary or account (ROUGE-1, F-measure)",
        "rouge2": "word pairs shared with it (ROUGE-2, F-measure)",
        "rougeL": "longest common subsequence with it (ROUGE-L, F-measure)",
        "grounded": "share of a summary's content words that its story has",
        "moral_rougeL": "longest common subsequence with the moral that the story states (ROUGE-L, F-measure)",
        "words_used": "share of the requested words that the story uses, in any inflection",
        "all_words_used": "the story uses all requested words",
        "dialogue": "somebody speaks in the story, if the prompt asks for dialogue",
        "exact_match": "a question is answered with the reference's words, but for case, punctuation and articles",
        "f1": "words shared with the reference answer to a question (harmonic mean of precision and recall)",
        "long_enough": "a story that was asked for has at least three sentences",
        "short_enough": "a summary or an account is less than half as long as its prompt",
        "own_words": "a summary or an account is not copied word for word from its text; absent if its reference is",
        "no_role_leak": "no role token of the conversation stands in the answer",
    }
    constraints = {
        "words_used": 1.0,
        "dialogue": 1.0,
        "long_enough": 1.0,
        "grounded": 0.7,
        "short_enough": 1.0,
        "moral_rougeL": 0.5,
        "exact_match": 1.0,
        "own_words": 1.0,
        "no_role_leak": 1.0,
    }
    rewards = {
        "words": 1.0,
        "all_words": 1.0,
        "dialogue": 1.0,
        "story": 1.0,
        "overlap": 1.0,
        "grounded": 1.0,
        "short_enough": 1.0,
        "own_words": 1.0,
        "right": 1.0,
        "no_role_leak": 1.0,
    }
    done = {
        "words": 1.0,
        "dialogue": 1.0,
        "story": 1.0,
        "grounded": 0.7,
        "short_enough": 1.0,
        "own_words": 1.0,
        "right": 1.0,
        "no_role_leak": 1.0,
    }

    def examples(self, record: dict, rng: random.Random) -> list[dict]:
        """The group of every example is the story.

        Raises:
            RejectedRecord: the record has no story, its story breaks off, or no answer about it is sure.
        """
        story = record.get("Story", "").strip()
        if not story:
            raise RejectedRecord("no story")
        if not story.endswith(COMPLETE):
            raise RejectedRecord("the story breaks off")
        answers = _answers(record, story, rng)
        words = _words_used(record, story)
        features = ["dialogue"] if _lists(record, "Dialogue") and speaks(story) and rng.random() < 0.5 else []
        group = hashlib.blake2b(" ".join(story.split()).encode(), digest_size=16).hexdigest()

        def ask(kind: str, text: str = "") -> list[dict[str, str]]:
            content = rng.choice(PHRASINGS[kind]) + (INPUT_MARK + text if text else "")
            return [_user(content), {"role": "assistant", "content": answers[kind]}]

        def example(kind: str, form: str, turns: list[dict[str, str]]) -> dict:
            constraints = {"words": words, "features": features} if kind == "words" else {"words": [], "features": []}
            return {"messages": [SYSTEM, *turns], "kind": kind, "form": form, **constraints, "group": group}

        made = [example(kind, "single", ask(kind, story)) for kind in answers]
        written = []
        if words:
            request = rng.choice(PHRASINGS["words"]).format(words=", ".join(words)) + (DIALOGUE if features else "")
            written = [_user(request), {"role": "assistant", "content": story}]
            made.append(example("words", "single", written))
        if len(answers) > 1:
            kinds = rng.sample(list(answers), rng.randint(2, min(LONGEST_CONVERSATION, len(answers))))
            # The conversation continues from a story that was just written, or begins with one that the user brings.
            turns = written if written and rng.random() < 0.5 else []
            for kind in kinds:
                turns = turns + ask(kind, "" if turns else story)
            made.append(example(kinds[-1], "conversation", turns))
        if not made:
            raise RejectedRecord("no answer about the story is sure")
        return made

    def score(self, row: dict, answer: Answer) -> dict[str, float]:
        kind, text, reference = row["kind"], answer.text, row["messages"][-1]["content"]
        scores = {"no_role_leak": float(not ROLE_TOKEN.search(text))}
        if kind == "words":
            found = used(row["words"], text)
            scores |= {"words_used": sum(found) / len(found), "all_words_used": float(all(found))}
            scores["long_enough"] = float(len(sentences(text)) >= 3)
            if "dialogue" in row["features"]:
                scores["dialogue"] = float(speaks(text) is True)
        elif kind in ("summary", "what"):
            given = " ".join(message["content"] for message in row["messages"][:-1])
            wanted = content_words(text)
            scores |= rouge(reference, text)
            scores["grounded"] = len(wanted & content_words(given)) / len(wanted) if wanted else 0.0
            scores["short_enough"] = float(2 * len(text) < len(given))
            if not is_run(reference, given):
                scores["own_words"] = float(not is_run(text, given))
        elif kind == "moral":
            scores["moral_rougeL"] = rouge(reference, text)["rougeL"]
        else:
            scores |= {"exact_match": exact_match(reference, text), "f1": f1(reference, text)}
        return scores

    def reward(self, row: dict, answer: Answer) -> dict[str, float]:
        """As `score`, but words count as in `checks.uses_apart` and only in a story; overlap is rewarded as well."""
        scores = self.score(row, answer)
        same = ("dialogue", "grounded", "short_enough", "own_words", "no_role_leak")
        found = {name: scores[name] for name in same if name in scores}
        if row["kind"] == "words":
            prompt = row["messages"][-2]["content"]
            story = float(checks.tells(answer.text, prompt))
            share = story * checks.uses_apart(row["words"], answer.text, prompt)
            return found | {"words": share, "all_words": float(share == 1), "story": story}
        if "exact_match" in scores:
            return found | {"right": scores["exact_match"], "overlap": scores["f1"]}
        return found | {"overlap": scores.get("rougeL", scores.get("moral_rougeL", 0.0))}

    def kind(self, row: dict) -> str:
        return row["kind"]

    def weights(self, rows: list[dict]) -> list[float]:
        """Yes and no get the same total weight in each kind of question, so a constant "Yes." scores one half."""
        asked = Counter((row["kind"], row["messages"][-1]["content"]) for row in rows if row["kind"] in SHARE_OF_YES)
        weights = []
        for row in rows:
            of_kind = [count for (kind, _), count in asked.items() if kind == row["kind"]]
            own = asked[row["kind"], row["messages"][-1]["content"]]
            weights.append(sum(of_kind) / len(of_kind) / own if of_kind else 1.0)
        return weights


def _answers(record: dict, story: str, rng: random.Random) -> dict[str, str]:
    """The certain answers to questions about the story, by kind."""
    who = main_character(story)
    yes_or_no = {"happy": ends_happily(story, _lists(record, "BadEnding")), "talk": speaks(story)}
    for kind, share in SHARE_OF_YES.items():
        if yes_or_no[kind] and rng.random() >= share:
            yes_or_no[kind] = None
    found = {
        "summary": " ".join(record.get("Summary", "").split()),
        "moral": moral(story) if _lists(record, "MoralValue") or "moral of the story" in story else None,
        "who": f"{who[0].upper()}{who[1:]}." if who else None,
        "what": happenings(story, who),
        **{kind: None if yes is None else "Yes." if yes else "No." for kind, yes in yes_or_no.items()},
    }
    return {kind: answer for kind, answer in found.items() if answer}


def _lists(record: dict, feature: str) -> bool:
    return feature in [name.strip() for name in record.get("Features", "").split(",")]


def _words_used(record: dict, story: str) -> list[str]:
    """The record's words that its story uses."""
    words = [word.strip() for word in record.get("Words", "").split(",") if word.strip()]
    return [word for word, is_used in zip(words, used(words, story), strict=True) if is_used]
