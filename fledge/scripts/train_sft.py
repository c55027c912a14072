"""A base and a dataset → an instruct model, through TRL's SFTTrainer, on completions only.

    accelerate launch train_sft.py --config recipes/quickstart/train.yaml
    python train_sft.py --model_name_or_path base --dataset data --output_dir model --num_train_epochs 3

Besides the keys below, every key of TRL's SFTConfig and ModelConfig works under its own name, among them
--learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps,
--save_strategy, --load_best_model_at_end, --report_to, --use_peft, --lora_r, --use_dora, --neftune_noise_alpha;
--help_all lists them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.folders import Output
from fledge.training import starting

if TYPE_CHECKING:
    from trl import ModelConfig

    from fledge.training.running import Inputs
    from fledge.training.trainer import SmallModelConfig


@dataclass
class RunArguments(starting.RunArguments):
    dataset: str = field(
        metadata={
            "help": "the folder that prepare_dataset.py wrote, or a table of messages or of instruction and response"
        }
    )
    template: str | None = field(
        default=None, metadata={"help": "chat template for a table (default: the base's own, or else alpaca)"}
    )


def main() -> Path:
    """Returns the folder it wrote."""
    return starting.start("train_sft.py", __doc__, RunArguments, config_kind, train)


def config_kind() -> "type[SmallModelConfig]":
    from fledge.training.trainer import SmallModelConfig

    return SmallModelConfig


def train(args: RunArguments, config: "SmallModelConfig", model_args: "ModelConfig", output: Output) -> None:
    from fledge.training.opening import early_stopping, open_trainer
    from fledge.training.resuming import find_checkpoint, tokens_seen
    from fledge.training.run_record import save_curve
    from fledge.training.running import open_run
    from fledge.training.trainer import InstructTrainer, limit_length, prepare_model
    from fledge.training.trial import time_needed

    # ------------------------------------------------------------ Load and check
    checkpoint = find_checkpoint(output, args.resume, args.overwrite)
    inputs = load_inputs(args, config.seed, model_args)
    config, cut = limit_length(config, inputs.model, inputs.rows)
    run = open_run(args, config, model_args, output, inputs, checkpoint)

    # ------------------------------------------------------------ Train
    trainer = open_trainer(
        InstructTrainer,
        run.config,
        [*run.callbacks, *early_stopping(config)],
        model=inputs.model,
        train_dataset=inputs.rows["train"],
        eval_dataset=inputs.rows["validation"] if config.eval_strategy != "no" else None,
        processing_class=inputs.tokenizer,
        peft_config=inputs.adapter,
    )
    run.notes += [prepare_model(trainer), *inputs.notes, *cut, time_needed(trainer, tokens_seen(checkpoint))]
    run.train(trainer, {"loss_curve.png": save_curve})


def load_inputs(args: RunArguments, seed: int, model_args: "ModelConfig") -> "Inputs":
    """Opens the base and the dataset, adds the template's new tokens, and freezes layers or adds an adapter.

    Raises:
        UserError: one of them cannot be used, or they do not fit together.
    """
    from fledge.models import context_of
    from fledge.resizing import add_rows
    from fledge.tokenizers import open_tokenizer
    from fledge.training.dataset import check_supervised, longest_row, open_dataset
    from fledge.training.running import Inputs, adapt
    from fledge.training.trainer import check_fit, open_base

    base, model = open_base(model_args, args.dropout)
    own = open_tokenizer(base)
    budget, tokenizer, rows, notes = open_dataset(args.dataset, own, args.template, context_of(model.config), seed)
    check_supervised(rows)
    check_fit(model, own, tokenizer, longest_row(rows))
    new_tokens = add_rows(model, tokenizer)
    adapter = adapt(args, model_args, model, new_tokens)
    return Inputs(base, model, tokenizer, rows, budget, new_tokens, adapter, notes)
