"""Evaluates a model while it learns from rewards, and keeps the best model within limits.

A model learns to please whatever rewards it. So at the start, every `eval_steps` and at the end it answers validation
prompts, and judges that give no rewards measure the reported metrics. Such an evaluation is a *look*. The saved model
is the best one that kept the limits, not the last one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from fledge.cli import writing
from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.evaluation.measuring import completion_nats, distinct_ratio, loss_ratios, supervised_text
from fledge.evaluation.prompts import Prompts, open_prompts
from fledge.evaluation.scoring import Scoring
from fledge.evaluation.wording import Wording
from fledge.generation.answers import answer_of, continue_each
from fledge.guards import check_overrides
from fledge.rewards.functions import Rewarder, RewardFunction, call_of, reward_functions, weights_of
from fledge.rewards.limits import Look, WatchArguments, best_of, broken, outside
from fledge.sampling import Sampling
from fledge.tasks import FOLLOWING
from fledge.training.attention import by_sdpa
from fledge.training.sharding import told_to_shard
from fledge.training.trainable import without_adapter

PREFIX = "watch/"
KEPT = f"{PREFIX}kept_step"
LOOKS = 10  # per run, without --eval_steps
BATCH = 64  # answers sampled at once


@dataclass
class Seen:
    """One answer to a prompt: its token ids, the mean KL of its tokens, and the nats of the prompt's reference."""

    ids: list[int]
    kl: float
    nats: torch.Tensor


class Watched:
    """The prompts of the looks, with the metrics and the rewards of their answers.

    Args:
        prompts: of the validation split, one answer each.
        functions: reward functions over the rows of `prompts`, with their weights.
    """

    def __init__(self, prompts: Prompts, functions: list[RewardFunction], weights: Sequence[float]):
        self.prompts, self.functions, self.weights = prompts, functions, weights
        scorer = prompts.task.scorer(prompts.train_rows, [])
        self.scoring = Scoring(prompts, scorer, Wording(prompts.tokenizer, prompts.rows, prompts.train_rows))
        self.texts = [supervised_text(prompts.tokenizer, row) for row in prompts.encoded]

    def see(
        self, model: PreTrainedModel, start: Callable[[], AbstractContextManager], numbers: list[int]
    ) -> dict[int, Seen]:
        """Answers the prompts with these numbers. `start()` is a context that yields the model before training."""
        prompts, tokenizer = self.prompts, self.prompts.tokenizer
        asked = [prompts.ids[number] for number in numbers]
        with by_sdpa(model):
            made = dict(continue_each(model, tokenizer.eos_token_id, asked, Sampling(), BATCH, numbers))
        rows = [
            {"input_ids": ids + made[number], "labels": [IGNORED] * len(ids) + made[number]}
            for number, ids in zip(numbers, asked, strict=True)
        ]
        nats = completion_nats(model, tokenizer, rows)
        references = completion_nats(model, tokenizer, [prompts.encoded[i] for i in numbers])
        with start() as first:
            of_start = completion_nats(first, tokenizer, rows)
        seen = {}
        for i, number in enumerate(numbers):
            ratio = nats[i] - of_start[i]  # log of the start's probability over the model's
            kl = (ratio.exp() - ratio - 1).mean()  # the estimate of TRL's own log (Schulman 2020)
            seen[number] = Seen(made[number], float(kl), references[i])
        return seen

    def figures(self, seen: dict[int, Seen], state: TrainerState) -> dict[str, float]:
        """All figures of a look, from the answers to all prompts."""
        prompts = self.prompts
        of_each = [seen[number] for number in range(len(prompts.rows))]
        answers = [answer_of(prompts.tokenizer, one.ids) for one in of_each]
        scores = self.scoring.score(answers)
        ratios = self.scoring.ratios(scores)
        ratios["distinct_2"] = distinct_ratio([answer.text for answer in answers], 1)
        ratios["completion_loss"] = loss_ratios([one.nats for one in of_each], self.texts)["completion_loss"]
        found = {name: float(ratio.value()) if ratio.denominator.any() else 0.0 for name, ratio in ratios.items()}
        if "coherence" in found:
            coherence = [score["coherence"] for score in scores]
            found["coherence_error"] = float(np.std(coherence) / np.sqrt(len(coherence)))
        given = call_of(prompts.rows, [answer.text for answer in answers], [one.ids for one in of_each], state)
        rewards = np.array([function(**given) for function in self.functions], dtype=float)  # None becomes NaN
        weighted = np.nansum(rewards * np.array(self.weights)[:, None], axis=0)
        for function, of_function in zip(self.functions, rewards, strict=True):
            if not np.isnan(of_function).all():
                found[f"rewards/{function.__name__}"] = float(np.nanmean(of_function))
        lengths = [len(one.ids) for one in of_each]
        found |= {
            "reward": float(weighted.mean()),
            "kl": float(np.average([one.kl for one in of_each], weights=lengths)),
        }
        return found


@check_overrides
class Watch(TrainerCallback):
    """Looks, keeps the best model, and stops a run that leaves the limits.

    The looks are in the trainer's log, so a resumed run has them. The best model so far is stored beside the
    checkpoints.

    Args:
        start: the model before training; None where the trainer has a reference, or an adapter to switch off.
    """

    def __init__(self, watched: Watched, limits: WatchArguments, start: PreTrainedModel | None):
        self.watched, self.limits, self.start = watched, limits, start
        self.reasons: list[str] = []
        self.seconds = 0.0

    def attach(self, trainer: Any) -> None:
        """Makes this watch the last callback of `trainer`, one of TRL's that may have a reference model."""
        self.trainer: Trainer = trainer
        if self.start is None and trainer.ref_model is not None:
            self.start = trainer.accelerator.unwrap_model(trainer.ref_model)
        trainer.add_callback(self)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun, self.seconds, self.is_interrupted = time.monotonic(), 0.0, False
        steps = args.eval_steps or 1 / LOOKS
        self.every = max(1, round(steps if steps >= 1 else steps * state.max_steps))
        seen = [look["step"] for look in looks_in(state.log_history)]
        if not seen or (state.global_step not in seen and state.global_step % self.every == 0):
            self._look(state, control)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_interrupted = control.should_training_stop and state.global_step < state.max_steps  # by a signal
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if is_due and not self.is_interrupted:
            self._look(state, control)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = self._best(state)
        if state.is_world_process_zero and best:
            self._keep_only(best["step"])

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_interrupted or not state.is_world_process_zero:  # only that process saves the model
            return
        best, looks = self._best(state), looks_in(state.log_history)
        if best and best["step"] != state.global_step:
            kept, model = load_file(self._file(best["step"])), self.trainer.accelerator.unwrap_model(self.trainer.model)
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in kept.items():
                    own[name].copy_(value)
        self._log({KEPT: best["step"] if best else state.global_step}, control)
        share = self.seconds / (time.monotonic() - self.begun)
        said = [*summary_lines(looks, best, self.reasons), f"Looking took {share:.0%} of the time."]
        print("\n".join(said), flush=True)

    def _best(self, state: TrainerState) -> Look | None:
        """The best look whose model is stored; a checkpoint that was copied elsewhere may lack it."""
        looks = looks_in(state.log_history)
        return best_of([look for look in looks if self._file(look["step"]).exists()], looks[0], self.limits)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        begun = time.monotonic()
        accelerator = self.trainer.accelerator
        model: Any = accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        numbers = range(accelerator.process_index, len(self.watched.prompts.rows), accelerator.num_processes)
        parts = gather_object([self.watched.see(without_adapter(model), lambda: self._start_of(model), list(numbers))])
        found = [self.watched.figures({k: v for part in parts for k, v in part.items()}, state)]
        broadcast_object_list(found)  # sums of floats may differ between machines, and all processes must stop together
        self._log({f"{PREFIX}{name}": value for name, value in found[0].items()}, control)
        model.train(training)
        looks = looks_in(state.log_history)
        if state.is_world_process_zero:
            print(said_of(looks[-1], looks[0], self.limits), flush=True)
            best = self._best(state)
            if not outside(looks[-1], looks[0], self.limits) and (not best or looks[-1][FOLLOWING] > best[FOLLOWING]):
                self._keep(model, looks[-1]["step"])
        self.reasons = broken(looks, self.limits)
        control.should_training_stop = control.should_training_stop or bool(self.reasons)
        self.seconds += time.monotonic() - begun

    @contextlib.contextmanager
    def _start_of(self, model: PreTrainedModel | PeftModel) -> Iterator[Any]:
        """The model as it was before training."""
        if self.start is not None:
            self.start.eval()
            yield self.start
            return
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            yield model.get_base_model()

    def _log(self, logs: dict[str, float], control: TrainerControl) -> None:
        """Logs figures through the trainer, before it logs its own step."""
        wanted = control.should_log
        self.trainer.log(logs)
        control.should_log = wanted

    def _file(self, step: float) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"best-{int(step)}.safetensors"

    def _keep(self, model: PreTrainedModel | PeftModel, step: float) -> None:
        """Saves the trained weights. The earlier best is kept until a checkpoint refers to this one."""
        file = self._file(step)
        with writing(file, "; make room and start again"):
            file.parent.mkdir(parents=True, exist_ok=True)
            trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
            save_file({name: value.detach().cpu().contiguous() for name, value in trained.items()}, file)
        if self.trainer.args.save_strategy == "no":
            self._keep_only(step)

    def _keep_only(self, step: float) -> None:
        for file in self._file(step).parent.glob("best-*.safetensors"):
            if file != self._file(step):
                file.unlink()


def looks_in(log_history: list[dict]) -> list[Look]:
    """The looks in a trainer's log, by step; of a repeated step only the last one counts."""
    found = {}
    for entry in log_history:
        if f"{PREFIX}{FOLLOWING}" in entry:
            figures = {key.removeprefix(PREFIX): value for key, value in entry.items() if key.startswith(PREFIX)}
            found[entry["step"]] = {"step": entry["step"], **figures}
    return [found[step] for step in sorted(found)]


def kept_step(log_history: list[dict]) -> int | None:
    """The step whose model is kept, in the log of a run that was watched to its end."""
    return next((entry[KEPT] for entry in reversed(log_history) if KEPT in entry), None)


def record_of(log_history: list[dict]) -> dict:
    """The entry of a watched run in `run.json`: the step of the kept model, and its gains."""
    looks, kept = looks_in(log_history), kept_step(log_history)
    at_kept = next((look for look in looks if look["step"] == kept), None)
    if at_kept is None:
        return {}
    gained = {name: [looks[0][name], at_kept[name]] for name in (FOLLOWING, "completion_loss", "distinct_2")}
    return {"watch": {"kept_step": kept, **gained}}


def said_of(look: Look, start: Look, limits: WatchArguments) -> str:
    """A line about a look."""
    line = (
        f"Looked at step {look['step']}: instruction following {look[FOLLOWING]:.1%}, reward {look['reward']:.3f}, "
        f"distinct-2 {look['distinct_2']:.1%}, completion loss {look['completion_loss']:.3f}, stopping "
        f"{look['eos_rate']:.1%}, {look['answer_tokens']:.0f} tokens an answer, KL {look['kl']:.3f}"
    )
    left = outside(look, start, limits)
    return f"{line}. Outside the limits: {'; '.join(left)}" if left else line


def summary_lines(looks: list[Look], best: Look | None, reasons: list[str]) -> list[str]:
    """Why a run stopped before its end, and which model is kept."""
    said = [f"Stopped at step {looks[-1]['step']}: {'; '.join(reasons)}."] if reasons else []
    if best is None:
        return [*said, "Kept the last model: none within the limits was found."]
    if best["step"] == 0:
        return [
            *said,
            "Kept the model of the start: no later one within the limits follows its instructions more often.",
        ]
    return [
        *said,
        f"Kept the model of step {best['step']}, the best within the limits: instruction following "
        f"{looks[0][FOLLOWING]:.1%} at the start, {best[FOLLOWING]:.1%} now.",
    ]


def watched_in(
    limits: WatchArguments,
    data: Path,
    task_file: str | None,
    weights: dict[str, float] | None = None,
    rewarder: Rewarder | None = None,
    only: Sequence[str] = (),
) -> Watched | None:
    """The validation prompts of the dataset `data` for a run's looks; `None` if the user wants no looks.

    `weights` are the rewards by name, by default the task's own. `rewarder` is that of a run that trains on the
    training split of `data`. `only` are the conditions of `open_prompts`.

    Raises:
        UserError: the dataset has no validation prompts, or `task_file` is not its task.
    """
    if not limits.watch_prompts:
        return None
    try:
        prompts = open_prompts(data, task_file, "validation", limits.watch_prompts, 1, only)
    except UserError as error:
        raise UserError(f"{error} Or train without being watched: --watch_prompts 0.") from error
    weights = weights or weights_of(prompts.task)
    rewarder = rewarder or Rewarder(prompts.task, prompts.train_rows)
    functions = reward_functions(rewarder, prompts.rows, prompts.tokenizer, list(weights))
    return Watched(prompts, functions, list(weights.values()))


def watch(watched: Watched | None, limits: WatchArguments, trainer: Any, start: PreTrainedModel | None) -> str:
    """Watches a run of `trainer`, unless `watched` is `None` or its weights are sharded; returns a line that says so.

    `start` is a copy of the model before training, for a trainer that has neither a reference nor an adapter.
    """
    if watched is None:
        return "Not watched: what is rewarded may rise while all else falls, and the last model is kept"
    if sharded := told_to_shard(trainer.args):
        return f"Not watched: {sharded} spreads the weights, and the last model is kept"
    Watch(watched, limits, start).attach(trainer)
    return f"Watched: {len(watched.prompts.rows)} validation prompts, answered at the start, on the way and at the end"


def without_reference(config: TrainingArguments, is_adapted: bool) -> bool:
    """Whether a trainer with this configuration keeps no model of the start, so that a copy is necessary."""
    keys = config.to_dict()
    return not is_adapted and (
        not keys["beta"] or keys["sync_ref_model"] or keys.get("precompute_ref_log_probs", False)
    )
