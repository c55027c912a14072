"""Scores answers by their task, and compares them with chance, references and baselines."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fledge.evaluation import measuring, wording
from fledge.evaluation.chance import ALONE, SAME, chance_levels
from fledge.evaluation.figures import HEADLINE, by_class, differences, with_intervals, with_parts
from fledge.evaluation.headroom import headroom
from fledge.evaluation.intervals import Ratio, means
from fledge.evaluation.measuring import Answered, distinct_ratio
from fledge.evaluation.prompts import Prompts
from fledge.evaluation.wording import Wording
from fledge.messages import Answer
from fledge.tasks import Scorer, Task

MEANING = {**wording.MEANING, **measuring.MEANING}
ON_REFERENCES = "it is measured on the held-out answers"
APART = 0.05
NOT_ASKED = "the judge is asked about the prompt's own instruction only"


@dataclass
class Scoring:
    """Scores answers to the prompts: those of the models, the references, and the baselines."""

    prompts: Prompts
    scorer: Scorer
    wordings: Wording
    weights: np.ndarray = field(init=False)
    """(P,) how much each prompt counts in the task's metrics"""

    def __post_init__(self) -> None:
        self.weights = np.array(self.prompts.task.weights(self.prompts.rows), dtype=float)

    def score(self, answers: list[Answer]) -> list[dict[str, float]]:
        """All scores of each answer; the answers to each prompt follow one another."""
        rows = [row for row in self.prompts.rows for _ in range(len(answers) // len(self.prompts.rows))]
        of_words = self.wordings.score(answers)
        return [of_task | common for of_task, common in zip(self.scorer.score(rows, answers), of_words, strict=True)]

    def ratios(self, scores: list[dict[str, float]]) -> dict[str, Ratio]:
        """Each metric of scored answers. The task's own metrics weight the prompts by `Task.weights`."""
        names, count = self.prompts.task.meaning, len(scores) // len(self.prompts.rows)
        of_task = [{name: value for name, value in score.items() if name in names} for score in scores]
        common = [{name: value for name, value in score.items() if name not in names} for score in scores]
        return means(of_task, count, self.weights) | means(common, count)

    def of_baselines(self) -> dict[str, dict[str, Ratio]]:
        """The task's metrics of its baselines."""
        prompts, found = self.prompts, {}
        for name, baseline in prompts.task.baselines.items():
            texts = baseline.answers(prompts.rows, prompts.train_rows, prompts.task.kind)
            answers = [Answer(text, len(prompts.tokenizer.tokenize(text)) + 1, stopped=True) for text in texts]
            found[name] = self.ratios(self.scorer.score(prompts.rows, answers))
        return found

    def why_no_chance(self, name: str, met: set[str]) -> str:
        """Why a metric has no chance level; `met` are the metrics that answers got under another instruction."""
        if name in measuring.MEANING:
            return ON_REFERENCES
        if name == "judge_score":
            return NOT_ASKED
        return ALONE if name in self.prompts.task.meaning and name not in met else SAME


def judges_apart(metrics: dict[str, dict], task: Task) -> dict | None:
    """The metrics of two judges of the same thing and their difference, if it exceeds `APART`."""
    if task.judged_twice is None:
        return None
    first, second = task.judged_twice
    difference = metrics[first]["value"] - metrics[second]["value"]
    return {"metrics": [first, second], "difference": difference} if abs(difference) > APART else None


def figures(scoring: Scoring, models: dict[str, Answered], meaning: dict[str, str]) -> dict:
    """The figures of `metrics.json`: both models, chance, references and baselines; `meaning` names every metric."""
    prompts, names = scoring.prompts, list(meaning)
    references = prompts.references
    answers = {who: model.answers for who, model in models.items()} | {"reference": references}
    scores = {who: model.scores for who, model in models.items()} | {"reference": scoring.score(references)}
    of_answers = {who: scoring.ratios(of_who) for who, of_who in scores.items()}
    ratios = {who: model.ratios | of_answers[who] for who, model in models.items()}
    reference = of_answers["reference"] | {"distinct_2": distinct_ratio([answer.text for answer in references], 1)}
    chance, met = chance_levels(scoring.scorer, prompts.task, prompts.rows, answers, scores, scoring.weights)
    baselines = scoring.of_baselines()
    found: dict[str, Any] = {
        "meaning": meaning | {name: baseline.meaning for name, baseline in prompts.task.baselines.items()},
        **{who: with_intervals(of, names) for who, of in ratios.items()},
        "difference": differences(ratios["base"], ratios["model"], names),
        "chance": {who: with_parts(chance[who], names) for who in models},
        "reference": with_intervals(reference, names),
        "baselines": {name: with_intervals(of, names) for name, of in baselines.items()},
    }
    without = [name for name in found["model"] if name not in found["chance"]["model"]]
    found["no_chance"] = {name: scoring.why_no_chance(name, met) for name in without}
    found["judges_apart"] = {who: apart for who in models if (apart := judges_apart(found[who], prompts.task))}
    if prompts.num_samples > 1:
        found["headroom"] = {
            who: headroom([score[HEADLINE] for score in scores[who]], prompts.num_samples, scoring.weights)
            for who in models
        }
    chance_of_model = {name: ratio for name, (_, ratio) in chance["model"].items()}
    beside = {"chance": chance_of_model, "reference": reference}
    of_models = {who: of_answers[who] for who in models}
    found["by"] = by_class(prompts.task.classes, prompts.rows, of_models, beside, baselines)
    return found | {"loss_by_position": {who: model.loss_by_position for who, model in models.items()}}
