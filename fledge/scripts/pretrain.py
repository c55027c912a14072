"""Raw text and a tokenizer → a GPT-2 trained from random weights, through transformers' Trainer.

    python pretrain.py --data corpus.txt --tokenizer tokenizer --output_dir base --n_layer 6 --n_head 6 --n_embd 384
    accelerate launch pretrain.py --config recipes/tinystories_30m/pretrain.yaml

Besides the keys below, every key of transformers' TrainingArguments works under its own name, among them
--num_train_epochs, --max_steps, --learning_rate, --per_device_train_batch_size, --gradient_accumulation_steps,
--save_steps, --report_to; --help_all lists them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.cli import attempt, parse, write_json
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output, check_inputs, claimed
from fledge.hub import find_tokenizer
from fledge.ranges import AT_LEAST_ONE, Range, check_ranges
from fledge.sampling import Sampling
from fledge.terminal import quiet
from fledge.training.starting import run_name

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, TrainerCallback

    from fledge.pretraining.pretrainer import PretrainConfig, PretrainTrainer

RANGES = {
    "n_layer": Range(at_least=1, at_most=1000),
    "n_head": AT_LEAST_ONE,
    "n_embd": Range(at_least=1, at_most=2**16),
    "context_length": Range(at_least=2, at_most=2**20),
    "validation_share": Range(above=0, at_most=0.5),
    "sample_tokens": AT_LEAST_ONE,
}


@dataclass
class PretrainArguments:
    data: list[str] = field(
        metadata={
            "help": "text, .jsonl or .parquet files (or .gz, .zst), folders of them, or Hub datasets (owner/name)"
        }
    )
    tokenizer: str = field(metadata={"help": "the folder that train_tokenizer.py wrote, another tokenizer, or gpt2"})
    n_layer: int = field(default=6, metadata={"help": "layers (default 6)"})
    n_head: int = field(default=6, metadata={"help": "attention heads a layer (default 6)"})
    n_embd: int = field(default=384, metadata={"help": "width (default 384)"})
    context_length: int = field(default=256, metadata={"help": "tokens the model sees at once (default 256)"})
    validation_data: list[str] | None = field(
        default=None, metadata={"help": "held-out text, instead of a share of --data"}
    )
    validation_share: float = field(
        default=0.01, metadata={"help": "share of the documents to hold out (default 0.01)"}
    )
    text_column: str = field(default="text", metadata={"help": "the column with the text (default text)"})
    document_start: str | None = field(
        default=None, metadata={"help": "a regular expression: documents also begin at lines that match"}
    )
    tokens_dir: str | None = field(
        default=None,
        metadata={"help": "where the token ids are stored for this and later runs (default: OUTPUT_DIR-tokens)"},
    )
    sample_prompts: list[str] = field(
        default_factory=lambda: [""], metadata={"help": "texts that the model continues after each evaluation"}
    )
    sample_tokens: int = field(default=60, metadata={"help": "their length in tokens (default 60)"})
    resume: str | None = field(
        default=None, metadata={"help": "a checkpoint to resume from, or auto: the newest in output_dir, if any"}
    )
    resume_with_changes: bool = field(
        default=False, metadata={"help": "resume although the data or settings differ from the checkpoint's"}
    )
    dry_run: bool = field(default=False, metadata={"help": "tokenise, print the estimates, train nothing"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier model in output_dir"})


def is_of_hub(tokenizer: str) -> bool:
    return tokenizer != "gpt2" and not Path(tokenizer).exists()


def main() -> Path:
    """Returns the folder it wrote."""
    if {"-h", "--help"} & set(sys.argv):  # transformers' own keys take seconds to import
        parse(sys.argv[1:], PretrainArguments, description=__doc__)
    arguments = ["--help" if argument == "--help_all" else argument for argument in sys.argv[1:]]
    if "--help" not in arguments:
        (early,) = parse(arguments, PretrainArguments, partly=True)
        check_ranges(early, RANGES)
        if is_of_hub(early.tokenizer):
            find_tokenizer(early.tokenizer)

    from fledge.pretraining.pretrainer import PretrainConfig

    args, config = parse(arguments, PretrainArguments, PretrainConfig, description=__doc__)
    quiet()
    output_dir = Path(config.output_dir)
    tokens_dir = Path(args.tokens_dir or output_dir.with_name(f"{output_dir.name}-tokens"))
    inputs = {"--data": args.data, "--validation_data": args.validation_data, "--tokenizer": args.tokenizer}
    check_inputs(str(tokens_dir), "--tokens_dir", inputs)
    inputs["--tokens_dir"] = str(tokens_dir)
    with claimed(output_dir, "pretrain.py", None, inputs, is_main=config.process_index == 0) as output:
        pretrain(args, config, tokens_dir, output)
    return output.path


def pretrain(args: PretrainArguments, config: "PretrainConfig", tokens_dir: Path, output: Output) -> None:
    import transformers

    from fledge.pretraining.pretrainer import new_gpt2, plan
    from fledge.pretraining.tokens import Corpus, open_tokens
    from fledge.training.configuration import precision, use_all_threads, with_values
    from fledge.training.lineage import go_on, settings_of
    from fledge.training.opening import close_trainer
    from fledge.training.resuming import StopOnSignal, find_checkpoint

    # ------------------------------------------------------------ Load and check
    checkpoint = find_checkpoint(output, args.resume, args.overwrite)
    threads = use_all_threads(config)
    config = with_values(
        config, run_name=config.run_name or run_name(str(config.output_dir)), output_dir=str(output.work)
    )
    tokenizer = open_vocabulary(args)
    held_out = args.validation_data or []
    corpus = Corpus(args.data, args.text_column, args.document_start, held_out, args.validation_share)
    transformers.set_seed(config.seed)
    model = new_gpt2(tokenizer, args.n_layer, args.n_head, args.n_embd, args.context_length)
    with config.main_process_first(desc="tokens"):
        tokens = open_tokens(tokens_dir, corpus, tokenizer)
    check_context(args, tokenizer, tokens["splits"]["train"]["tokens"])
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "context_length")}
    settings = settings_of(config, **sizes, data=tokens["fingerprint"])
    lineage = go_on(checkpoint, settings, args.resume_with_changes)

    # ------------------------------------------------------------ Plan
    stop = StopOnSignal()
    trainer = make_trainer(args, config, (model, tokenizer), (tokens_dir, tokens), [stop, lineage])
    estimate, lines = plan(trainer, tokens)
    if trainer.is_world_process_zero():
        lines += [f"Precision {precision(config)}: {config.precision_reason}", *([threads] if threads else [])]
        print(*lines, sep="\n", flush=True)
    if args.dry_run:
        return
    output.check_room(4 * model.num_parameters())  # float32
    output.begin_work(checkpoint)  # only now that all inputs have been checked
    trainer.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ Train
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.let_go()
    stop.leave_if_told(trainer.state)

    # ------------------------------------------------------------ Save
    tokenizer.model_max_length = args.context_length
    save(trainer, output)
    if not trainer.was_evaluated:
        attempt("The last evaluation", trainer.evaluate)
    if trainer.is_world_process_zero():
        record(trainer, output, tokens, estimate)
    close_trainer(trainer)


def open_vocabulary(args: PretrainArguments) -> "PreTrainedTokenizerBase":
    """The tokenizer that `--tokenizer` names: a folder, a model on the Hub, or a vocabulary file.

    If it has no token for the beginning of a text or for padding, end-of-text serves as that.

    Raises:
        UserError: there is none, or it has no end-of-text token.
    """
    from fledge.tokenizers import load_tokenizer, open_tokenizer

    if is_of_hub(args.tokenizer) or (Path(args.tokenizer) / "tokenizer.json").exists():
        tokenizer = open_tokenizer(args.tokenizer)
    else:
        tokenizer = load_tokenizer(args.tokenizer, args.context_length)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer in {args.tokenizer} has no end-of-text token; train one by train_tokenizer.py.")
    for role in ("bos_token", "pad_token"):  # GPT-2's on the Hub has no token to pad with
        if getattr(tokenizer, role) is None:
            setattr(tokenizer, role, tokenizer.eos_token)
    return tokenizer


def check_context(args: PretrainArguments, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> None:
    """Checks that the training text of so many `tokens` fills the context once, and that no sample prompt fills it.

    Raises:
        UserError: it does not, so positions would stay untrained; or a prompt leaves no room, or cannot be encoded.
    """
    from fledge.tokenizers import encoding_of

    if 2 <= tokens <= args.context_length:  # fewer are refused for any context
        raise UserError(
            f"--context_length {args.context_length} is longer than the training text of {tokens:,} tokens, so that "
            "some positions would never be trained; give more text or a shorter context."
        )
    for prompt in args.sample_prompts:
        with encoding_of(f"--sample_prompts {prompt!r:.60}"):
            length = 1 + len(tokenizer.encode(prompt, add_special_tokens=False))
        if length >= args.context_length:
            raise UserError(
                f"--sample_prompts {prompt!r:.60} has {length} tokens with the one for the beginning, which leaves no "
                f"room in the context of {args.context_length}; shorten it."
            )


def make_trainer(
    args: PretrainArguments,
    config: "PretrainConfig",
    untrained: tuple["GPT2LMHeadModel", "PreTrainedTokenizerBase"],
    corpus: tuple[Path, dict],
    callbacks: list["TrainerCallback"],
) -> "PretrainTrainer":
    """The trainer of an `untrained` model with its tokenizer on a `corpus`: the folder of token ids and its record."""
    from fledge.pretraining.pretrainer import PretrainTrainer, Samples
    from fledge.pretraining.tokens import Windows
    from fledge.training.opening import open_trainer

    model, tokenizer = untrained
    folder, tokens = corpus
    train, validation = (Windows(folder, name, tokens, args.context_length) for name in ("train", "validation"))
    return open_trainer(
        PretrainTrainer,
        config,
        [Samples(tokenizer, args.sample_prompts, args.sample_tokens), *callbacks],
        model=model,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        bytes_per_token=validation.bytes_per_token,
    )


def save(trainer: "PretrainTrainer", output: Output) -> None:
    """Saves model and tokenizer before everything else."""
    from fledge.training.trainer import finished

    # All processes take part: each may hold a shard of the weights.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with output.staged() as folder:
            finished(trainer, **Sampling().decoding()).save_pretrained(folder, state_dict=weights)
            trainer.processing_class.save_pretrained(folder)


def record(trainer: "PretrainTrainer", output: Output, tokens: dict, estimate: dict) -> None:
    """Adds the log, the record and the picture of the loss; `tokens` is the record of the corpus."""
    from fledge.pretraining.pretrainer import pretraining_record
    from fledge.training.run_record import save_curve, save_log

    history = trainer.state.log_history
    output.add("training_log.jsonl", lambda folder: save_log(history, folder))
    made = attempt("The record of the run", lambda: pretraining_record(trainer, tokens, estimate))
    if made:
        output.add("pretraining.json", lambda folder: write_json(folder / "pretraining.json", made))
        print(f"Trained {made['steps']} steps in {made['seconds']:.0f} s, {made['tokens_per_second']:,} tokens/s.")
        if made["first_loss"] is not None:  # --logging_strategy no
            is_way = sum("loss" in entry for entry in history) > 1
            end = f" to {made['last_loss']:.3f}" if is_way else ""
            way = f"{made['first_loss']:.3f} (ln V is {made['uniform_loss']:.3f}){end}"
            print(f"Loss {way}; {made['bits_per_byte']:.4f} bits per byte on held-out text.")
    output.add("loss_curve.png", lambda folder: save_curve(history, folder, "loss"))
    suggested = {"data": "RECORDS", "output_dir": str(output.path.parent / "data")}
    print(f"Next: {next_command('prepare_dataset.py', {'tokenizer': output.path}, suggested)}")
