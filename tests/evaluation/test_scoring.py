"""Models of one trick each: what they score is shown to be no better than chance, or than an answer without a model."""

import pytest
from small import small_tokenizer

from fledge.evaluation.intervals import interval
from fledge.evaluation.measuring import Answered
from fledge.evaluation.prompts import Prompts
from fledge.evaluation.report import beside, cautions, table_by
from fledge.evaluation.scoring import MEANING, Scoring, figures, judges_apart
from fledge.messages import INPUT_MARK, Answer
from fledge.tasks import load_task

NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim")
THINGS = ("ball", "kite", "boat", "hat", "cake", "drum", "doll")
TASK = load_task("story_chat")


class NoWords:
    """Stands for what is measured of any answer's words."""

    def score(self, answers):
        return [{"eos_rate": float(answer.stopped)} for answer in answers]


def row(kind: str, question: str, story: str, answer: str) -> dict:
    asked = question + INPUT_MARK + story
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind, "form": "single", "words": [], "features": []}


def rows_of(numbers: range) -> list[dict]:
    """For each number a story with a question of each kind; one story in ten ends sadly."""
    rows = []
    for number in numbers:
        name, thing = NAMES[number % len(NAMES)], THINGS[number % len(THINGS)]
        story = (
            f"Once there was a child, {name}. {name} had a {thing} and lost the {thing} at the lake. It rained all day."
        )
        rows += [
            row("who", "Who is it?", story, f"{name}."),
            row("happy", "Is it happy?", story, "No." if number % 10 == 0 else "Yes."),
            row("summary", "Sum it up.", story, f"{name} lost a {thing}."),
        ]
    return rows


def answered(texts: list[str]) -> Answered:
    return Answered([Answer(text, 3, stopped=True) for text in texts], [], {})


@pytest.fixture(scope="module")
def compare():
    """The figures of two models that are lists of answers, `num_samples` to each prompt in turn."""
    rows, train = rows_of(range(40)), rows_of(range(41, 80))

    def run(base, model, num_samples: int = 1) -> dict:
        prompts = Prompts(TASK, "test", small_tokenizer(), rows, [{"labels": [0]}] * len(rows), train, [], num_samples)
        scoring = Scoring(prompts, TASK.scorer(train, []), NoWords())
        each = prompts.row_of_each_answer
        models = {"base": answered([base(row) for row in each]), "model": answered([model(row) for row in each])}
        for of_model in models.values():
            of_model.scores = scoring.score(of_model.answers)
        metrics = figures(scoring, models, TASK.meaning | MEANING)
        return {"num_prompts": len(rows), "num_samples": num_samples, "only": [], **metrics}

    return run


def reference(row: dict) -> str:
    return row["messages"][-1]["content"]


def one_trick(row: dict) -> str:
    """Yes to every question of that kind, the first sentence as a summary, and the same name always."""
    first = row["messages"][0]["content"].partition(INPUT_MARK)[2].split(". ")[0] + "."
    return {"happy": "Yes.", "summary": first, "who": "Lily."}[row["kind"]]


def test_tricks_do_not_look_like_success(compare):
    metrics = compare(reference, one_trick)
    for kind in ("happy", "who", "summary"):
        found, chance = (metrics["by"]["kind"][kind][who]["instruction_following"] for who in ("model", "chance"))
        assert found["value"] == pytest.approx({"happy": 0.5, "who": 1 / 8, "summary": 0}[kind])
        assert found["low"] <= chance["value"] <= found["high"]
    said = "\n".join(cautions(metrics))
    assert "No better than chance: instruct's instruction following" in said
    assert "No better than chance: base's instruction following" not in said
    assert "no better than the baseline most frequent answer, which needs no model: all" in said
    assert metrics["baselines"]["most_frequent_answer"]["instruction_following"]["value"] == pytest.approx(
        metrics["model"]["instruction_following"]["value"], abs=0.02
    )


def test_what_follows_is_above_chance_and_at_the_reference(compare):
    metrics = compare(one_trick, reference)
    assert metrics["model"].items() <= metrics["reference"].items()
    assert (
        beside(metrics)
        == f"100% (chance {metrics['chance']['model']['instruction_following']['value']:.0%}, reference 100%)"
    )
    assert not any(
        "instruct's instruction following" in sentence or "Instruct follows" in sentence
        for sentence in cautions(metrics)
    )
    assert metrics["difference"]["instruction_following"]["low"] > 0.5
    assert metrics["no_chance"]["no_role_leak"] == "it does not depend on the instruction"
    assert metrics["chance"]["model"].keys() | metrics["no_chance"].keys() == metrics["model"].keys()
    assert "kind = who" in table_by(metrics)
    assert "headroom" not in metrics  # of one answer to each prompt


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("perplexity", "it is measured on the held-out answers"),
        ("judge_score", "the judge is asked about the prompt's own instruction only"),
        ("rouge1", "no other prompt of its kind asks for something else"),
        ("f1", "it does not depend on the instruction"),
        ("eos_rate", "it does not depend on the instruction"),
    ],
)
def test_why_a_metric_has_no_chance_level(name, said):
    prompts = Prompts(TASK, "test", small_tokenizer(), rows_of(range(2)), [], [], [], 1)
    assert Scoring(prompts, TASK.scorer([], []), NoWords()).why_no_chance(name, {"f1"}) == said


def test_headroom_weighs_prompts_as_the_headline_does(compare):
    turns = iter([0, 1] * 1000)
    metrics = compare(one_trick, lambda row: reference(row) if next(turns) else "", num_samples=2)
    found = metrics["headroom"]["model"]
    assert found["pass@1"]["value"] == pytest.approx(metrics["model"]["instruction_following"]["value"])
    assert found["pass@2"]["value"] == pytest.approx(1)
    assert (found["all_right"]["value"], found["all_wrong"]["value"]) == (0, 0)
    tricks = metrics["headroom"]["base"]
    assert tricks["pass@2"]["value"] == pytest.approx(tricks["all_right"]["value"])


def test_only_the_metrics_of_the_task_weigh_the_prompts():
    """Of ten stories one ends sadly; "No." weighs as much as the nine times "Yes."."""
    rows = rows_of(range(10))
    prompts = Prompts(TASK, "test", small_tokenizer(), rows, [], [], [], 1)
    is_no = [float(reference(row) == "No.") for row in rows]
    scores = [{"instruction_following": value, "eos_rate": value} for value in is_no]
    found = Scoring(prompts, TASK.scorer([], []), NoWords()).ratios(scores)
    assert interval(found["instruction_following"])["value"] == pytest.approx(5 / 30)
    assert interval(found["eos_rate"])["value"] == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [(0.5, 0.5, False), (0.5, 0.46, False), (0.46, 0.5, False), (0.5, 0.44, True), (0.44, 0.5, True)],
)
def test_two_judges_part_by_more_than_a_twentieth(first, second, apart):
    metrics = {"ending_match": {"value": first}, "ending_match_second": {"value": second}}
    found = judges_apart(metrics, load_task("topic_ending"))
    assert (found is not None) == apart
    if found:
        assert found == {"metrics": list(metrics), "difference": pytest.approx(first - second)}
    assert judges_apart(metrics, TASK) is None  # it has one judge
