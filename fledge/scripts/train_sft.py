"""A base and a dataset → an instruct model, through TRL's SFTTrainer, on completions only.

    accelerate launch train_sft.py --config recipes/quickstart/train.yaml
    python train_sft.py --model_name_or_path base --dataset data --output_dir model --num_train_epochs 3

Besides the keys below, every key of TRL's SFTConfig and ModelConfig works under its own name, among them
--learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps,
--save_strategy, --load_best_model_at_end, --report_to, --use_peft, --lora_r, --use_dora, --neftune_noise_alpha;
--help_all lists them.
"""

import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.cli import UserError, attempt, keep_origin, parse, write_json
from fledge.commands import command
from fledge.folders import Output, claimed
from fledge.hub import find_model
from fledge.ranges import check_ranges
from fledge.sampling import Sampling
from fledge.terminal import quiet

if TYPE_CHECKING:
    from datasets import DatasetDict
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from fledge.training.trainer import InstructTrainer, SmallModelConfig


@dataclass
class BaseArguments:
    """Two keys of TRL's ModelConfig, which takes seconds to import."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "the base, a folder or a model of the Hub"})
    model_revision: str = field(default="main", metadata={"help": "its revision on the Hub (default main)"})


@dataclass
class RunArguments:
    dataset: str = field(
        metadata={"help": "a folder of prepare_dataset.py, or a table of messages or of instruction and response"}
    )
    template: str | None = field(
        default=None, metadata={"help": "chat template for a table, when the base has none (then alpaca) or another"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout everywhere; a short fine-tuning wants none"})
    freeze_layers: int = field(
        default=0, metadata={"help": "freeze the first N blocks and the embeddings; the last N if negative"}
    )
    freeze_modules: list[str] = field(default_factory=list, metadata={"help": "freeze modules by name, such as wte"})
    resume_with_changes: bool = field(
        default=False, metadata={"help": "go on although data or settings are others than the checkpoint's"}
    )
    resume: str | None = field(
        default=None, metadata={"help": "auto: go on from the newest checkpoint in output_dir, if any; or a checkpoint"}
    )
    smoke: bool = field(default=False, metadata={"help": "three steps of the recipe, into output_dir-smoke"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier model in output_dir"})


def main() -> Path:
    """Returns the folder it wrote."""
    if {"-h", "--help"} & set(sys.argv):  # TRL's own keys take seconds to import
        parse(sys.argv[1:], BaseArguments, RunArguments, description=__doc__)
    arguments = ["--help" if argument == "--help_all" else argument for argument in sys.argv[1:]]
    if "--help" not in arguments:
        (named,) = parse(arguments, BaseArguments, partly=True)
        if not named.model_name_or_path:
            raise UserError("--model_name_or_path is missing; name the base, a folder or a model of the Hub.")
        find_model(named.model_name_or_path, named.model_revision)

    from trl import ModelConfig

    from fledge.training.settings import RANGES, check_effect
    from fledge.training.trainer import SmallModelConfig, check_processes, smoke

    args, config, model_args = parse(arguments, RunArguments, SmallModelConfig, ModelConfig, description=__doc__)
    for given in (args, model_args):
        check_ranges(given, RANGES)
    check_effect(config, model_args)
    quiet()
    if args.smoke:
        args, config = replace(args, overwrite=True), smoke(config)
    check_processes(config)
    inputs = {"--dataset": args.dataset, "--model_name_or_path": model_args.model_name_or_path}
    with claimed(config.output_dir, "train_sft.py", None, inputs, is_main=config.process_index == 0) as output:
        train(args, config, model_args, output)
    return output.path


@dataclass
class Inputs:
    """The base and the dataset, checked to fit together."""

    base: Path
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"  # the dataset's: the base's with the template's special tokens
    rows: "DatasetDict"
    budget: dict | None  # a table has none
    new_tokens: int
    adapter: "LoraConfig | None"
    notes: list[str]  # what the reader should know about the rows


def train(args: RunArguments, config: "SmallModelConfig", model_args: "ModelConfig", output: Output) -> None:
    from fledge.training.lineage import go_on
    from fledge.training.resuming import StopOnSignal, find_checkpoint, tokens_seen
    from fledge.training.trainable import adapter_record
    from fledge.training.trainer import limit_length, prepare_model, use_all_threads, with_values
    from fledge.training.trial import time_needed

    # ------------------------------------------------------------ Load and check
    checkpoint = find_checkpoint(output, args.resume, args.overwrite)
    notes = [use_all_threads(config)]
    inputs = load_inputs(args, config.seed, model_args)
    # Checkpoints of an unfinished run lie in a folder of their own, so a finished model is never half-written.
    config = with_values(config, output_dir=str(output.work))
    config, cut = limit_length(config, inputs.model, inputs.rows)
    lineage = go_on(checkpoint, settings(args, config, model_args, inputs), args.resume_with_changes)
    output.check_room(4 * inputs.model.num_parameters())  # float32
    output.begin_work(checkpoint)  # only now, when all of the input is known to be good

    # ------------------------------------------------------------ Train
    stop = StopOnSignal()
    trainer = make_trainer(config, inputs, [stop, lineage])
    notes += [prepare_model(trainer), *inputs.notes, *cut, time_needed(trainer, tokens_seen(checkpoint))]
    trained = trained_parts(args) | {"new_tokens": inputs.new_tokens, "adapter": adapter_record(trainer.model)}
    if trainer.is_world_process_zero():
        announce(trainer, inputs.new_tokens, notes)
        if args.resume:
            print(f"Going on from {checkpoint}" if checkpoint else "A fresh start: there is no complete checkpoint")
        sys.stdout.flush()
    trainer.start_from(checkpoint)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    stop.leave_if_told(trainer.state)
    seconds = time.monotonic() - start

    # ------------------------------------------------------------ Save
    save(trainer, output, inputs)
    if trainer.is_world_process_zero():
        record(trainer, output, seconds, inputs, trained)
    trainer.accelerator.wait_for_everyone()  # none leaves while another still needs it
    attempt("The end of tracking", trainer.end)


def load_inputs(args: RunArguments, seed: int, model_args: "ModelConfig") -> Inputs:
    """Opens the base and the dataset, adds the template's new tokens to the base, and freezes what shall stay.

    Raises:
        UserError: one of them cannot be used, or they do not fit together.
    """
    from fledge.models import context_of
    from fledge.resizing import add_rows
    from fledge.tokenizers import open_tokenizer
    from fledge.training.dataset import check_supervised, longest_row, open_dataset
    from fledge.training.trainable import adapter_config, freeze
    from fledge.training.trainer import check_fit, open_base

    base, model = open_base(model_args, args.dropout)
    own = open_tokenizer(base)
    budget, tokenizer, rows, notes = open_dataset(args.dataset, own, args.template, context_of(model.config), seed)
    check_supervised(rows)
    check_fit(model, own, tokenizer, longest_row(rows))
    new_tokens = add_rows(model, tokenizer)
    adapter = adapter_config(model_args, model, new_tokens)
    if adapter and (args.freeze_layers or args.freeze_modules):
        raise UserError("An adapter freezes all that it does not add; leave out --freeze_layers and --freeze_modules.")
    freeze(model, args.freeze_layers, args.freeze_modules, new_tokens)
    return Inputs(base, model, tokenizer, rows, budget, new_tokens, adapter, notes)


def settings(args: RunArguments, config: "SmallModelConfig", model_args: "ModelConfig", inputs: Inputs) -> dict:
    """Everything that the weights of this run depend on. A resumed run is compared with it."""
    from fledge.models import fingerprint
    from fledge.training.lineage import fingerprint_of_rows, settings_of

    adapting = {key: value for key, value in asdict(model_args).items() if model_args.use_peft and "lora" in key}
    adapting |= {key: getattr(model_args, key) for key in ("use_peft", "use_dora")}
    made_from = {"base": fingerprint(inputs.base), "data": fingerprint_of_rows(inputs.rows["train"])}
    return settings_of(config, **trained_parts(args), **adapting, **made_from)


def trained_parts(args: RunArguments) -> dict:
    return {"dropout": args.dropout, "freeze_layers": args.freeze_layers, "freeze_modules": args.freeze_modules}


def make_trainer(config: "SmallModelConfig", inputs: Inputs, callbacks: list) -> "InstructTrainer":
    from transformers import EarlyStoppingCallback

    from fledge.training.opening import open_trainer
    from fledge.training.trainer import InstructTrainer

    if config.early_stopping_patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(config.early_stopping_patience)]
    return open_trainer(
        InstructTrainer,
        config,
        callbacks,
        model=inputs.model,
        train_dataset=inputs.rows["train"],
        eval_dataset=inputs.rows["validation"] if config.eval_strategy != "no" else None,
        processing_class=inputs.tokenizer,
        peft_config=inputs.adapter,
    )


def announce(trainer: "InstructTrainer", new_tokens: int, notes: list[str | None]) -> None:
    """Prints what will be trained, with what was chosen automatically and why."""
    from fledge.training.trainable import trained_share
    from fledge.training.trainer import precision

    print(trained_share(trainer.model))
    if new_tokens:
        print(f"New tokens {new_tokens}: the dataset's template has them, and the model learns them")
    config = trainer.args
    print(f"Processes {config.world_size}; precision {precision(config)}: {config.precision_reason}")
    print(*filter(None, notes), sep="\n")


def save(trainer: "InstructTrainer", output: Output, inputs: Inputs) -> None:
    """Puts the model into place: the weights first, and nothing that may fail for another reason than the disk."""
    from peft import PeftModel

    from fledge.training.trainer import finished

    # Asked of all processes, which may hold a part of the weights each.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    with output.staged() as folder:
        adapter = isinstance(trainer.model, PeftModel)
        if adapter:
            trainer.model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        # What evaluate_model.py measures with, unless told otherwise. Greedy, a small model repeats itself.
        model = finished(trainer, **Sampling().decoding())
        model.save_pretrained(folder, state_dict=None if adapter else weights)
        trainer.processing_class.save_pretrained(folder)
        keep_origin(inputs.base, folder)
        if inputs.budget:
            write_json(folder / "budget.json", inputs.budget)
        curves, emissions = output.work / "runs", output.work / "emissions.csv"  # what trackers have been writing
        if curves.is_dir():
            attempt(f"{output.path / 'runs'}", lambda: shutil.copytree(curves, folder / "runs"))
        if emissions.exists():
            attempt(f"{output.path / 'emissions.csv'}", lambda: shutil.copy(emissions, folder))


def record(trainer: "InstructTrainer", output: Output, seconds: float, inputs: Inputs, trained: dict) -> None:
    """Adds the log, the record of the run and the picture of the loss to the finished model."""
    from fledge.training.run_record import run_record, save_curve, save_log

    history = trainer.state.log_history
    output.add("training_log.jsonl", lambda folder: save_log(history, folder))
    made = attempt("The record of the run", lambda: run_record(trainer, seconds, inputs.rows, trained))
    if made:
        output.add("run.json", lambda folder: write_json(folder / "run.json", made))
        print(f"Trained {made['steps']} steps in {made['seconds']:.0f} s, {made['tokens_per_second']:,} tokens/s.")
        if made["first_loss"] is not None:  # --logging_strategy no
            print(f"Loss {made['first_loss']:.3f} to {made['last_loss']:.3f}.")
    output.add("loss_curve.png", lambda folder: save_curve(history, folder, "completion loss"))
    print(f"{output.path} holds the model; its loss_curve.png shows the way. Next: {command('evaluate_model.py')}")
