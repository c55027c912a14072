"""A dataset that prepare_dataset.py wrote as a task of lm-evaluation-harness, with the scores of its own task.

The prompts are those that evaluate_model.py asks, written out by the dataset's chat template, so the harness must not
apply one again.
"""

import sys
from pathlib import Path

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask

from fledge.encoding import prompt_text
from fledge.evaluation.prompts import open_prompts
from fledge.messages import Answer


class PreparedTask(ConfigurableTask):
    """Reads the folder that `--metadata '{"dataset": FOLDER}'` names; a task of one's own needs its file as `task`."""

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        folder, task_file = Path(self.config.metadata["dataset"]), self.config.metadata.get("task")
        self.prompts = open_prompts(folder, task_file, self.config.test_split, num_prompts=sys.maxsize, num_samples=1)
        self.scorer = self.prompts.task.scorer(self.prompts.train_rows, self.prompts.unseen_rows)
        self.weights = self.prompts.task.weights(self.prompts.rows)
        docs = [
            {
                "number": number,
                "prompt": prompt_text(self.prompts.tokenizer, row["messages"][:-1]),
                "reference": row["messages"][-1]["content"],
            }
            for number, row in enumerate(self.prompts.rows)
        ]
        self.dataset = DatasetDict({self.config.test_split: Dataset.from_list(docs)})

    def process_results(self, doc: dict, results: list[str]) -> dict[str, tuple[float, float]]:
        """Each score of one answer with the weight of its prompt.

        The harness does not say whether an answer ended by itself; one that is shorter than the limit did.
        """
        tokens = len(self.prompts.tokenizer(results[0], add_special_tokens=False)["input_ids"])
        stopped = tokens < int(self.config.generation_kwargs["max_gen_toks"])
        row, weight = self.prompts.rows[doc["number"]], self.weights[doc["number"]]
        (scores,) = self.scorer.score([row], [Answer(results[0], tokens + stopped, stopped)])
        return {name: (score, weight) for name, score in scores.items()}

    def aggregation(self) -> dict:
        return dict.fromkeys(self.prompts.task.meaning, weighted_mean)

    def higher_is_better(self) -> dict:
        return dict.fromkeys(self.prompts.task.meaning, True)


def weighted_mean(items: list[tuple[float, float]]) -> float:
    return sum(score * weight for score, weight in items) / sum(weight for _, weight in items)
