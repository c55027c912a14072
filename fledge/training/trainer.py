"""What Fledge adds to TRL's `SFTTrainer`: defaults for small models, automatic choices with reasons, safe stops."""

import copy
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from datasets import DatasetDict
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput
from trl import ModelConfig, SFTConfig, SFTTrainer
from typing_extensions import override

from fledge.cli import UserError
from fledge.cpu import cores, multiplies_bf16
from fledge.guards import check_overrides, missing
from fledge.hub import find_model
from fledge.memory import keep_freed_memory
from fledge.models import attention_of, check_vocabulary, context_of, open_config, open_model
from fledge.training.attention import LONGEST, NAME, attend_by_rows
from fledge.training.dataset import cut_rows
from fledge.training.lineage import load_optimizer
from fledge.training.loss import has_fused_head, has_plain_logits, score_supervised_only
from fledge.training.resuming import newest_checkpoint, tokens_seen
from fledge.training.settings import check_training, said_in_words
from fledge.training.sharding import check_deepspeed

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass
class SmallModelConfig(SFTConfig):
    """`SFTConfig` with the defaults a model of 1M to 200M parameters wants.

    TRL's own are made for billions of parameters: gradient checkpointing, a rate of 2e-5, and a max_length beyond the
    context of most models trained from scratch.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or a share of all steps if below 1"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows a step and device"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "rows a step and device in evaluation"})
    # TRL switches it on, and transformers is renaming it: None leaves it off under either name, without a warning.
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # see above
        default=None, metadata={"help": "trade time for memory"}
    )
    max_length: int | None = field(default=None, metadata={"help": "cut rows; prepare_dataset.py has fitted them"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate on the validation split"})
    save_strategy: str = field(default="no", metadata={"help": "when to save a checkpoint for --resume"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of like length pad less"}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "pin memory in the data loader"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step, where training starts from"})
    log_level_replica: str = field(default="error", metadata={"help": "what processes other than the first print"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "only if a forward skips weights"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Fledge prints a line of progress instead"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a lower loss, and keep the best model"}
    )

    def __post_init__(self) -> None:
        self.load_best_model_at_end = self.load_best_model_at_end or self.early_stopping_patience is not None
        if self.load_best_model_at_end and self.save_strategy == "no":
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.save_steps
        check_training(self)
        self.precision_reason = choose_device_and_precision(self)
        with said_in_words():
            super().__post_init__()


def choose_device_and_precision(config: TrainingArguments) -> str:
    """Sets `use_cpu` and `bf16` of a configuration that is not yet checked, and returns why this precision."""
    check_deepspeed(config)
    config.use_cpu = config.use_cpu or not torch.accelerator.is_available()
    if config.bf16 is not None or config.fp16:
        return "as asked for"
    config.bf16, reason = choose_bf16(config.use_cpu)
    return reason


def precision(config: TrainingArguments) -> str:
    return "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"


def choose_bf16(use_cpu: bool) -> tuple[bool, str]:
    """Whether to train in bf16 autocast, and why."""
    if use_cpu:
        if multiplies_bf16():
            return True, "this CPU multiplies bfloat16 matrices in hardware"
        return False, "this CPU has no bfloat16 matrix unit"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return True, "this GPU multiplies bfloat16 matrices in hardware"
    return False, "this device has no bfloat16 matrix unit"


def use_all_threads(config: TrainingArguments) -> str | None:
    """Undoes the one thread a process that `accelerate launch` leaves on a CPU, and returns a line that says so.

    It sets OMP_NUM_THREADS to 1 unless told otherwise, which leaves every core but one idle.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    threads = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not (config.use_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1" and threads > 1):
        return None
    torch.set_num_threads(threads)
    return f"Threads {threads}: accelerate launch leaves a process one, and this machine has more"


def with_values(config: Config, **values: Any) -> Config:
    """A copy of a checked configuration with other `values`."""
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def smoke(config: SmallModelConfig) -> SmallModelConfig:
    """The configuration of three steps of a recipe, with an evaluation and a checkpoint, in a folder of its own."""
    return with_values(
        config,
        output_dir=f"{config.output_dir}-smoke",
        max_steps=3,
        logging_steps=1,
        eval_steps=3,
        save_steps=3,
        eval_strategy="no" if config.eval_strategy == "no" else "steps",
        save_strategy="no" if config.save_strategy == "no" else "steps",
    )


def open_base(arguments: ModelConfig, dropout: float) -> tuple[Path, PreTrainedModel]:
    """The folder of the base (downloaded when it is the Hub's) and the model, in float32, with `dropout` everywhere.

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
    """The configuration with a `max_length` that `model` can hold, and lines that say what is cut.

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


def check_processes(config: TrainingArguments) -> None:
    """Refuses to train with fewer processes than the launcher was told to start.

    Raises:
        UserError: `accelerate launch` took a configuration of several processes and started one, as it does for CPUs
            without MPI; or several GPUs are visible to one process.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    # accelerate names an address to meet at only when several processes are to.
    if launched and "MASTER_ADDR" in os.environ and config.world_size == 1:
        raise UserError(
            "accelerate launch was told to start several processes and started one; "
            "start them by torchrun --nproc_per_node COUNT train_sft.py instead."
        )
    if config.n_gpu > 1:
        raise UserError(
            f"One process sees {config.n_gpu} GPUs; start one on each with accelerate launch --multi_gpu train_sft.py, "
            "or show it a single one with CUDA_VISIBLE_DEVICES=0."
        )


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
class InstructTrainer(SFTTrainer):
    """TRL's trainer, which stops at the first loss or gradient that is no number, and logs what people read.

    A checkpoint that was saved is therefore one to go on from: the weights in it are finite.
    """

    args: SmallModelConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    last_logged: tuple[float, int]
    first_ids: torch.Tensor

    def start_from(self, checkpoint: str | None) -> None:
        """Goes on counting tokens where the interrupted run stopped.

        Raises:
            UserError: TRL no longer counts them under this name.
        """
        if "_total_train_tokens" not in vars(self):
            raise missing("trl", "SFTTrainer._total_train_tokens")
        self._total_train_tokens = tokens_seen(checkpoint)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load_optimizer(self, super()._load_optimizer_and_scheduler, checkpoint)

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self.first_ids = inputs["input_ids"][0, :24]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse("loss", loss)
        return loss

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # its scaler skips such a step by itself
            self._refuse("gradient's norm", norm)
        return norm

    def _refuse(self, what: str, value: float | torch.Tensor) -> None:
        if math.isfinite(value):
            return
        saved = newest_checkpoint(Path(str(self.args.output_dir)))
        begin = " ".join(cast(str, self.processing_class.decode(self.first_ids)).split())
        raise UserError(
            f"The {what} is {float(value)} at step {self.state.global_step + 1}, on the batch that begins with "
            f"{begin!r}; lower --learning_rate and "
            + (f"go on from {saved.name} with --resume auto." if saved else "start again.")
        )

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.monotonic(), self._total_train_tokens
            since, before = self.last_logged
            logs["perplexity"] = math.exp(min(logs["loss"], 100))
            logs["tokens_per_second"] = round((tokens - before) / (now - since), 1)
            self.last_logged = now, tokens
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 100))
        super().log(logs, start_time)

    @override
    def train(self, *arguments: Any, **keywords: Any) -> TrainOutput:
        self.tokens_before = self._total_train_tokens
        self.last_logged = time.monotonic(), self.tokens_before
        return super().train(*arguments, **keywords)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.num_input_tokens_seen = self._total_train_tokens
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk so
            saved = newest_checkpoint(Path(str(self.args.output_dir)))
            raise UserError(
                f"A checkpoint cannot be written to {self.args.output_dir} ({' '.join(str(error).split())}); make room "
                + (f"and go on from {saved.name} with --resume auto." if saved else "and start again.")
            ) from error


def prepare_model(trainer: SFTTrainer) -> str:
    """Makes a trainer's model score supervised positions only where that is faster, and returns a line that says so."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
        head: Any = model.get_output_embeddings()
        if not hasattr(head, "bias"):  # peft's wrapper around new tokens passes on the weight alone
            head.bias = head.token_adapter.base_layer.bias
    if not has_fused_head(model):
        return "Loss: TRL's own, because this release of TRL has no fused head to replace"
    if trainer.args.device.type not in ("cpu", "mps"):
        return "Loss: TRL's fused head, which projects supervised positions only on this device"
    keep_freed_memory()
    if not has_plain_logits(model.config):
        return "Loss: TRL's head, because this architecture scales or caps its logits"
    score_supervised_only(model)
    line = "Loss: supervised positions only, padding without a mask"
    if trainer.args.bf16 and trainer.args.device.type == "cpu" and attention_of(model) == "sdpa":
        attend_by_rows(model)
        line += f"; attention row by row up to a length of {LONGEST}"
    return line


def finished(trainer: Trainer, **decoding: Any) -> PreTrainedModel:
    """The trained model as it is served: adapter merged, cache on; `decoding` is what a pipeline does untold."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    model.config.use_cache = True  # TRL switches it off for training
    if attention_of(model) == NAME:
        model.set_attn_implementation("sdpa")
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=pad, **decoding)
    return model
