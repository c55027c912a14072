"""Refuses what transformers and TRL silently accept: numbers out of range, keys without effect."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import ModelConfig

from fledge.errors import UserError
from fledge.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges

BELOW_ONE = Range(at_least=0, below=1)
SHARE = Range(above=0, at_most=1)
RATE = Range(at_least=0, at_most=1)
PORT = Range(at_least=1, below=2**16)
# Keys of transformers' TrainingArguments, TRL's configurations and ModelConfig.
RANGES = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(at_least=1, besides=-1),  # -1: as many as num_train_epochs makes
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "label_smoothing_factor": BELOW_ONE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "eval_accumulation_steps": AT_LEAST_ONE,
    "max_length": Range(at_least=2),  # a token to read and one to predict
    "pad_to_multiple_of": AT_LEAST_ONE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
    "early_stopping_patience": AT_LEAST_ONE,
    "torch_empty_cache_steps": AT_LEAST_ONE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": AT_LEAST_ONE,
    "dataset_num_proc": AT_LEAST_ONE,
    "ddp_bucket_cap_mb": AT_LEAST_ONE,
    "ddp_timeout": AT_LEAST_ONE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "local_rank": Range(at_least=-1),
    "seed": SEED,
    "data_seed": SEED,
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": AT_LEAST_ONE,
    "lora_dropout": BELOW_ONE,
    "dropout": BELOW_ONE,
    # DPOConfig's.
    "precompute_ref_batch_size": AT_LEAST_ONE,
    "ld_alpha": Range(at_least=0, at_most=1),
    "label_smoothing": BELOW_ONE,
    "discopop_tau": POSITIVE,
    # GRPOConfig's.
    "num_generations": Range(at_least=2),  # a single answer cannot be compared with another
    "num_generations_eval": AT_LEAST_ONE,
    "max_completion_length": AT_LEAST_ONE,
    "generation_batch_size": AT_LEAST_ONE,
    "steps_per_generation": AT_LEAST_ONE,
    "rollout_batch_size": AT_LEAST_ONE,
    "temperature": POSITIVE,
    "top_p": SHARE,
    "top_k": NOT_NEGATIVE,
    "min_p": Range(at_least=0, at_most=1),
    "repetition_penalty": POSITIVE,
    "beta": NOT_NEGATIVE,
    "num_iterations": AT_LEAST_ONE,
    "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": POSITIVE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": AT_LEAST_ONE,
    "top_entropy_quantile": SHARE,
    "off_policy_mask_threshold": NOT_NEGATIVE,
    "max_tool_calling_iterations": AT_LEAST_ONE,
    "num_completions_to_print": AT_LEAST_ONE,
    **dict.fromkeys(("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"), NOT_NEGATIVE),
    "entropy_target": NOT_NEGATIVE,
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), POSITIVE),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), NOT_NEGATIVE),
    "vllm_server_port": PORT,
    "vllm_group_port": PORT,
    "vllm_server_timeout": POSITIVE,
    "vllm_gpu_memory_utilization": SHARE,
    "vllm_max_model_length": AT_LEAST_ONE,
    "vllm_tensor_parallel_size": AT_LEAST_ONE,
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), NOT_NEGATIVE),
    "vllm_importance_sampling_cap": NOT_NEGATIVE,
    "watch_prompts": NOT_NEGATIVE,
    "watch_patience": NOT_NEGATIVE,
    "max_distinct_2_drop": RATE,
    "max_loss_rise": NOT_NEGATIVE,
    "max_coherence_drop": RATE,
    "max_same_ending_rise": RATE,
    "min_eos_rate": RATE,
}
NO_QUANTISATION = "models of this size are trained in float32; leave it out"
ENCODED = "the data is encoded before TRL sees it; prepare_dataset.py and --template decide this"
WITHOUT_EFFECT = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "dtype"), NO_QUANTISATION),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), NO_QUANTISATION),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "assistant_only_loss", "completion_only_loss"), ENCODED),
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), ENCODED),
    "model_init_kwargs": "Fledge opens the model itself; leave it out",
    "max_tool_calling_iterations": "no task of Fledge calls tools; leave it out",
    "trust_remote_code": "Fledge runs no code from a model's folder; leave it out",
}
TRACK = ("trackio", "tensorboard")  # installed by the extra `track`


@contextlib.contextmanager
def said_in_words(keys: str = "") -> Iterator[None]:
    """Turns errors of transformers, TRL, peft, DeepSpeed and trackers into a `UserError` with their message.

    `keys` begins the message where only these can be the cause; a `TypeError` is then theirs, too.

    Raises:
        UserError: one of them refused its arguments.
    """
    try:
        yield
    except (ImportError, ValueError, RuntimeError, OSError, TypeError) as error:
        if isinstance(error, TypeError) and not keys:
            raise
        raise UserError(f"{keys}{': ' if keys else ''}{' '.join(str(error).split())}") from error


def check_effect(*configs: TrainingArguments | ModelConfig) -> None:
    """Checks that every key that was given has an effect.

    Raises:
        UserError: a key is given that would be ignored.
    """
    for config in configs:
        for entry in fields(config):
            key, value = entry.name, getattr(config, entry.name)
            if key in WITHOUT_EFFECT and value != entry.default:
                raise UserError(f"--{key} {value} would have no effect: {WITHOUT_EFFECT[key]}.")


def check_training(config: TrainingArguments) -> None:
    """Checks what can be checked before a model or data is opened.

    Raises:
        UserError: a number is out of range, a tracker is unknown or not installed, or Trainer is to send checkpoints
            to the Hub.
    """
    check_ranges(config, RANGES)
    if config.push_to_hub:
        raise UserError("--push_to_hub sends unchecked checkpoints; train without it, and publish.py sends the model.")
    wanted = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    for tracker in set(wanted) - {"none", "all", *get_available_reporting_integrations()}:
        if tracker not in INTEGRATION_TO_CALLBACK:  # a package of that name would be a stranger's
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to {tracker} is unknown; transformers knows {known}, and none.")
        package = "'fledge-gpt[track]'" if tracker in TRACK else tracker
        raise UserError(
            f"--report_to {tracker} needs a package that is missing; pip install {package}, or leave it out."
        )
