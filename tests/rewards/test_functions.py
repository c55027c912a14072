"""What is rewarded, task by task, and that no answer is paid for what it does not do."""

import re
from pathlib import Path

import pytest
from small import small_tokenizer

from fledge.errors import UserError
from fledge.judges.endings import EndingJudge
from fledge.messages import Answer
from fledge.rewards.functions import Rewarder, chosen_rewards, reward_functions, weights_of
from fledge.tasks import Task, load_task, task_names
from fledge.tasks.constraints import instruction as constrained
from fledge.tasks.topic_ending import instruction
from fledge.text.constraint_kinds import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
SAD = "Tom had a kite. The wind took it away. Tom cried and never saw it again. He was very sad."
HAPPY = "Tom had a kite. It flew over the park. Tom laughed and hugged his dad. They were very happy."
PLAIN = "Tom had a ball. It flew over the park. Tom laughed and hugged his dad."


def asked(prompt: str, reference: str = HAPPY, **columns: object) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}]
    return {"messages": messages, **columns}


def rewards(task: str, row: dict, text: str, stopped: bool = True) -> dict[str, float]:
    train = [row | {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": HAPPY}]}]
    return Rewarder(load_task(task), train).rewards([row], [Answer(text, 9, stopped)])[0]


STORY = asked(instruction("Tom lost his red kite in the park.", "sad"))
CHAT = {"kind": "who", "features": []}
WORDS = asked("Write a story with: kite, wind, cry", words=["kite", "wind", "cry"], **CHAT | {"kind": "words"})
SUMMARY = asked(f"Summarize this story.\n\n### Input:\n{SAD}", "Tom loses his kite.", **CHAT | {"kind": "summary"})
WHO = asked("Who is it about?", "Tom.", words=[], **CHAT)
LINES = ["words: kite, boat", "question: yes"]
KEPT = asked(constrained(LINES), constraints=LINES, number="two")
END = asked(constrained(["end: He was very sad."]), constraints=["end: He was very sad."], number="one")
SUM = asked("What is 6 times 7?", "It is 42.", category="arithmetic")


@pytest.mark.parametrize(
    ("task", "row", "text", "wanted"),
    [
        ("topic_ending", STORY, SAD, {"ending": 1.0, "topic": 0.4}),
        ("topic_ending", STORY, HAPPY, {"ending": (0, 0.3), "topic": 0.6}),
        ("topic_ending", STORY, "", {"ending": (0, 0.9), "topic": 0.0, "usual": 0.0}),
        ("story_chat", WORDS, SAD, {"words": 1.0, "all_words": 1.0, "story": 1.0}),
        ("story_chat", WORDS, HAPPY, {"words": 1 / 3, "all_words": 0.0, "story": 1.0}),
        ("story_chat", WORDS, "kite, wind, cry", {"words": 0.0, "all_words": 0.0, "story": 0.0}),
        ("story_chat", WORDS, f"There was a kite, a wind, a cry. {PLAIN}", {"words": 2 / 3, "all_words": 0.0}),
        ("story_chat", WORDS, f"Write a story with: kite, wind, cry. {PLAIN}", {"words": 0.0, "story": 0.0}),
        ("story_chat", WORDS, f"A story with: kite, wind, cry. {PLAIN}", {"words": 0.0, "story": 1.0}),
        ("story_chat", SUMMARY, "Tom loses his kite.", {"overlap": 1.0, "grounded": (0.6, 1), "own_words": 1.0}),
        ("story_chat", SUMMARY, "Tom had a kite. The wind took it away.", {"overlap": (0, 0.6), "own_words": 0.0}),
        ("story_chat", SUMMARY, SAD, {"short_enough": 0.0, "own_words": 0.0}),
        ("story_chat", WHO, "Tom.", {"right": 1.0, "overlap": 1.0}),
        ("story_chat", WHO, "Tom and Sue.", {"right": 0.0, "overlap": (0.4, 0.6)}),
        ("story_chat", WHO, "user: Tom.", {"no_role_leak": 0.0}),
        ("constraints", KEPT, f"{SAD} Was his boat there?", {"words": 1.0, "question": 1.0, "all_kept": 1.0}),
        ("constraints", KEPT, SAD, {"words": 0.5, "question": 0.0, "all_kept": 0.0, "story": 1.0}),
        ("constraints", KEPT, "kite boat ?", {"words": 0.0, "story": 0.0}),
        ("constraints", KEPT, "Is a kite a boat too?", {"words": 1.0, "question": 1.0, "all_kept": 0.0, "story": 0.0}),
        ("constraints", END, SAD, {"end": 1.0, "all_kept": 1.0}),
        ("constraints", END, f"{PLAIN} He was sad.", {"end": (0.5, 0.7), "all_kept": 0.0}),
        ("constraints", END, f"{PLAIN} He was so happy.", {"end": 0.25, "all_kept": 0.0}),
        ("constraints", END, PLAIN, {"end": (0, 0.1)}),
        ("instructions", SUM, "It is 42.", {"right_number": 1.0, "responds": 1.0, "rougeL": 1.0}),
        ("instructions", SUM, "It is 24.", {"right_number": 0.0, "responds": 1.0}),
        ("instructions", SUM, "", {"right_number": 0.0, "responds": 0.0, "rougeL": 0.0}),
    ],
)  # fmt: skip
def test_each_task_rewards_what_its_prompt_asks_for(task, row, text, wanted):
    found = rewards(task, row, text)

    for name, value in wanted.items():
        low, high = value if isinstance(value, tuple) else (value, value)
        assert low - 1e-9 <= found[name] <= high + 1e-9, (name, found)


def test_what_a_prompt_does_not_ask_for_is_not_rewarded():
    of_every_task = {"stopped", "usual", "varied"}
    assert rewards("story_chat", WHO, "Tom.").keys() == {"right", "overlap", "no_role_leak"} | of_every_task
    assert not {"rhyme", "length"} & rewards("constraints", KEPT, SAD).keys()


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (HAPPY, 1, 1),
        (HAPPY[:-17], 0.5, 0.9),
        ("Tom had a kite.", 0, 0),
        (f"{HAPPY} " * 6, 0, 0),
        ("so sad and " * 6, 0, 0),
    ],
)
def test_an_answer_is_to_be_as_long_and_varied_as_usual(text, low, high):
    assert low <= rewards("topic_ending", STORY, text)["usual"] <= high


def test_an_answer_that_did_not_stop_is_not_rewarded_for_stopping():
    assert [rewards("topic_ending", STORY, SAD, stopped)["stopped"] for stopped in (False, True)] == [0.0, 1.0]


def test_more_certainty_than_a_clear_ending_gives_is_not_rewarded():
    surer = f"{SAD} It was too late. He was sad and cried. He never had a kite again."

    assert EndingJudge.that_rewards().sadness([surer])[0] > EndingJudge.that_rewards().sadness([SAD])[0]
    assert rewards("topic_ending", STORY, surer)["ending"] == rewards("topic_ending", STORY, SAD)["ending"] == 1


def test_the_judge_that_rewards_is_another_and_as_good(yardsticks):
    evaluates, pays = EndingJudge(), EndingJudge.that_rewards()
    rows = [row for row in yardsticks if row["agreed"]["ending"] != "neither"]
    said, stories = [row["agreed"]["ending"] for row in rows], [row["story"] for row in rows]

    assert evaluates.weights != pays.weights
    for judge in (evaluates, pays):
        assert judge.measure(stories, said)["accuracy"] > 0.97


@pytest.mark.parametrize("name", ["topic_ending", "story_chat", "constraints", "instructions"])
def test_no_task_rewards_its_second_judge_or_coherence(name):
    assert not {"coherence", "ending_match_second"} & weights_of(load_task(name)).keys()


class Shout(Task):
    template, purpose, example, columns = "story", "shout", (), ()
    examples = None

    def score(self, row, answer):
        return {"capitals": sum(map(str.isupper, answer.text)) / max(len(answer.text), 1), "short": 1.0}


Shout.__abstractmethods__ = frozenset()
Shout.meaning = dict.fromkeys(("capitals", "short", "instruction_following"), "…")
Shout.constraints = dict.fromkeys(("capitals", "short"), 1.0)


@pytest.mark.parametrize("name", task_names())
def test_what_says_that_an_answer_is_done_is_rewarded(name):
    task = load_task(name)
    assert task.done.keys() <= weights_of(task).keys()
    assert (task.done or task.constraints).keys() & weights_of(task).keys()
    assert all(0 < least <= 1 for least in (*task.done.values(), *task.constraints.values()))


def test_a_task_without_rewards_gives_its_constraints():
    shout = Shout()
    found = Rewarder(shout, [STORY]).rewards([STORY], [Answer("ABcd", 1, True)])[0]

    assert weights_of(shout) == {"capitals": 1, "short": 1, "stopped": 1, "usual": 1, "varied": 1}
    assert (found["capitals"], found["short"], found["stopped"]) == (0.5, 1, 1)


def test_a_reward_outside_its_range_is_refused():
    class Loud(Shout):
        def reward(self, row, answer):
            return {"capitals": 2.0}

    with pytest.raises(UserError, match=r"rewarded an answer with 2\.0 for capitals"):
        Rewarder(Loud(), [STORY]).rewards([STORY], [Answer("ABcd", 1, True)])


def test_functions_are_what_trl_calls(tmp_path):
    """Each has a name, takes what TRL gives by name, and tells its own reward; the user's sees the row's columns."""
    file = tmp_path / "mine.py"
    file.write_text("def short(completions, kind, row, **_):\n    return [len(k) + r for k, r in zip(kind, row)]\n")
    tokenizer, rows = small_tokenizer(), [WORDS, WHO]
    rewarder = Rewarder(load_task("story_chat"), rows)
    functions = reward_functions(rewarder, rows, tokenizer, ["right", "stopped", f"{file}:short"])
    given = {"prompts": ["", ""], "completions": ["", ""], "completion_ids": [[5, 6], [7, 0]], "row": [0, 1]}

    assert [function.__name__ for function in functions] == ["right", "stopped", "short"]
    assert [function(**given, trainer_state=None) for function in functions] == [[None, 0.0], [0.0, 1.0], [5, 4]]


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        (["ending", "wit"], None, "has no reward 'wit'; name some of ending, topic, stopped, usual"),
        (["ending", "ending"], None, "each once"),
        ([], None, "at least one"),
        (None, [1.0], "1 numbers for 5 rewards"),
    ],
)
def test_a_wrong_choice_of_rewards_is_one_sentence(names, weights, said):
    with pytest.raises(UserError, match=said):
        chosen_rewards(load_task("topic_ending"), names, weights)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "is in no file"), ("1 / 0", "ZeroDivisionError"), ("", "has no function 'short'")]
)
def test_a_function_that_is_not_there_is_one_sentence(tmp_path, text, said):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)

    with pytest.raises(UserError, match=said):
        reward_functions(Rewarder(load_task("topic_ending"), [STORY]), [STORY], small_tokenizer(), [f"{file}:short"])


def test_the_reward_of_the_documentation_works(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(re.search(r"```python\n(def shorter.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    rows = [STORY | {"ending": ending} for ending in ("sad", "happy")]
    rewarder = Rewarder(load_task("topic_ending"), rows)
    (shorter,) = reward_functions(rewarder, rows, small_tokenizer(), [f"{file}:shorter"])
    said = [[{"role": "assistant", "content": "no " * 100}]] * 2

    assert shorter(prompts=["", ""], completions=said, completion_ids=[[1], [1]], row=[0, 1]) == [0.5, None]


def test_the_documentation_names_every_reward():
    told = re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8"))

    for task in map(load_task, task_names()):
        assert set(weights_of(task)) - set(told) <= set(KINDS)
