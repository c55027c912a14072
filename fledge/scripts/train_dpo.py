"""An instruct model and pairs of answers → a model that prefers the better ones, through TRL's DPOTrainer.

    python train_dpo.py --model_name_or_path model --dataset pairs --output_dir preferring
    accelerate launch train_dpo.py --config recipes/quickstart_dpo/dpo.yaml

Besides the keys below, every key of TRL's DPOConfig and ModelConfig works under its own name, among them
--learning_rate, --beta, --loss_type, --label_smoothing, --num_train_epochs, --max_steps, --per_device_train_batch_size,
--precompute_ref_log_probs, --save_strategy, --load_best_model_at_end, --report_to, --use_peft; --help_all lists them.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.folders import Output
from fledge.rewards.limits import WatchArguments
from fledge.training import starting

if TYPE_CHECKING:
    from trl import ModelConfig

    from fledge.rewards.preferences import SmallDpoConfig
    from fledge.training.running import Inputs


@dataclass
class DpoArguments(WatchArguments, starting.RunArguments):
    dataset: str = field(
        metadata={"help": "pairs of prepare_dataset.py --source answers, or a table of prompt, chosen and rejected"}
    )
    watch_dataset: str | None = field(
        default=None,
        metadata={"help": "a dataset folder; the model answers its validation prompts during the run (default: none)"},
    )
    task: str | None = field(
        default=None,
        metadata={"help": "the Python file of the task of --watch_dataset, if it is not shipped; its code is run"},
    )


def main() -> Path:
    """Returns the folder it wrote."""
    return starting.start("train_dpo.py", __doc__, DpoArguments, config_kind, train)


def config_kind() -> "type[SmallDpoConfig]":
    from fledge.rewards.preferences import SmallDpoConfig

    return SmallDpoConfig


def train(args: DpoArguments, config: "SmallDpoConfig", model_args: "ModelConfig", output: Output) -> None:
    from fledge.rewards.configuration import check_template
    from fledge.rewards.curves import save_looks, save_picture
    from fledge.rewards.preferences import PreferenceProgress, PreferenceTrainer, save_preference_curve
    from fledge.rewards.watch import watch, watched_in, without_reference
    from fledge.training.opening import early_stopping, open_trainer
    from fledge.training.resuming import find_checkpoint, tokens_seen
    from fledge.training.running import open_run
    from fledge.training.trainer import check_fit

    # ------------------------------------------------------------ Load and check
    checkpoint = find_checkpoint(output, args.resume, args.overwrite)
    inputs = load_inputs(args, config, model_args)
    watched = watched_in(args, Path(args.watch_dataset), args.task) if args.watch_dataset else None
    if watched:
        check_fit(inputs.model, inputs.tokenizer, watched.prompts.tokenizer, 0)
        check_template(inputs.tokenizer, watched.prompts.tokenizer)
    run = open_run(args, config, model_args, output, inputs, checkpoint)

    # ------------------------------------------------------------ Train
    start = copy.deepcopy(inputs.model) if watched and without_reference(config, bool(inputs.adapter)) else None
    trainer = open_trainer(
        PreferenceTrainer,
        run.config,
        [*run.callbacks, *early_stopping(config)],
        PreferenceProgress,
        model=inputs.model,
        train_dataset=inputs.rows["train"],
        eval_dataset=inputs.rows["validation"] if config.eval_strategy != "no" else None,
        processing_class=inputs.tokenizer,
        peft_config=inputs.adapter,
    )
    run.notes += [trainer.loss_line, *inputs.notes, trainer.time_needed(tokens_seen(checkpoint))]
    pictures = {"loss_curve.png": save_preference_curve}
    if watched:
        run.notes.append(watch(watched, args, trainer, start))
        pictures |= {"rewards.png": save_picture, "watch.jsonl": save_looks}
    run.train(trainer, pictures)


def load_inputs(args: DpoArguments, config: "SmallDpoConfig", model_args: "ModelConfig") -> "Inputs":
    """Opens the model and the pairs, and freezes layers or adds an adapter.

    Raises:
        UserError: one of them cannot be used, or they do not fit together.
    """
    from fledge.models import context_of
    from fledge.rewards.configuration import check_template
    from fledge.rewards.pairs import cut_pairs, longest_pair, open_pairs
    from fledge.tokenizers import open_tokenizer
    from fledge.training.dataset import check_supervised
    from fledge.training.running import Inputs, adapt
    from fledge.training.trainer import check_fit, open_base

    base, model = open_base(model_args, args.dropout)
    own = open_tokenizer(base)
    budget, tokenizer, rows, notes = open_pairs(args.dataset, own, context_of(model.config), config.seed)
    check_supervised(rows)
    check_fit(model, own, tokenizer, longest_pair(rows))
    check_template(own, tokenizer)
    notes += cut_pairs(rows, config.max_length)
    return Inputs(base, model, tokenizer, rows, budget, 0, adapt(args, model_args, model), notes)
