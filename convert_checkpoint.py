"""A hand-written checkpoint → a Hugging Face model, with a proof that both compute the same.

python convert_checkpoint.py --checkpoint model.pt --tokenizer tokenizer.json --output_dir base
"""

import sys
from dataclasses import asdict, dataclass, field

from fledge.cli import UserError, check_output_dir, parse, run, staged, write_json


@dataclass
class ConvertArguments:
    checkpoint: str = field(metadata={"help": "a .pt, .pth, .bin or .safetensors file, or a folder that holds one"})
    tokenizer: str = field(metadata={"help": "a folder, a tokenizer.json, or gpt2"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    layout: str | None = field(default=None, metadata={"help": "force a known layout instead of recognising it"})
    n_head: int | None = field(default=None, metadata={"help": "attention heads, when the checkpoint does not say"})
    activation: str | None = field(default=None, metadata={"help": "gelu, gelu_tanh, relu or silu"})
    attention_scale: float | None = field(default=None, metadata={"help": "default: 1/sqrt(width of a head)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion in output_dir"})


def main():
    (args,) = parse(sys.argv[1:], ConvertArguments, description=__doc__)
    check_output_dir(args.output_dir, args.overwrite, "conversion.json")

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig, GPT2LMHeadModel

    import fledge
    from fledge.checkpoints.gpt2 import to_gpt2
    from fledge.checkpoints.layouts import recognise
    from fledge.checkpoints.loading import load_checkpoint
    from fledge.checkpoints.proof import prove_exact, prove_saved, reference
    from fledge.tokenizers import load_tokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    checkpoint = load_checkpoint(args.checkpoint)
    print(f"Read {len(checkpoint.tensors)} tensors from {args.checkpoint}.")
    gpt, facts = recognise(checkpoint, args.layout, args.n_head, args.activation, args.attention_scale)
    tokenizer = load_tokenizer(args.tokenizer, gpt.context_length)
    if len(tokenizer) != gpt.vocab_size:
        raise UserError(
            f"The tokenizer {args.tokenizer} has {len(tokenizer)} tokens and the checkpoint's embedding has "
            f"{gpt.vocab_size} rows; name the tokenizer that the model was trained with."
        )
    for fact in facts:
        print(f"  {fact.name:<16} {fact.value!s:<22} from {fact.source}")

    end = tokenizer.eos_token_id
    token_ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    config, weights, folds = to_gpt2(gpt, token_ids)
    for fold in folds:
        print(f"  {fold}")
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(weights, assign=True, strict=True)
    model.tie_weights()
    print("Proving: the same logits in float64 ...", flush=True)
    probes = reference(gpt)
    exact = prove_exact(probes, model)
    parameters = model.num_parameters()

    with staged(args.output_dir, args.overwrite, "conversion.json") as folder:
        model.float().generation_config = GenerationConfig(**token_ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print("Proving: the same from the saved folder ...", flush=True)
        saved = prove_saved(probes, AutoModelForCausalLM.from_pretrained(folder))
        report = {
            "source": checkpoint.source,
            "facts": [asdict(fact) for fact in facts],
            "folds": folds,
            "left_out": checkpoint.left_out,
            "target": type(model).__name__,
            "parameters": parameters,
            "context_length": gpt.context_length,
            "vocab_size": gpt.vocab_size,
            "proof": {"float64_max_error": exact, **saved, "positions": sum(ids.numel() for ids, _ in probes)},
            "versions": {
                "fledge": fledge.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        write_json(folder / "conversion.json", report)
    print(
        f"Proven: {exact:.1e} in float64; {saved['max_relative_error']:.1e} of the largest logit after reloading, "
        f"arg max equal at {saved['argmax_equal']:.2%} of {report['proof']['positions']} positions."
    )
    print(f"{args.output_dir} is a {report['target']} of {parameters:,} parameters. Next: prepare_dataset.py")


if __name__ == "__main__":
    run(main)
