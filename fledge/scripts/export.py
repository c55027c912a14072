"""A model folder → GGUF (llama.cpp, Ollama) or ONNX (transformers.js, onnxruntime), proven against the original.

python export.py --model model --to gguf --output model.gguf
python export.py --model model --to onnx --output model-onnx
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.cli import UserError, parse, writing
from fledge.folders import Output, check_inputs, claimed
from fledge.hub import find_model
from fledge.locks import locked
from fledge.terminal import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDED = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "a model folder, or a model of the Hub (user/name)"})
    to: str = field(metadata={"help": "gguf or onnx"})
    output: str = field(metadata={"help": "the file (gguf) or the folder (onnx) to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier export"})


def main() -> Path:
    """Returns the file or folder it wrote."""
    (args,) = parse(sys.argv[1:], ExportArguments, description=__doc__)
    if args.to not in NEEDED:
        raise UserError(f"--to {args.to} is unknown; choose gguf or onnx.")
    if missing := [package for package in NEEDED[args.to] if find_spec(package) is None]:
        raise UserError(
            f"Export to {args.to} needs {', '.join(missing)}; `pip install 'fledge-gpt[export]'` brings it."
        )
    output = Path(args.output)
    if args.to == "onnx":
        with claimed(output, "export.py", args.overwrite, {"--model": args.model}, "--output") as folder:
            export(args, lambda *model: to_onnx(folder, *model))
            return output
    check_inputs(output, "--output", {"--model": args.model})
    if output.exists() and not (args.overwrite and output.is_file()):
        raise UserError(f"{output} is already there; name another --output or pass --overwrite.")
    if output.exists() and not is_ours(output):
        raise UserError(f"{output} was not written by export.py and will not be replaced; name another --output.")
    find_model(args.model)
    with locked(output.resolve(), "--output"):
        export(args, lambda *model: to_gguf(args, *model))
    return output


def is_ours(file: Path) -> bool:
    """Whether a GGUF file says in its first entries that Fledge wrote it."""
    with writing(file), file.open("rb") as content:
        return b"fledge.version" in content.read(4096)


def export(args: ExportArguments, to_target: Callable) -> None:
    import torch

    from fledge.encoding import prompt_text
    from fledge.models import context_of, load_model

    quiet()
    model, tokenizer = load_model(args.model)
    model.cpu()
    context, V = context_of(model.config), min(len(tokenizer), model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(V, (min(n, context),), generator=generator).tolist() for n in (1, 33, context)]
    messages = [{"role": "user", "content": "What did Zoë's 2 cats do?\n\nThey ran."}]
    texts = [prompt_text(tokenizer, messages) if tokenizer.chat_template else messages[0]["content"]]
    to_target(model, tokenizer, prompts, texts)


def to_gguf(
    args: ExportArguments,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    texts: list[str],
) -> None:
    from fledge.exporting import GGUF_TOLERANCE, gguf_ids, gguf_logits, largest_error, write_gguf

    output = Path(args.output).resolve()
    with writing(output), tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as building:
        file = Path(building) / output.name
        differences = write_gguf(model, tokenizer, file, Path(args.model).resolve().name)
        if find_spec("llama_cpp"):
            error = largest_error(model, prompts, gguf_logits(file, prompts))
            if error > GGUF_TOLERANCE:
                raise UserError(
                    f"llama.cpp computes other logits: {error:.1e} of the largest one; nothing was written."
                )
            for text, ids in zip(texts, gguf_ids(file, texts), strict=True):
                if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
                    raise UserError(f"llama.cpp splits {text!r} into other tokens; nothing was written.")
            print(f"Proven by llama.cpp: logits within {error:.1e} of the largest one, the same tokens of a prompt.")
        else:
            print("Not proven: `pip install llama-cpp-python` lets this script compare llama.cpp's logits.")
        file.replace(output)
    for difference in differences:
        print(difference)
    print(f"{args.output} holds weights, tokenizer and template. Run it: llama-cli -m {args.output}")


def to_onnx(
    output: Output,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    texts: list[str],
) -> None:
    from fledge.exporting import ONNX_TOLERANCE, largest_error, onnx_logits, write_onnx

    with output.staged() as folder:
        write_onnx(model, tokenizer, folder)
        error = largest_error(model, prompts, onnx_logits(folder / "onnx" / "model.onnx", prompts))
        if error > ONNX_TOLERANCE:
            raise UserError(f"onnxruntime computes other logits: {error:.1e} of the largest one; nothing was written.")
        print(f"Proven by onnxruntime: logits within {error:.1e} of the largest one, with the cache and without.")
    print(f"{output.path} runs in transformers.js and onnxruntime.")
