"""Extends TRL's `SFTTrainer`: defaults for small models, checks of the base and the dataset, and a faster loss."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import DatasetDict
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer
from typing_extensions import override

from fledge.errors import UserError
from fledge.guards import check_overrides
from fledge.hub import find_model
from fledge.memory import keep_freed_memory
from fledge.models import attention_of, check_vocabulary, context_of, open_config, open_model
from fledge.training.attention import LONGEST, NAME, attend_by_rows
from fledge.training.checked import CheckedTrainer
from fledge.training.configuration import SmallDefaults, with_values
from fledge.training.dataset import cut_rows
from fledge.training.loss import has_fused_head, has_plain_logits, score_supervised_only


@dataclass
class SmallModelConfig(SmallDefaults, SFTConfig):  # type: ignore[misc]  # gradient_checkpointing may be None
    """`SFTConfig` with defaults for models of 1M to 200M parameters.

    TRL's defaults are a learning rate of 2e-5 and a max_length beyond the context of most models trained from scratch.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or a share of all steps if below 1"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows per step and device"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "rows per step and device in evaluation"})
    max_length: int | None = field(
        default=None, metadata={"help": "truncate longer rows (not needed after prepare_dataset.py)"}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate on the validation split"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of similar length need less padding"}
    )


def open_base(arguments: ModelConfig, dropout: float) -> tuple[Path, PreTrainedModel]:
    """The folder of the base (downloaded if it is on the Hub) and the model, in float32, with `dropout` in all layers.

    Raises:
        UserError: there is no model.
    """
    name = arguments.model_name_or_path
    assert name
    base = find_model(name, arguments.model_revision)
    rates = [key for key in open_config(base, name).to_dict() if key.endswith(("pdrop", "dropout"))]
    settings: dict[str, Any] = dict.fromkeys(rates, dropout)
    if arguments.attn_implementation:
        settings["attn_implementation"] = arguments.attn_implementation
    return base, open_model(base, name=name, **settings)


def limit_length(
    config: SmallModelConfig, model: PreTrainedModel, rows: DatasetDict
) -> tuple[SmallModelConfig, list[str]]:
    """The configuration with a `max_length` within the model's context, and lines that say what is truncated.

    Raises:
        UserError: no row keeps a supervised token.
    """
    context = context_of(model.config)
    lines = []
    if config.max_length is not None and config.max_length > context:
        lines.append(f"Rows of {context} tokens at most, the model's context: max_length was {config.max_length}")
        config = with_values(config, max_length=context)
    if config.packing and config.max_length is None:
        lines.append(f"Packed into rows of {context} tokens, the model's context")
        config = with_values(config, max_length=context)
    return config, lines if config.packing else lines + cut_rows(rows, config.max_length)


def check_fit(
    model: PreTrainedModel, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, longest: int
) -> None:
    """Refuses data that was not prepared for this model.

    `tokenizer` is the dataset's: the model's `own` with a template's special tokens added, for which `add_rows` makes
    room. `longest` is the length of the longest row in tokens.

    Raises:
        UserError: its token ids or its row lengths do not fit.
    """
    context = context_of(model.config)
    check_vocabulary(model, own, model.name_or_path or "the model")
    ids = tokenizer.get_vocab()
    strange = next((token for token, number in own.get_vocab().items() if ids.get(token) != number), None)
    if strange is not None:
        raise UserError(
            f"The dataset was encoded with {len(tokenizer)} tokens and the model's tokenizer has {len(own)}, of which "
            f"{strange!r} has another id there; run prepare_dataset.py with this model's folder as --tokenizer."
        )
    if longest > context:
        raise UserError(
            f"The dataset has rows of {longest} tokens and the model's context is {context}; prepare it again."
        )


@check_overrides
class InstructTrainer(CheckedTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with the checks of `CheckedTrainer`. It also logs the perplexity."""

    args: SmallModelConfig

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for key in {"loss", "eval_loss"} & logs.keys():
            logs[key.replace("loss", "perplexity")] = math.exp(min(logs[key], 100))
        super().log(logs, start_time)


def prepare_model(trainer: SFTTrainer) -> str:
    """Makes a trainer's model score supervised positions only, if that is faster, and returns a line that says so."""
    return score_faster(trainer.accelerator.unwrap_model(trainer.model), trainer.args)


def score_faster(
    model: Any, args: TrainingArguments, temperature: float = 1.0, rows: int = 3, few_shapes: bool = False
) -> str:
    """Makes a model with TRL's fused head score supervised positions only, if that is faster.

    Returns a line about the choice. For the other arguments see `score_supervised_only`.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
        head: Any = model.get_output_embeddings()
        if not hasattr(head, "bias"):  # peft's wrapper around new tokens has no attribute bias
            head.bias = head.token_adapter.base_layer.bias
    if not has_fused_head(model):
        return "Loss: TRL's own, because this release of TRL has no fused head to replace"
    if args.device.type not in ("cpu", "mps"):
        return "Loss: TRL's fused head, which projects supervised positions only on this device"
    keep_freed_memory()
    if not has_plain_logits(model.config):
        return "Loss: TRL's head, because this architecture scales or caps its logits"
    score_supervised_only(model, temperature, rows, few_shapes)
    line = "Loss: supervised positions only, padding without a mask"
    if args.bf16 and args.device.type == "cpu" and attention_of(model) == "sdpa":
        attend_by_rows(model)
        line += f"; attention row by row up to a length of {LONGEST}"
    return line


def finished(trainer: Trainer, **decoding: Any) -> PreTrainedModel:
    """The trained model for inference: adapter merged, cache on, and `decoding` as its default generation settings."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    model.config.use_cache = True  # TRL turns it off for training
    if attention_of(model) == NAME:
        model.set_attn_implementation("sdpa")
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=pad, **decoding)
    return model
