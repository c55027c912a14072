"""Runs a fine-tuning from its checked inputs to the finished folder. All scripts that fine-tune share this."""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datasets import DatasetDict
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig

from fledge.cli import attempt, keep_origin, write_json
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output
from fledge.models import fingerprint
from fledge.sampling import Sampling
from fledge.training.checked import CheckedTrainer
from fledge.training.configuration import precision, use_all_threads, with_values
from fledge.training.lineage import Lineage, fingerprint_of_rows, go_on, settings_of
from fledge.training.opening import close_trainer
from fledge.training.resuming import StopOnSignal
from fledge.training.run_record import run_record, save_log
from fledge.training.starting import RunArguments
from fledge.training.trainable import adapter_config, adapter_record, freeze, trained_share
from fledge.training.trainer import finished


@dataclass
class Inputs:
    """The base and the dataset, checked to fit together."""

    base: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # the dataset's: the base's with the template's special tokens
    rows: DatasetDict
    budget: dict | None  # a table has none
    new_tokens: int
    adapter: LoraConfig | None
    notes: list[str]  # lines to print about the rows


@dataclass
class Run:
    """One run of a script that fine-tunes: its settings, its inputs, its output, and the lines to print at its start.

    `config` is that of the trainer: its checkpoints go to the folder of unfinished work.
    """

    args: RunArguments
    config: TrainingArguments
    inputs: Inputs
    output: Output
    checkpoint: str | None
    lineage: Lineage
    stop: StopOnSignal
    notes: list[str | None]

    @property
    def callbacks(self) -> list:
        return [self.stop, self.lineage]

    def train(self, trainer: CheckedTrainer, pictures: Mapping[str, Callable[[list[dict], Path], None]]) -> None:
        """Trains, saves the model, and adds the records of the run and the `pictures` (name → function of the log).

        On SIGTERM it saves a checkpoint and exits.
        """
        trained = {"new_tokens": self.inputs.new_tokens, "adapter": adapter_record(trainer.model)}
        if trainer.is_world_process_zero():
            self.announce(trainer)
        trainer.start_from(self.checkpoint)
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            self.stop.let_go()
        self.stop.leave_if_told(trainer.state)
        self.save(trainer)
        if trainer.is_world_process_zero():
            self.record(trainer, self.args.trained_parts | trained, pictures)
        close_trainer(trainer)

    def announce(self, trainer: CheckedTrainer) -> None:
        """Prints what will be trained, and each automatic choice with its reason."""
        print(trained_share(trainer.model))
        if self.inputs.new_tokens:
            print(f"New tokens {self.inputs.new_tokens}: the dataset's template has them, and the model learns them")
        config = trainer.args
        print(f"Processes {config.world_size}; precision {precision(config)}: {config.precision_reason}")
        print(*filter(None, self.notes), sep="\n")
        if self.args.resume:
            found = self.checkpoint
            print(f"Going on from {found}" if found else "A fresh start: there is no complete checkpoint")
        sys.stdout.flush()

    def save(self, trainer: CheckedTrainer) -> None:
        """Saves the model before everything else; only a full disk can make this fail."""
        inputs, output = self.inputs, self.output
        # All processes take part: each may hold a shard of the weights.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.is_world_process_zero():
            return
        with output.staged() as folder:
            adapter = isinstance(trainer.model, PeftModel)
            if adapter:
                trainer.model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
            # The default decoding of evaluate_model.py. With greedy decoding a small model repeats itself.
            model = finished(trainer, **Sampling().decoding())
            model.save_pretrained(folder, state_dict=None if adapter else weights)
            inputs.tokenizer.save_pretrained(folder)
            keep_origin(inputs.base, folder)
            if inputs.budget:
                write_json(folder / "budget.json", inputs.budget)
            curves, emissions = output.work / "runs", output.work / "emissions.csv"  # written by trackers
            if curves.is_dir():
                attempt(f"{output.path / 'runs'}", lambda: shutil.copytree(curves, folder / "runs"))
            if emissions.exists():
                attempt(f"{output.path / 'emissions.csv'}", lambda: shutil.copy(emissions, folder))

    def record(
        self,
        trainer: CheckedTrainer,
        trained: dict,
        pictures: Mapping[str, Callable[[list[dict], Path], None]],
    ) -> None:
        """Adds the log, `run.json` and the pictures to the folder of the finished model."""
        history, output = trainer.state.log_history, self.output
        output.add("training_log.jsonl", lambda folder: save_log(history, folder))
        made = attempt("The record of the run", lambda: run_record(trainer, self.inputs.rows, trained))
        if made:
            output.add("run.json", lambda folder: write_json(folder / "run.json", made))
            print(f"Trained {made['steps']} steps in {made['seconds']:.0f} s, {made['tokens_per_second']:,} tokens/s.")
            for said in trainer.summary_lines(made):
                print(said)
        for name, draw in pictures.items():
            output.add(name, partial(draw, history))
        shown = " and ".join(pictures)
        print(f"{output.path} holds the model; see its {shown}.")
        if self.inputs.budget is None:  # a table has no test split, and no task that scores answers
            print(f"Next: {next_command('generate.py', {'model': output.path}, {'prompt': 'PROMPT'})}")
            return
        used = {"model": output.path, "base": self.inputs.base, "dataset": self.args.dataset}
        suggested = {"output_dir": str(output.path.parent / "evaluation")}
        if self.inputs.budget.get("keep"):  # a model's own answers, on which none is evaluated
            used["dataset"], suggested["dataset"] = None, "DATASET"
        print(f"Next: {next_command('evaluate_model.py', used, suggested)}")


def adapt(
    args: RunArguments, model_args: ModelConfig, model: PreTrainedModel, new_tokens: int = 0
) -> LoraConfig | None:
    """Freezes the requested layers and modules, or returns the requested adapter, which freezes all other weights.

    Raises:
        UserError: both are requested, or a layer or module to freeze does not exist.
    """
    adapter = adapter_config(model_args, model, new_tokens)
    if adapter and (args.freeze_layers or args.freeze_modules):
        raise UserError("An adapter freezes all that it does not add; leave out --freeze_layers and --freeze_modules.")
    freeze(model, args.freeze_layers, args.freeze_modules, new_tokens)
    return adapter


def open_run(
    args: RunArguments,
    config: TrainingArguments,
    model_args: ModelConfig,
    output: Output,
    inputs: Inputs,
    checkpoint: str | None,
    **made_with: object,
) -> Run:
    """Opens the run in `output`, which resumes from `checkpoint` if there is one.

    All checks of the inputs come before this: from here on, `output` is written to. `made_with` is what the weights
    depend on beside the configuration, the base and the rows.

    Raises:
        UserError: the checkpoint was made with other settings, or there is not enough room on the disk.
    """
    notes: list[str | None] = [use_all_threads(config)]
    # Checkpoints go to the folder of unfinished work, so a finished model is never half-written.
    config = with_values(config, output_dir=str(output.work))
    adapting = {key: value for key, value in asdict(model_args).items() if model_args.use_peft and "lora" in key}
    adapting |= {key: getattr(model_args, key) for key in ("use_peft", "use_dora")}
    made_from = {"base": fingerprint(inputs.base), "data": fingerprint_of_rows(inputs.rows["train"])}
    settings = settings_of(config, **args.trained_parts, **adapting, **made_from, **made_with)
    lineage = go_on(checkpoint, settings, args.resume_with_changes)
    output.check_room(4 * inputs.model.num_parameters())  # float32
    output.begin_work(checkpoint)
    return Run(args, config, inputs, output, checkpoint, lineage, StopOnSignal(), notes)
