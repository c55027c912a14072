"""A hand-written checkpoint → a Hugging Face model, with a proof that both compute the same.

python convert_checkpoint.py --checkpoint model.pt --tokenizer tokenizer.json --output_dir base
python convert_checkpoint.py --checkpoint model.pt --inspect
"""

import gc
import sys
from dataclasses import asdict, dataclass, field

from fledge.cli import UserError, parse, write_json
from fledge.folders import Output, claimed
from fledge.generation.sampling import Sampling


@dataclass
class ConvertArguments:
    checkpoint: str = field(
        metadata={"help": "a .pt .pth .bin .ckpt .tar .safetensors file, or a folder that holds one"}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "gpt2, a tokenizer's file or folder; default: what lies in the checkpoint or beside it"},
    )
    output_dir: str | None = field(default=None, metadata={"help": "the folder to write"})
    layout: str | None = field(default=None, metadata={"help": "force a known layout's defaults"})
    mapping: str | None = field(default=None, metadata={"help": "a YAML file that names roles and facts by hand"})
    target: str = field(default="auto", metadata={"help": "gpt2, llama, opt, …: a class of transformers (or auto)"})
    n_head: int | None = field(default=None, metadata={"help": "attention heads, when the checkpoint does not say"})
    activation: str | None = field(default=None, metadata={"help": "gelu, gelu_tanh, relu, relu2 or silu"})
    attention_scale: float | None = field(default=None, metadata={"help": "default: 1/sqrt(width of a head)"})
    norm_eps: float | None = field(default=None, metadata={"help": "the norms' epsilon (default 1e-5)"})
    reference: str | None = field(
        default=None, metadata={"help": "your code: FILE, FILE:CLASS or a folder; this runs it"}
    )
    reference_kwargs: str | None = field(default=None, metadata={"help": "JSON of values that your code needs"})
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
    inspect: bool = field(default=False, metadata={"help": "print each tensor and the role it was taken for, and stop"})
    dry_run: bool = field(default=False, metadata={"help": "prove and report everything, write nothing"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion in output_dir"})


def main():
    (args,) = parse(sys.argv[1:], ConvertArguments, description=__doc__)
    if args.inspect or args.dry_run:
        return convert(args, None)
    if not args.output_dir:
        raise UserError("--output_dir is missing; name the folder to write, or pass --dry_run or --inspect.")
    inputs = {f"--{name}": vars(args)[name] for name in ("checkpoint", "tokenizer", "mapping", "probe_text")}
    with claimed(args.output_dir, "convert_checkpoint.py", args.overwrite, inputs) as output:
        convert(args, output)


def convert(args: ConvertArguments, output: Output | None) -> None:
    """Reads, proves and writes; without an `output` it only reads, or proves."""
    import torch
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    import fledge
    from fledge.checkpoints.custom import represent
    from fledge.checkpoints.evidence import settle_by_reference
    from fledge.checkpoints.facts import Fact, Source, Status
    from fledge.checkpoints.loading import load_checkpoint
    from fledge.checkpoints.mapping import read_mapping
    from fledge.checkpoints.probe_text import settle_by_text
    from fledge.checkpoints.proof import prove_exact, prove_greedy, prove_saved, prove_written, reference, rounding
    from fledge.checkpoints.questions import settle_what_cannot_matter, without_unused
    from fledge.checkpoints.recognition import fit_vocabulary, recognise
    from fledge.checkpoints.reference import code_beside, load_reference
    from fledge.checkpoints.roles import detect
    from fledge.checkpoints.summary import facts_table, leave_to_code, refuse_assumptions, trials_table, verdict
    from fledge.checkpoints.targets import refuse_unconvertible
    from fledge.custom import FledgeGPTConfig, hashes, open_as_strangers_do
    from fledge.guards import borrow
    from fledge.memory import return_freed_memory
    from fledge.tokenizers import load_tokenizer
    from fledge.tokenizers.beside import find_beside

    revert_weight_conversion = borrow("transformers.core_model_loading", "revert_weight_conversion")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    return_freed_memory()
    checkpoint = load_checkpoint(args.checkpoint)
    print(f"Read {len(checkpoint.tensors)} tensors from {args.checkpoint}, left out {len(checkpoint.left_out)}.")
    if kind := checkpoint.source.get("class"):
        print(
            f"It is a whole pickled module, {kind}: its tensors and plain values were read, and none of its code ran."
        )
    roles, told = read_mapping(args.mapping) if args.mapping else ({}, {})
    for name in ("n_head", "activation", "attention_scale", "norm_eps"):
        if getattr(args, name) is not None:
            told[name] = Fact.of(name, getattr(args, name), Source.FLAG)
    if args.inspect:
        structure = detect(checkpoint.tensors, roles)
        for name, tensor in checkpoint.tensors.items():
            stored = "  stored (in, out)" if name in structure.transposed else ""
            print(f"  {name:<50} {tuple(tensor.shape)!s:<18} {structure.roles.get(name, '?')}{stored}")
        for name, why in checkpoint.left_out.items():
            print(f"  {name:<50} left out: {why}")
        for problem in [*structure.refusals, *structure.problems]:
            print(problem)
        return

    own, author_says = None, None
    if args.reference:
        heads = {name: fact.value for name, fact in told.items() if name == "n_head"}
        own = load_reference(args.reference, args.reference_kwargs, checkpoint, heads)
        print(*own.notes, sep="\n")
        if own.context_length:
            length, where = own.context_length
            author_says = Fact("context_length", length, Status.SETTLED, Source.REFERENCE, where)
    gpt, facts = recognise(checkpoint, args.layout, roles, told, author_says)
    if args.tokenizer is None and checkpoint.vocabulary is None:
        args.tokenizer, is_guess = find_beside(args.checkpoint, gpt.vocab_size)
        print(f"Tokenizer: {args.tokenizer}, found beside the checkpoint")
        if is_guess:
            print(f"  its {gpt.vocab_size} characters, sorted: a guess at the vocabulary, which reading a text checks")
            args.probe_text = args.probe_text or args.tokenizer
    tokenizer = load_tokenizer(args.tokenizer, gpt.context_length, checkpoint.vocabulary)
    proof, trials = {}, []
    if own:
        gpt, proof["reference_max_error"] = settle_by_reference(gpt, facts, own, own.avoid, own.tolerance)
    code = None if own else code_beside(args.checkpoint, checkpoint)
    gpt, cut = fit_vocabulary(gpt, len(tokenizer), args.tokenizer or "in the checkpoint")
    if args.probe_text:
        print(f"Reading {args.probe_text} under every reading that is open ...", flush=True)
        gpt, proof["probe_text_loss"], trials = settle_by_text(gpt, facts, tokenizer, args.probe_text)
        if code:
            leave_to_code(facts, code[1])
    rivals = settle_what_cannot_matter(gpt, facts)
    print(facts_table(facts))
    if trials:
        print(trials_table(trials))
    gpt = without_unused(gpt)
    refuse_unconvertible(gpt)
    if not args.accept_assumptions:
        refuse_assumptions(facts, rivals, code, bool(args.probe_text))
    said = verdict(facts)

    token_ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config, weights, folds = represent(gpt, token_ids, args.target, args.allow_custom_code)
    own_code = isinstance(config, FledgeGPTConfig)
    folds = [*cut, *folds]
    for fold in folds:
        print(f"  {fold}")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print("Proving: the same logits in float64 ...", flush=True)
    probes = reference(gpt)
    proof["float64_max_error"] = prove_exact(probes, model, weights, folds)
    float32_rounding = rounding(gpt, probes)
    proof["positions"] = sum(ids.numel() for ids, _ in probes)
    report = {
        "verdict": said,
        "source": checkpoint.source,
        "facts": [fact.as_dict() for fact in facts],
        "alternatives": [asdict(trial) for trial in trials],
        "folds": folds,
        "left_out": checkpoint.left_out,
        "target": type(model).__name__,
        "custom_code": hashes() if own_code else None,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "context_length": gpt.context_length,
        "vocab_size": gpt.vocab_size,
        "proof": proof,
        "versions": {
            "fledge": fledge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if args.dry_run:
        print(f"{said} {proof['float64_max_error']:.1e} in float64. Nothing was written: --dry_run.")
        return

    with output.staged() as folder:
        for name in weights:  # one after the other, so that what was folded in float64 goes at once
            weights[name] = weights[name].float().contiguous()
        model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()
        proof["greedy_tokens"] = prove_greedy(gpt, model)
        token_ids = {name: i for name, i in token_ids.items() if i is not None}
        # A base is asked as the model that is made of it.
        model.generation_config = GenerationConfig(**token_ids, **Sampling().decoding())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print("Proving: the same from the saved folder ...", flush=True)
        prove_written(folder / "model.safetensors", revert_weight_conversion(model, weights))
        del gpt, checkpoint, weights, model  # what is loaded now takes their place in memory
        gc.collect()
        reloaded = open_as_strangers_do(folder) if own_code else AutoModelForCausalLM.from_pretrained(folder)
        proof |= prove_saved(probes, reloaded, float32_rounding)
        write_json(folder / "conversion.json", report)
    print(
        f"Logits agree within {proof['float64_max_error']:.1e} in float64; {proof['max_relative_error']:.1e} of the "
        f"largest logit after reloading, arg max equal at {proof['argmax_equal']:.2%} of {proof['positions']} "
        f"positions, {proof['greedy_tokens']} greedy tokens the same."
    )
    if "probe_text_loss" in proof:
        print(f"Loss on {args.probe_text}: {proof['probe_text_loss']:.3f} nats per token.")
    if own_code:
        print("It has code of its own: Fledge opens it as any model, and elsewhere it needs trust_remote_code=True.")
    print(said)
    print(f"{args.output_dir} is a {report['target']} of {report['parameters']:,} parameters. Next: prepare_dataset.py")
