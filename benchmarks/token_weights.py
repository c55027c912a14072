"""Does a loss that knows which tokens the prompt decides teach the ending better in the same time?

    python benchmarks/token_weights.py --base runs/quickstart/base --dataset runs/quickstart/data

A token's score is its log-probability under its own prompt minus that under the prompt with the other ending. The way
`weighted` counts a token by its score. The way `contrast` asks that a story be likelier under its own prompt than under
the other one. Both ask the model under training, at each step that they take part in. What the other prompt's passes
cost is measured first: such a way gets fewer steps, so that all take the same time. Each way is trained with the
quickstart's settings for each seed and answers the validation prompts; what `results.jsonl` has is not done again.
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from trl import ModelConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fledge.encoding import IGNORED, encode_prompt, open_prepared, open_rows, prompt_length
from fledge.evaluation.intervals import Ratio, paired_difference
from fledge.evaluation.measuring import Answering, fingerprint_of_prompts, measure
from fledge.evaluation.prompts import open_prompts, task_of
from fledge.evaluation.scoring import Scoring
from fledge.evaluation.wording import Wording
from fledge.journal import Journal
from fledge.models import fingerprint
from fledge.sampling import Sampling
from fledge.scripts.train_sft import RunArguments, load_inputs
from fledge.terminal import quiet
from fledge.training.opening import open_trainer
from fledge.training.trainer import InstructTrainer, SmallModelConfig, finished, prepare_model
from fledge.training.trial import seconds_of

SAMPLES = 4  # answers to each prompt
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "train.yaml"
OTHERS = {"model_name_or_path", "dataset", "overwrite"}
JUDGES = ("ending_match", "ending_match_second")
OF_PROMPTS = (*JUDGES, "instruction_following", "topic", "coherence")
OF_ALL = ("distinct_2", "completion_loss")
MOST = 3.0  # nats of a score that count; a token with a higher one is no more decided


@dataclass(frozen=True)
class Way:
    gain: float = 0.0  # what a nat of its score adds to a token's weight
    contrast: float = 0.0  # how much a row's contrast counts, where the loss of a token counts 1
    begin: float = 0.0  # the share of the steps that come before either
    every: int = 1  # from there on, one step of so many has either


WAYS = {"plain": Way(), "weighted": Way(gain=2, begin=1 / 3), "contrast": Way(contrast=20, begin=1 / 3, every=2)}


def token_weights(scores: torch.Tensor, gain: float) -> torch.Tensor:
    """From 1, where the prompt does not decide the token or speaks against it, to 1 + `gain` · `MOST`."""
    return 1 + gain * scores.clamp(0, MOST)


def loss_of(model, batch: dict, way: Way) -> torch.Tensor:
    """The mean loss of a batch over its supervised tokens by their weights, and its rows' contrast.

    `other` in the batch has the same completions after the other prompts. A row's contrast is −log σ of the sum of its
    scores, the loss of the model as a classifier of its own prompt and the other one (GeDi, Krause et al. 2020).
    """
    own = model(**{key: value for key, value in batch.items() if key != "other"}, use_cache=False, fused_lm_head=True)
    log_probs = own.log_probs[own.label_mask]
    if not (way.gain or way.contrast):
        return -log_probs.mean()
    with torch.set_grad_enabled(way.contrast > 0):
        other = model(**batch["other"], use_cache=False, fused_lm_head=True)
    weights = token_weights((log_probs - other.log_probs[other.label_mask]).detach(), way.gain)
    of_rows = F.logsigmoid(own.log_probs.sum(1) - other.log_probs.sum(1))
    return -(weights * log_probs).sum() / weights.sum() - way.contrast * of_rows.sum() / len(log_probs)


def after_other(row: dict) -> dict:
    """A row with the same completion after its other prompt."""
    prompt, completion = row["other_prompt"], row["input_ids"][prompt_length(row["labels"]) :]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


class PairCollator(DataCollatorForLanguageModeling):
    def torch_call(self, examples: list[dict]) -> dict:
        return super().torch_call(examples) | {"other": super().torch_call([after_other(row) for row in examples])}


class WayTrainer(InstructTrainer):
    way = Way()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._total_train_tokens += inputs["attention_mask"].sum().item()
        step = self.state.global_step - round(self.way.begin * self.state.max_steps)
        return loss_of(model, inputs, self.way if step >= 0 and step % self.way.every == 0 else Way())


def rows_of(data: Path, split: str) -> Dataset:
    """The encoded rows of a split, each with its `other_prompt`."""
    _, tokenizer, encoded = open_prepared(data)
    task, rows, prompts = task_of(data, None), open_rows(data)[split], []
    for row in rows:
        other = next(other for other in rows if other["ending"] != row["ending"])
        prompts.append(encode_prompt(tokenizer, task.exchanged("ending", row, other)["messages"][:-1]))
    return encoded[split].add_column("other_prompt", prompts)


def make_trainer(args, way: Way, seed: int, folder: Path, steps: int = -1) -> WayTrainer:
    keys = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"output_dir": str(folder), "max_steps": steps}
    keys |= {"seed": seed, "eval_strategy": "no", "report_to": "none", "remove_unused_columns": False}
    keys |= {"num_train_epochs": args.epochs} if args.epochs else {}
    config = SmallModelConfig(**{key: keys[key] for key in keys.keys() - OTHERS})
    inputs = load_inputs(RunArguments(str(args.dataset)), seed, ModelConfig(model_name_or_path=str(args.base)))
    rows, collator = rows_of(args.dataset, "train"), PairCollator(inputs.tokenizer.pad_token_id)
    given = {"processing_class": inputs.tokenizer, "train_dataset": rows, "data_collator": collator}
    trainer = open_trainer(WayTrainer, config, [], model=inputs.model, **given)
    trainer.way = way
    prepare_model(trainer)
    return trainer


def steps_of(args, way: Way) -> int:
    """The steps that take as long as the plain ones, by the median cost of a step in nine turns with a plain one."""
    trainer = make_trainer(args, way, 0, args.output_dir)
    loader, more = trainer.get_train_dataloader(), 0.0
    if way != Way():
        batch = next(iter(loader))
        losses = [partial(loss_of, trainer.model, batch, of) for of in (way, Way())]
        turns = [[seconds_of(trainer, loss, 1) for loss in losses] for _ in range(9)]
        more = statistics.median(seconds / plain for seconds, plain in turns) - 1
    return round(len(loader) * trainer.args.num_train_epochs / (1 + (1 - way.begin) / way.every * more))


def run(args, name: str, seed: int, steps: int, scoring: Scoring) -> dict:
    """Trains and measures; each metric is the mean over a prompt's answers, for each prompt, or one number for all."""
    folder = args.output_dir / f"{name}-{seed}"
    trainer = make_trainer(args, WAYS[name], seed, folder, steps)
    found = {"steps": steps, "seconds": trainer.train().metrics["train_runtime"]}
    model = finished(trainer, **Sampling().decoding()).eval()
    model.save_pretrained(folder)
    scoring.prompts.tokenizer.save_pretrained(folder)
    (folder / "answers.jsonl").unlink(missing_ok=True)
    prompts, journal = scoring.prompts, Journal(folder / "answers.jsonl", {})
    answering = Answering(prompts.tokenizer, prompts.ids, prompts.num_samples, Sampling(), 64, journal)
    answered = measure(model, f"{name} {seed}", prompts, answering)
    ratios = scoring.ratios(scoring.score(answered.answers))
    found |= {key: ratios[key].of_each.tolist() for key in OF_PROMPTS}
    return found | {key: float(answered.ratios[key].value()) for key in OF_ALL}


def table(results: dict[str, list[dict]]) -> str:
    """A line for each way: the means over its seeds, and its gain on the first way by each judge."""
    shown, (plain, *_) = ("steps", "seconds", *OF_PROMPTS, *OF_ALL), results.values()
    lines = [f"| way | {' | '.join(shown)} | points gained by either judge |", "|---" * (len(shown) + 2) + "|"]
    for name, runs in results.items():
        cells, gains = [name, *(f"{np.mean([of[key] for of in runs]):.4g}" for key in shown)], []
        for judge in JUDGES if runs is not plain else ():
            pair = [np.array([of[judge] for of in way]) for way in (plain, runs)]  # (seeds, prompts) of each
            gain = paired_difference(*(Ratio(of.sum(0), np.full(of.shape[1], float(len(of)))) for of in pair))
            value, low, high = (f"{100 * gain[key]:+.1f}" for key in ("value", "low", "high"))
            seeds = ", ".join(f"{100 * seed:+.1f}" for seed in (pair[1] - pair[0]).mean(1))
            gains.append(f"{value} ({low} to {high}; each seed {seeds})")
        lines.append(f"| {' | '.join([*cells, ' and '.join(gains)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/token_weights"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="gains are on the first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="of plain training (default: the quickstart's)")
    parser.add_argument("--num_prompts", type=int, default=200)
    args = parser.parse_args()
    quiet()
    prompts = open_prompts(args.dataset, None, "validation", args.num_prompts, SAMPLES)
    wordings = Wording(prompts.tokenizer, prompts.rows, prompts.train_rows)
    scoring = Scoring(prompts, prompts.task.scorer(prompts.train_rows, prompts.unseen_rows), wordings)
    made_with = {"--base": fingerprint(args.base), "--dataset or --num_prompts": fingerprint_of_prompts(prompts.ids)}
    journal = Journal(args.output_dir / "results.jsonl", made_with | {"--epochs": args.epochs}, "change --output_dir")
    for count, seed in enumerate(args.seeds, 1):
        for name in args.ways:
            timed, done = (repr(WAYS[name]), "steps"), (repr(WAYS[name]), seed)
            if timed not in journal.done:
                journal.add({timed: steps_of(args, WAYS[name])})
            if done not in journal.done:
                journal.add({done: run(args, name, seed, journal.done[timed], scoring)})
        found = {name: [journal.done[repr(WAYS[name]), seed] for seed in args.seeds[:count]] for name in args.ways}
        print(f"\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
