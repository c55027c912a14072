"""A hand-written checkpoint → a Hugging Face model, with a proof that both compute the same.

python convert_checkpoint.py --checkpoint model.pt --tokenizer tokenizer.json --output_dir base
python convert_checkpoint.py --checkpoint model.pt --inspect
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fledge.cli import parse, write_json
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.terminal import quiet
from fledge.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fledge.checkpoints.author.call import Author
    from fledge.checkpoints.canonical import CanonicalGPT
    from fledge.checkpoints.converted import Converted
    from fledge.checkpoints.facts import Fact
    from fledge.checkpoints.loading import Checkpoint
    from fledge.checkpoints.probe_text import Trial


# fledge.checkpoints takes seconds to import.
LAYOUT_NAMES = (
    "scratch, book, per_head, gpt2, build_nanogpt, nanogpt, mingpt, lecture, student, story_chat, llama2.c, minimind, "
    "llama, nanochat_2026, nanochat, litgpt_until_2025, litgpt, torch"
)


@dataclass
class ConvertArguments:
    GROUPS: ClassVar = {"layout": "what the checkpoint means", "reference": "evidence", "inspect": "the run"}
    REQUIRED: ClassVar = ("output_dir",)

    checkpoint: str = field(metadata={"help": "a .pt .pth .bin .ckpt .tar .safetensors file, or a folder with one"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "gpt2, or a tokenizer's file or folder (default: the one in the checkpoint or beside it)"},
    )
    output_dir: str | None = field(default=None, metadata={"help": "the folder to write"})
    layout: str | None = field(
        default=None,
        metadata={"help": f"the layout, if it is known: {LAYOUT_NAMES}"},
    )
    mapping: str | None = field(default=None, metadata={"help": "a YAML file that names roles and facts by hand"})
    target: str = field(default="auto", metadata={"help": "gpt2, llama, opt, …: a class of transformers (or auto)"})
    n_head: int | None = field(default=None, metadata={"help": "attention heads, if the checkpoint does not say"})
    activation: str | None = field(default=None, metadata={"help": "gelu, gelu_tanh, relu, relu2 or silu"})
    attention_scale: float | None = field(default=None, metadata={"help": "default: 1/sqrt(width of a head)"})
    norm_eps: float | None = field(default=None, metadata={"help": "the norms' epsilon (default 1e-5)"})
    reference: str | None = field(default=None, metadata={"help": "your code: FILE, FILE:CLASS or a folder; it is run"})
    reference_kwargs: str | None = field(default=None, metadata={"help": "arguments of your class, as JSON"})
    probe_text: str | None = field(default=None, metadata={"help": "a text file like the training text"})
    allow_custom_code: bool = field(
        default=False,
        metadata={
            "help": "if no class of transformers holds the model exactly, write a modeling file beside the weights; "
            "opening it elsewhere then needs trust_remote_code=True"
        },
    )
    accept_assumptions: bool = field(
        default=False, metadata={"help": "convert even if a fact that changes the logits is assumed"}
    )
    inspect: bool = field(
        default=False,
        metadata={"help": "print each tensor and its role, and stop"},
    )
    dry_run: bool = field(default=False, metadata={"help": "prove and report everything, write nothing"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion in output_dir"})


@dataclass
class Loaded:
    """The checkpoint, and the roles and facts that the user states by flags and --mapping."""

    checkpoint: "Checkpoint"
    roles: dict[str, str]
    told: dict[str, "Fact"]


@dataclass
class Reading:
    """How the checkpoint was read: the canonical GPT, the facts that it rests on, and the evidence for them.

    `rivals` are the other values of assumed facts. `beside` is code beside the checkpoint that may be the author's and
    was not run. `proof` collects the figures of every step.
    """

    gpt: "CanonicalGPT"
    facts: "list[Fact]"
    tokenizer: "PreTrainedTokenizerFast"
    folds: list[str]
    probe_text: str | None
    beside: tuple[Path, str] | None
    trials: "list[Trial]" = field(default_factory=list)
    rivals: dict[str, list[object]] = field(default_factory=dict)
    proof: dict[str, object] = field(default_factory=dict)


def main() -> Path | None:
    """Returns the folder it wrote."""
    (args,) = parse(sys.argv[1:], ConvertArguments, description=__doc__)
    if args.inspect or args.dry_run:
        convert(args, None)
        return None
    if not args.output_dir:
        raise UserError("--output_dir is missing; name the folder to write, or pass --dry_run or --inspect.")
    inputs = {f"--{name}": vars(args)[name] for name in ("checkpoint", "tokenizer", "mapping", "probe_text")}
    with claimed(args.output_dir, "convert_checkpoint.py", args.overwrite, inputs) as output:
        convert(args, output)
    return output.path


def convert(args: ConvertArguments, output: Output | None) -> None:
    """Reads, proves and writes the checkpoint. Without an `output` nothing is written."""
    from fledge.memory import return_freed_memory

    quiet()
    return_freed_memory()

    # ------------------------------------------------------------ Load
    loaded = load(args)
    if args.inspect:
        return inspect(loaded)

    # ------------------------------------------------------------ Settle what the tensors do not show
    reading = settle(args, loaded)
    check(args, reading)

    # ------------------------------------------------------------ Prove
    converted = prove(args, reading)
    report = report_of(loaded, reading, converted)
    if output is None:
        error = reading.proof["float64_max_error"]
        print(f"{report['verdict']} {error:.1e} in float64. Nothing was written: --dry_run.")
        return

    # ------------------------------------------------------------ Save, and prove what was saved
    with output.staged() as folder:
        reading.proof["greedy_tokens"] = converted.save(folder)
        print("Proving: the same from the saved folder ...", flush=True)
        converted.prove_written(folder)
        loaded.checkpoint.tensors.clear()
        del reading.gpt
        reading.proof |= converted.prove_saved(folder)
        write_json(folder / "conversion.json", report)
    print(summary(reading.proof))
    if reading.probe_text:
        print(f"Loss on {reading.probe_text}: {reading.proof['probe_text_loss']:.3f} nats per token.")
    if converted.has_own_code:
        print("It has code of its own: Fledge opens it as any model, and elsewhere it needs trust_remote_code=True.")
    print(report["verdict"])
    print(f"{args.output_dir} is a {report['target']} of {report['parameters']:,} parameters.")
    made = Path(str(args.output_dir))
    suggested = {"data": "RECORDS", "output_dir": str(made.parent / "data")}
    print(f"Next: {next_command('prepare_dataset.py', {'tokenizer': made}, suggested)}")


def load(args: ConvertArguments) -> Loaded:
    """Loads the checkpoint, and what flags and --mapping say about it."""
    from fledge.checkpoints.facts import Fact, Source
    from fledge.checkpoints.loading import load_checkpoint
    from fledge.checkpoints.mapping import read_mapping

    checkpoint = load_checkpoint(args.checkpoint)
    print(f"Read {len(checkpoint.tensors)} tensors from {args.checkpoint}, left out {len(checkpoint.left_out)}.")
    if kind := checkpoint.source.get("class"):
        print(
            f"It is a whole pickled module, {kind}: its tensors and plain values were read, and none of its code ran."
        )
    roles, told = read_mapping(args.mapping) if args.mapping else ({}, {})
    for name in ("n_head", "activation", "attention_scale", "norm_eps"):
        if (value := vars(args)[name]) is not None:
            told[name] = Fact.of(name, value, Source.FLAG)
    return Loaded(checkpoint, roles, told)


def inspect(loaded: Loaded) -> None:
    """Prints each tensor with its role, and what prevents a conversion."""
    from fledge.checkpoints.head_tensors import split_heads
    from fledge.checkpoints.roles import detect

    tensors, oriented = split_heads(loaded.checkpoint.tensors)
    structure = detect(tensors, loaded.roles, oriented)
    for name, tensor in tensors.items():
        stored = "  stored (in, out)" if name in structure.transposed else ""
        print(f"  {name:<50} {tuple(tensor.shape)!s:<18} {structure.roles.get(name, '?')}{stored}")
    for name, why in loaded.checkpoint.left_out.items():
        print(f"  {name:<50} left out: {why}")
    for problem in [*structure.refusals, *structure.problems]:
        print(problem)


def settle(args: ConvertArguments, loaded: Loaded) -> Reading:
    """Reads the checkpoint as a canonical GPT, and settles its facts by the author's code and by a text."""
    from fledge.checkpoints.author.candidates import code_beside
    from fledge.checkpoints.evidence import settle_by_reference
    from fledge.checkpoints.facts import Fact, Source, Status
    from fledge.checkpoints.probe_text import settle_by_text
    from fledge.checkpoints.questions import settle_what_cannot_matter, without_unused
    from fledge.checkpoints.recognition import fit_vocabulary, recognise
    from fledge.checkpoints.summary import leave_to_code
    from fledge.tokenizers import load_tokenizer

    checkpoint = loaded.checkpoint
    trials: list[Trial] = []
    proof: dict[str, object] = {}
    author, by_author = open_author(args, loaded), None
    if author:
        length, said = author.context_length or (0, "")  # 0: its code says nothing
        by_author = Fact("context_length", length, Status.SETTLED, Source.REFERENCE, said)
    gpt, facts = recognise(checkpoint, args.layout, loaded.roles, loaded.told, by_author)
    name, probe_text = find_tokenizer(args, loaded, gpt.vocab_size)
    tokenizer = load_tokenizer(name, gpt.context_length, checkpoint.vocabulary)
    beside = None if author else code_beside(args.checkpoint, checkpoint)
    if author:
        gpt, proof["reference_max_error"] = settle_by_reference(
            gpt, facts, author, author.avoid, author.tolerance, author.doubt
        )
    gpt, folds = fit_vocabulary(gpt, len(tokenizer), name or "in the checkpoint")
    if probe_text:
        print(f"Reading {probe_text} under every reading that is open ...", flush=True)
        gpt, proof["probe_text_loss"], trials = settle_by_text(gpt, facts, tokenizer, probe_text)
    if beside:
        leave_to_code(facts, beside[1])
    rivals = settle_what_cannot_matter(gpt, facts)
    return Reading(without_unused(gpt), facts, tokenizer, folds, probe_text, beside, trials, rivals, proof)


def open_author(args: ConvertArguments, loaded: Loaded) -> "Author | None":
    """The author's own module, if --reference names its code."""
    from fledge.checkpoints.author.reference import load_reference

    if not args.reference:
        return None
    heads = {name: fact.value for name, fact in loaded.told.items() if name == "n_head"}
    author = load_reference(args.reference, args.reference_kwargs, loaded.checkpoint, heads)
    print(*author.notes, sep="\n")
    return author


def find_tokenizer(args: ConvertArguments, loaded: Loaded, vocab_size: int) -> tuple[str | None, str | None]:
    """Returns the tokenizer to load (`None` for the vocabulary in the checkpoint) and the probe text, if any."""
    from fledge.tokenizers.beside import find_beside

    if args.tokenizer is not None or loaded.checkpoint.vocabulary is not None:
        return args.tokenizer, args.probe_text
    found, is_guess = find_beside(args.checkpoint, vocab_size)
    print(f"Tokenizer: {found}, found beside the checkpoint")
    if not is_guess:
        return found, args.probe_text
    print(f"  its {vocab_size} characters, sorted: a guess at the vocabulary, which reading a text checks")
    return found, args.probe_text or found


def check(args: ConvertArguments, reading: Reading) -> None:
    """Prints the facts, and refuses a model that cannot be converted or that rests on assumptions."""
    from fledge.checkpoints.summary import facts_table, refuse_assumptions, trials_table
    from fledge.checkpoints.targets import refuse_unconvertible

    print(facts_table(reading.facts))
    if reading.trials:
        print(trials_table(reading.trials))
    refuse_unconvertible(reading.gpt)
    if not args.accept_assumptions:
        refuse_assumptions(reading.facts, reading.rivals, reading.beside, bool(reading.probe_text))


def prove(args: ConvertArguments, reading: Reading) -> "Converted":
    """Represents the canonical GPT as a model of transformers, and proves in float64 that both compute the same."""
    from fledge.checkpoints.converted import Converted

    converted = Converted.of(reading.gpt, reading.tokenizer, args.target, args.allow_custom_code)
    converted.folds = [*reading.folds, *converted.folds]
    for fold in converted.folds:
        print(f"  {fold}")
    print("Proving: the same logits in float64 ...", flush=True)
    reading.proof["float64_max_error"] = converted.prove()
    reading.proof["positions"] = sum(ids.numel() for ids, _ in converted.probes)
    return converted


def report_of(loaded: Loaded, reading: Reading, converted: "Converted") -> dict[str, object]:
    """The content of conversion.json. Its `proof` is the dictionary of `reading`, to which later steps add."""
    import torch
    import transformers

    from fledge.checkpoints.summary import verdict
    from fledge.custom import hashes

    return {
        "verdict": verdict(reading.facts),
        "source": loaded.checkpoint.source,
        "facts": [fact.as_dict() for fact in reading.facts],
        "alternatives": [trial.as_dict() for trial in reading.trials],
        "folds": converted.folds,
        "left_out": loaded.checkpoint.left_out,
        "target": type(converted.model).__name__,
        "custom_code": hashes() if converted.has_own_code else None,
        "parameters": sum(tensor.numel() for tensor in converted.weights.values()),
        "context_length": reading.gpt.context_length,
        "vocab_size": reading.gpt.vocab_size,
        "proof": reading.proof,
        "versions": {
            "fledge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def summary(proof: Mapping[str, object]) -> str:
    return (
        f"Logits agree within {proof['float64_max_error']:.1e} in float64; {proof['max_relative_error']:.1e} of the "
        f"largest logit after reloading, arg max equal at {proof['argmax_equal']:.2%} of {proof['positions']} "
        f"positions, {proof['greedy_tokens']} greedy tokens the same."
    )
