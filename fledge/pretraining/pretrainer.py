"""Pre-training: a new GPT-2, the estimated cost of a run, and transformers' `Trainer` on windows of token ids."""

import functools
import math
import time
import types
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.modeling_outputs import CausalLMOutput, ModelOutput
from typing_extensions import override

from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.guards import check_overrides
from fledge.memory import keep_freed_memory
from fledge.models import head_of
from fledge.pretraining.muon import MuonWithAdamW
from fledge.pretraining.tokens import Windows
from fledge.training.configuration import choose_device_and_precision
from fledge.training.loss import ScoreTokens
from fledge.training.optimizing import OptimizingTrainer
from fledge.training.run_record import outcome
from fledge.training.settings import check_training, said_in_words
from fledge.training.trial import in_words, seconds_of


@dataclass
class PretrainConfig(TrainingArguments):
    """`TrainingArguments` with defaults for training a GPT of 1M to 200M parameters from scratch."""

    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate (default 1e-3)"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule (default cosine)"})
    warmup_steps: float = field(default=0.02, metadata={"help": "steps, or a share of all steps if below 1"})
    weight_decay: float = field(default=0.1, metadata={"help": "not on norms and biases (default 0.1)"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta (default 0.95)"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the corpus (default 1)"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "windows a step and device (default 16)"})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "windows at once in evaluation"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to measure bits per byte"})
    eval_steps: float | None = field(default=0.1, metadata={"help": "steps, or a share of all steps if below 1"})
    save_strategy: str = field(default="steps", metadata={"help": "when to save a checkpoint for --resume"})
    save_steps: float = field(default=0.1, metadata={"help": "steps, or a share of all steps if below 1"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step: it should be ln V"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of progress"})
    include_num_input_tokens_seen: str = field(default="all", metadata={"help": "count tokens in the log"})
    bf16: bool | None = field(  # type: ignore[assignment]  # as TRL's; None until __post_init__
        default=None, metadata={"help": "train in bf16 autocast (default: where it is fast)"}
    )
    muon: bool = field(
        default=False, metadata={"help": "Muon for the layers' matrices; use it with --learning_rate 5e-3"}
    )
    # The labels of windows are already shifted and have a name that is not a parameter of the model's forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave as it is"})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "pin memory in the data loader"})
    log_level_replica: str = field(default="error", metadata={"help": "what processes other than the first print"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "only if a forward skips weights"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Fledge prints a line of progress instead"})

    def __post_init__(self) -> None:
        check_training(self)
        self.precision_reason = choose_device_and_precision(self)
        with said_in_words():
            super().__post_init__()


def new_gpt2(
    tokenizer: PreTrainedTokenizerBase, n_layer: int, n_head: int, n_embd: int, context_length: int
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights: tied head, no dropout, torch's fast tanh GELU.

    Raises:
        UserError: the sizes do not fit together.
    """
    if n_embd % n_head:
        raise UserError(f"--n_embd {n_embd} is not divisible by --n_head {n_head}; every head has the same width.")
    other: dict[str, Any] = {"n_ctx": context_length}  # llama.cpp's converter reads this name
    config = GPT2Config(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=context_length,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        **other,
    )
    return GPT2LMHeadModel(config)


def score_in_cache(model: PreTrainedModel) -> None:
    """Replaces the loss of windows in `model` by `fledge.training.loss`, which is faster without Triton.

    `model(input_ids=…, labels=…, shift_labels=…, num_items_in_batch=None)` then returns only its `loss`: the mean over
    the labels that are not ignored, or their sum over `num_items_in_batch`. Without `shift_labels` the forward is the
    model's.
    """
    own_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        if shift_labels is None:
            return own_forward(input_ids=input_ids, **kwargs)
        hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        mask, head = shift_labels != IGNORED, head_of(self)
        log_probs = ScoreTokens.apply(hidden[mask], head.weight, head.bias, shift_labels[mask], 1)[0]
        count = log_probs.numel() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=-log_probs.sum() / count)

    model.forward = types.MethodType(forward, model)


def flops_per_token(model: GPT2LMHeadModel) -> int:
    """Floating-point operations of one token, forward and backward (PaLM, Chowdhery et al. 2022, appendix B).

    Six per weight in a matrix product (including the head, without embeddings), and 12·layers·width·context in
    attention.
    """
    config, head = model.config, head_of(model).weight
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    return 6 * (blocks + head.numel()) + 12 * config.n_layer * config.n_embd * config.n_positions


@check_overrides
class PretrainTrainer(OptimizingTrainer):
    """Trainer that counts tokens under TRL's name and evaluates in bits per byte."""

    args: PretrainConfig
    model: GPT2LMHeadModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: Windows
    eval_dataset: Windows

    def __init__(self, *arguments: Any, bytes_per_token: float, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.bytes_per_token = bytes_per_token
        if self.args.device.type in ("cpu", "mps"):
            score_in_cache(self.model)
            keep_freed_memory()

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args = self.args
        if args.muon and self.optimizer is None:
            if self.is_fsdp_enabled:
                raise UserError(
                    "--muon needs whole matrices, which FSDP spreads over the processes; leave one of them."
                )
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonWithAdamW(self.model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
        return super().create_optimizer(model)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {"num_tokens": self.state.num_input_tokens_seen}, start_time)

    @override
    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over every token of the validation split, each once, in nats per token and in bits per byte.

        Trainer's own evaluation averages the means of batches, and repeats rows if processes do not share them evenly.
        Bits per byte include the loss of end-of-text tokens, although these have no bytes.
        """
        start, windows, size = time.monotonic(), self.eval_dataset, self.args.eval_batch_size
        self.model_wrapped.eval()
        nats, tokens = 0.0, 0
        for begin in range(0, len(windows), size * self.args.world_size):
            begin += size * self.args.process_index
            rows = [windows[k] for k in range(begin, min(begin + size, len(windows)))]
            if is_idle := not rows:  # all processes must run equally often
                rows = [windows[0]]
            batch = send_to_device(default_data_collator(rows), self.args.device)
            with self.accelerator.autocast():
                loss = self.model_wrapped(**batch, num_items_in_batch=1).loss
            if not is_idle:
                nats, tokens = nats + loss.item(), tokens + int((batch["labels"] != IGNORED).sum())
        sums = torch.tensor([[nats, tokens]], device=self.args.device)
        nats, tokens = self.accelerator.gather(sums).sum(0).tolist()
        loss = nats / tokens
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 1),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def was_evaluated(self) -> bool:
        """Whether the model has been evaluated in its current state."""
        return any("eval_loss" in e and e["step"] == self.state.global_step for e in self.state.log_history)

    def seconds_a_step(self) -> float:
        """The time of one step's forward and backward on this device, from a trial that does not change the run."""
        rows = [self.train_dataset[k % len(self.train_dataset)] for k in range(self.args.train_batch_size)]
        batch = send_to_device(default_data_collator(rows), self.args.device)
        return seconds_of(self, lambda: self.model(**batch).loss, 2) * self.args.gradient_accumulation_steps


@check_overrides
class Samples(TrainerCallback):
    """Prints bits per byte and sampled continuations after each evaluation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int):
        self.tokenizer, self.prompts, self.tokens = tokenizer, prompts, tokens

    @override
    @torch.no_grad()
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        model: GPT2LMHeadModel | FSDPModule | None = None,
        **kwargs: Any,
    ) -> None:
        if not (state.is_world_process_zero and metrics and model):
            return
        print(f"             {metrics['eval_bits_per_byte']:.4f} bits per byte", flush=True)
        if isinstance(model, FSDPModule):  # generation would need the shards of all processes, and only one runs this
            return
        for prompt in self.prompts:
            ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(prompt, add_special_tokens=False)]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                written = cast(Any, model).generate(
                    torch.tensor([ids], device=model.device),
                    max_new_tokens=min(self.tokens, model.config.n_positions - len(ids)),
                    do_sample=True,
                    temperature=0.8,
                    use_cache=True,
                )
            text = cast(str, self.tokenizer.decode(written[0], skip_special_tokens=True))
            print(f"             | {' '.join(text.split())}", flush=True)


def plan(trainer: PretrainTrainer, tokens: dict) -> tuple[dict, list[str]]:
    """The estimated cost of the run, as a record and as lines to print.

    Raises:
        UserError: there are fewer windows than one step needs.
    """
    args, model, windows = trainer.args, trainer.model, trainer.train_dataset
    train, validation = tokens["splits"]["train"], tokens["splits"]["validation"]
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_an_epoch = math.ceil(len(windows) / rows_a_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)
    epochs, (whole, rest) = steps / steps_an_epoch, divmod(steps, steps_an_epoch)
    seen = whole * (len(windows.ids) - 1) + rest * rows_a_step * windows.context_length
    parameters = model.num_parameters()
    seconds = None if trainer.is_fsdp_enabled else trainer.seconds_a_step()
    estimate = {
        "steps": steps,
        "tokens": seen,
        "epochs": round(epochs, 2),
        "flops": flops_per_token(model) * seen,
        "tokens_per_parameter": round(seen / parameters, 2),
        "seconds": seconds and round(steps * seconds),
    }
    config = model.config
    lines = [
        f"Corpus: {train['tokens']:,} tokens in {train['documents']:,} documents, "
        f"{train['bytes'] / train['tokens']:.2f} bytes a token; held out {validation['tokens']:,} tokens.",
        f"Model: {parameters:,} parameters, {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.n_positions}, {config.vocab_size:,} tokens; processes: {args.world_size}.",
        f"Plan: {steps:,} steps of {rows_a_step} x {config.n_positions} tokens, {seen:,} in all, {epochs:.1f} passes; "
        f"{seen / parameters:.1f} tokens a parameter (20 is the best use of compute); {estimate['flops']:.1e} FLOPs.",
    ]
    if seconds:
        lines.append(f"Time: {seconds:.2f} s a step in a short trial here, about {in_words(steps * seconds)}.")
    if epochs > 4:
        lines.append("More than four passes: repeated text teaches less and less; more text would teach more.")
    return estimate, lines


def pretraining_record(trainer: PretrainTrainer, tokens: dict, estimate: dict) -> dict:
    """The content of `pretraining.json`: corpus, sizes, hyperparameters, machine and outcome."""
    config, history = trainer.model.config, trainer.state.log_history
    measured = [entry for entry in history if "eval_bits_per_byte" in entry]
    return {
        "model": {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")},
        "parameters": trainer.model.num_parameters(),
        "corpus": tokens["splits"],
        "data_fingerprint": tokens["fingerprint"],
        "estimate": estimate,
        "uniform_loss": math.log(config.vocab_size),
        "bits_per_byte": measured[-1]["eval_bits_per_byte"],
        **outcome(trainer, TrainingArguments),
    }
