"""The configuration of GRPO: TRL's keys with defaults for small models, and checks before a run."""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl import GRPOConfig, GRPOTrainer

from fledge.encoding import prompt_length
from fledge.errors import UserError
from fledge.models import context_of
from fledge.rewards.functions import call_of
from fledge.training.configuration import SmallDefaults, with_values
from fledge.training.sharding import told_to_shard

# Keys that only TRL's own generation supports, with their defaults.
TRLS_OWN = {
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "min_p": None,
    "generation_kwargs": None,
    "chat_template_kwargs": None,
    "cache_implementation": None,
}


@dataclass
class SmallGrpoConfig(SmallDefaults, GRPOConfig):  # type: ignore[misc]  # gradient_checkpointing may be None
    """`GRPOConfig` with defaults for models of 1M to 200M parameters.

    TRL's default is a learning rate of 1e-6 for thousands of steps. A small model learns in tens of steps of 24 prompts
    with 8 answers each, at a rate a few hundred times as high; `beta` keeps it near the model of the start.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "learning rate schedule"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the prompts"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "answers in a forward pass and device"})
    gradient_accumulation_steps: int = field(
        default=24, metadata={"help": "forward passes a step: with 8 answers each, 24 prompts of 8 answers"}
    )
    num_generations: int | None = field(default=8, metadata={"help": "answers to a prompt, compared with one another"})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "longest answer in tokens (default: the longest of the training answers)"}
    )
    beta: float = field(default=0.15, metadata={"help": "price of the distance (KL) to the model at the start"})
    loss_type: str = field(default="dr_grpo", metadata={"help": "grpo, dr_grpo, dapo, …: how tokens are weighted"})
    scale_rewards: str = field(
        default="none", metadata={"help": "divide a group's rewards by their spread: group, batch or none"}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "answers that are sampled at once (default: 96 in bfloat16 on a CPU, else 64)"}
    )

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns would take from the rewards what they need; leave it out.")
        if self.eval_strategy != "no":
            raise UserError("--eval_strategy is not for rewards; --eval_steps says how often the model is looked at.")
        if self.num_generations and not (self.generation_batch_size or self.steps_per_generation):
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            answers = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
            if answers % self.num_generations:
                raise UserError(
                    f"{answers} answers a step are no whole number of groups of --num_generations "
                    f"{self.num_generations}; change --per_device_train_batch_size or --gradient_accumulation_steps."
                )
        super().__post_init__()


def why_not(config: SmallGrpoConfig) -> str | None:
    """The reason why TRL samples the answers; `None` if Fledge's loop does."""
    if "rollout_func" not in inspect.signature(GRPOTrainer).parameters:
        return "this release of TRL takes no other"
    asked = [key for key, usual in TRLS_OWN.items() if getattr(config, key) != usual]
    if asked:
        return f"--{asked[0]} is TRL's"
    return f"{told_to_shard(config)} spreads the weights" if told_to_shard(config) else None


def check_prompts(
    config: SmallGrpoConfig, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, count: int
) -> None:
    """Checks that a model with the tokenizer `own` answers `count` prompts of a dataset with `tokenizer`.

    Raises:
        UserError: it has no chat template or another one, or the prompts are fewer than one step takes.
    """
    check_template(own, tokenizer)
    assert config.generation_batch_size
    assert config.num_generations
    prompts = config.generation_batch_size // config.num_generations
    if count < prompts:
        raise UserError(
            f"The training split has {count} prompts and a step takes {prompts}; lower --gradient_accumulation_steps "
            "or --per_device_train_batch_size."
        )


def check_template(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a model with the tokenizer `own` was tuned to answer prompts as a dataset with `tokenizer` has them.

    Raises:
        UserError: it has no chat template or another one, or lacks tokens.
    """
    train_sft = "fine-tune it on the dataset with train_sft.py first"
    if own.chat_template is None:
        raise UserError(f"The model has no chat template, so it cannot answer a prompt yet; {train_sft}.")
    if own.chat_template != tokenizer.chat_template:
        raise UserError(f"The dataset was prepared with another chat template than the model's; {train_sft}.")
    if len(own) < len(tokenizer):
        raise UserError(f"The dataset has {len(tokenizer) - len(own)} tokens that the model lacks; {train_sft}.")


def check_rewards(
    functions: list[Callable], tokenizer: PreTrainedTokenizerBase, rows: list[dict], ids: Dataset
) -> None:
    """Rewards the references of the first `rows`, whose encoded form is `ids`, as TRL would reward answers.

    Raises:
        UserError: a function fails, or does not return a finite number or None for each answer.
    """
    count = min(4, len(rows))
    completions = [labels[prompt_length(labels) :] for labels in ids["labels"][:count]]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    given = call_of(rows[:count], texts, completions, TrainerState())
    for function in functions:
        name = function.__name__
        try:
            found = list(function(**given))
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"The reward {name} fails on a reference: {type(error).__name__}: {error}.") from error
        numbers = [value for value in found if value is not None]
        if len(found) != count or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise UserError(
                f"The reward {name} returned {found!r:.80} for {count} references; it must return a finite number, or "
                "None, for each."
            )


def fit_answers(config: SmallGrpoConfig, model: PreTrainedModel, rows: Dataset) -> tuple[SmallGrpoConfig, str]:
    """The configuration with a limit for answers to the prompts of encoded `rows`, and a line that says it.

    Raises:
        UserError: TRL's generation is to be used, and a prompt leaves no room for an answer.
    """
    prompts = [prompt_length(labels) for labels in rows["labels"]]
    longest = max(len(labels) - prompt for labels, prompt in zip(rows["labels"], prompts, strict=True))
    limit = config.max_completion_length or longest
    if why_not(config):  # Fledge's loop ends each answer where the context ends
        limit = min(limit, context_of(model.config) - max(prompts))
    return with_values(config, max_completion_length=limit), f"Answers of {limit} tokens at most"
