"""What Fledge adds to TRL's `SFTTrainer`: defaults for small models, precision by device, progress, and the record."""

import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from fledge.cli import UserError
from fledge.loss import has_plain_logits, score_supervised_only


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
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "trade time for memory"})
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

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.precision_reason = "as asked for"
        if self.bf16 is None and not self.fp16:
            self.bf16, self.precision_reason = choose_bf16(self.use_cpu)
        super().__post_init__()


def choose_bf16(use_cpu: bool) -> tuple[bool, str]:
    """Whether to train in bf16 autocast, and why."""
    if use_cpu:
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return True, "this CPU multiplies bfloat16 matrices in hardware"
        return False, "this CPU has no bfloat16 matrix unit"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return True, "this GPU multiplies bfloat16 matrices in hardware"
    return False, "this device has no bfloat16 matrix unit"


def use_all_threads(config: SmallModelConfig) -> str | None:
    """Undoes the one thread a process that `accelerate launch` leaves on a CPU, and returns a line that says so.

    It sets OMP_NUM_THREADS to 1 unless told otherwise, which leaves every core but one idle.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not (config.use_cpu and launched and os.environ.get("OMP_NUM_THREADS") == "1" and threads > 1):
        return None
    torch.set_num_threads(threads)
    return f"Threads {threads}: accelerate launch leaves a process one, and this machine has more"


def check_fit(
    model: PreTrainedModel, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, longest: int
) -> None:
    """Refuses data that was not prepared for this model.

    `tokenizer` is the dataset's: the model's `own` with a template's special tokens added, for which `add_rows` makes
    room. `longest` is the length of the longest row in tokens.

    Raises:
        UserError: its token ids or its row lengths do not fit.
    """
    rows, context = model.get_input_embeddings().num_embeddings, model.config.max_position_embeddings
    if len(own) > rows:
        raise UserError(f"The model has {rows} rows for the {len(own)} tokens of its own tokenizer; convert it again.")
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


def prepare_model(trainer: SFTTrainer) -> str:
    """Makes a trainer's model score supervised positions only where that is faster, and returns a line that says so."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if trainer.args.device.type not in ("cpu", "mps"):
        return "Loss: TRL's fused head, which projects supervised positions only on this device"
    if not has_plain_logits(model.config):
        return "Loss: TRL's head, because this architecture scales or caps its logits"
    score_supervised_only(model)
    return "Loss: supervised positions only, padding without a mask"


def find_checkpoint(config: SmallModelConfig, resume: bool, overwrite: bool) -> str | None:
    """The newest checkpoint of an unfinished run to go on from, or `None` for a fresh start.

    Raises:
        UserError: there is one, and the user said neither to resume nor to overwrite.
    """
    folder = Path(config.output_dir)
    newest = get_last_checkpoint(folder) if folder.is_dir() else None
    if newest and not resume and not overwrite:
        raise UserError(f"{folder.parent} holds an unfinished run; go on with --resume or start anew with --overwrite.")
    return newest if resume else None


def finished_model(trainer: SFTTrainer) -> PreTrainedModel:
    """The trained model as it is served: adapter merged, cache on, and a pipeline that is told nothing samples."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    model.config.use_cache = True  # TRL switches it off for training
    tokenizer = trainer.processing_class
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    # Greedy decoding makes a small model repeat itself.
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=pad, **sampling)
    return model


class Progress(TrainerCallback):
    """One line a logged step: loss, tokens a second, time left. Only the main process prints."""

    def __init__(self):
        self.last_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.last_time = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        done = f"{state.epoch or 0:5.2f} epochs  step {state.global_step:>5}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{done}  validation loss {logs['eval_loss']:.3f}", flush=True)
        elif "loss" in logs:
            now, tokens = time.monotonic(), logs.get("num_tokens", 0)
            speed = (tokens - self.last_tokens) / (now - self.last_time)
            self.last_tokens, self.last_time = tokens, now
            steps_left = state.max_steps - state.global_step
            seconds_left = round((now - self.start) / (state.global_step - self.first_step) * steps_left)
            time_left = f"{seconds_left // 60}:{seconds_left % 60:02d} left"
            print(f"{done}  loss {float(logs['loss']):.3f}  {speed:>7,.0f} tokens/s  {time_left}", flush=True)


def save_loss_curve(log_history: list[dict], file: Path, what: str = "completion loss") -> None:
    """Training and validation loss over steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel=f"{what} (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def run_record(trainer: SFTTrainer, seconds: float, rows: DatasetDict) -> dict:
    """Everything that made the run: data, and what `outcome` tells."""
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "data_fingerprint": rows["train"]._fingerprint,
        **outcome(trainer, seconds, SFTConfig),
    }


def outcome(trainer: Trainer, seconds: float, defaults: type[TrainingArguments]) -> dict:
    """Hyper-parameters that differ from the library's `defaults`, machine, and what was reached."""
    import datasets
    import transformers
    import trl

    import fledge

    args, history = trainer.args, trainer.state.log_history
    with warnings.catch_warnings():  # TRL's default for gradient_checkpointing warns of its coming name
        warnings.simplefilter("ignore", FutureWarning)
        usual = defaults(output_dir=args.output_dir, use_cpu=args.use_cpu).to_dict()
    left_out = ("run_name", "disable_tqdm", "dataloader_pin_memory", "use_cpu", "do_eval", "save_total_limit")
    left_out += ("log_level_replica", "logging_first_step", "ddp_find_unused_parameters", "gradient_checkpointing")
    chosen = args.to_dict().items()
    hyperparameters = {k: v for k, v in sorted(chosen) if k in usual and v != usual[k] and k not in left_out}
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    training = [float(entry["loss"]) for entry in history if "loss" in entry]
    tokens = max((entry.get("num_tokens", 0) for entry in history), default=0)
    return {
        "hyperparameters": hyperparameters,
        "effective_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "first_loss": training[0],
        "last_loss": training[-1],
        "validation_loss": evaluations[-1] if evaluations else None,
        "tokens": int(tokens),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "peak_memory_mib": peak_memory_mib(),
        "processes": args.world_size,
        "device": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{args.device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "fledge": fledge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "datasets": datasets.__version__,
        },
    }


def peak_memory_mib() -> int:
    """Peak memory of this process: the GPU's when there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def commit() -> str | None:
    """The commit of the code that ran, when it ran from a checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
