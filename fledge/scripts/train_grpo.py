"""An instruct model and its prompts → a model that follows them better, through TRL's GRPOTrainer.

    python train_grpo.py --model_name_or_path model --dataset data --output_dir rewarded --max_steps 20
    accelerate launch train_grpo.py --config recipes/quickstart_grpo/grpo.yaml

The model answers each prompt several times, its task rewards the answers, and answers with a higher reward become more
likely. Besides the keys below, every key of TRL's GRPOConfig and ModelConfig works under its own name, among them
--learning_rate, --max_steps, --num_generations, --per_device_train_batch_size, --gradient_accumulation_steps, --beta,
--temperature, --max_completion_length, --reward_weights, --loss_type, --save_strategy, --report_to, --use_peft;
--help_all lists them.
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

    from fledge.rewards.configuration import SmallGrpoConfig
    from fledge.training.running import Inputs


@dataclass
class GrpoArguments(WatchArguments, starting.RunArguments):
    dataset: str = field(
        metadata={"help": "the folder that prepare_dataset.py wrote; the model answers its training prompts"}
    )
    only: list[str] = field(
        default_factory=list, metadata={"help": "use only these prompts: COLUMN=VALUE, as in kind=words"}
    )
    task: str | None = field(
        default=None, metadata={"help": "the Python file of a task that is not shipped; its code is run"}
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "rewards of the task, by name (default: all), or functions of your own, file.py:function"},
    )


def main() -> Path:
    """Returns the folder it wrote."""
    return starting.start("train_grpo.py", __doc__, GrpoArguments, config_kind, train)


def config_kind() -> "type[SmallGrpoConfig]":
    from fledge.rewards.configuration import SmallGrpoConfig

    return SmallGrpoConfig


def train(args: GrpoArguments, config: "SmallGrpoConfig", model_args: "ModelConfig", output: Output) -> None:
    from fledge.encoding import numbers_of, open_rows
    from fledge.evaluation.prompts import task_of
    from fledge.rewards.configuration import check_rewards
    from fledge.rewards.curves import RewardProgress, save_looks, save_picture
    from fledge.rewards.functions import Rewarder, chosen_rewards, reward_functions
    from fledge.rewards.rollouts import Rollouts
    from fledge.rewards.trainer import SmallGrpoTrainer, StopWhenDead
    from fledge.rewards.watch import watch, watched_in, without_reference
    from fledge.training.configuration import with_values
    from fledge.training.opening import open_trainer
    from fledge.training.resuming import find_checkpoint
    from fledge.training.running import open_run

    # ------------------------------------------------------------ The task and its rewards
    data = Path(args.dataset)
    task = task_of(data, args.task)
    weights = chosen_rewards(task, args.rewards, config.reward_weights)
    config = with_values(config, reward_weights=list(weights.values()))
    rows = open_rows(data)["train"]
    rewarder = Rewarder(task, rows)
    numbers = numbers_of(rows, args.only)
    rows = [rows[number] for number in numbers]
    watched = watched_in(args, data, args.task, weights, rewarder, args.only)

    # ------------------------------------------------------------ Load and check
    checkpoint = find_checkpoint(output, args.resume, args.overwrite)
    inputs, config = load_inputs(args, config, model_args, numbers)
    functions = reward_functions(rewarder, rows, inputs.tokenizer, list(weights))
    check_rewards(functions, inputs.tokenizer, rows, inputs.rows["train"])
    run = open_run(args, config, model_args, output, inputs, checkpoint, rewards=weights, only=args.only)

    # ------------------------------------------------------------ Train
    prompts = [row["messages"][:-1] for row in rows]
    start = copy.deepcopy(inputs.model) if watched and without_reference(config, bool(inputs.adapter)) else None
    trainer = open_trainer(
        SmallGrpoTrainer,
        run.config,
        [*run.callbacks, StopWhenDead()],
        RewardProgress,
        model=inputs.model,
        prompts=prompts,
        reward_funcs=functions,
        rollouts=Rollouts(inputs.rows["train"], prompts),
        processing_class=inputs.tokenizer,
        peft_config=inputs.adapter,
    )
    run.notes += [trainer.sampling_line, trainer.loss_line, watch(watched, args, trainer, start), *inputs.notes]
    run.train(trainer, {"rewards.png": save_picture, "watch.jsonl": save_looks})


def load_inputs(
    args: GrpoArguments, config: "SmallGrpoConfig", model_args: "ModelConfig", numbers: list[int]
) -> "tuple[Inputs, SmallGrpoConfig]":
    """Opens the model and the dataset, with only the training rows of these `numbers`.

    The returned configuration has the longest answer that model and rows allow.

    Raises:
        UserError: one of them cannot be used, they do not fit together, or the model cannot answer the prompts.
    """
    from fledge.encoding import open_prepared
    from fledge.rewards.configuration import check_prompts, fit_answers
    from fledge.tokenizers import open_tokenizer
    from fledge.training.dataset import check_supervised, longest_row
    from fledge.training.running import Inputs, adapt
    from fledge.training.trainer import check_fit, open_base

    base, model = open_base(model_args, args.dropout)
    own = open_tokenizer(base)
    budget, tokenizer, rows = open_prepared(Path(args.dataset))
    if args.only:
        rows["train"] = rows["train"].select(numbers)
    check_supervised(rows)
    check_fit(model, own, tokenizer, longest_row(rows))
    check_prompts(config, own, tokenizer, len(rows["train"]))
    config, line = fit_answers(config, model, rows["train"])
    adapter = adapt(args, model_args, model)
    return Inputs(base, model, tokenizer, rows, budget, 0, adapter, [line]), config
