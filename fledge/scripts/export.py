"""A model folder → GGUF (llama.cpp, Ollama) or ONNX (transformers.js, onnxruntime), proven against the original.

python export.py --model model --to gguf --output_dir model-gguf
python export.py --model model --to onnx --quantize int8 --dataset data --output_dir model-onnx

A quantised file is only written if its loss is within limits. With --dataset the loss is also measured in prompts
followed.
"""

import re
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fledge.cli import parse, write_json
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.hub import find_model
from fledge.ranges import AT_LEAST_ONE, check_ranges
from fledge.terminal import progress, quiet
from fledge.trained import Trained, read_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fledge.exporting.programs import Program
    from fledge.models import ModelAndTokenizer

NEEDED = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
KINDS = {"gguf": ("f16", "q8_0", "q4_0"), "onnx": ("fp16", "int8")}
UNKNOWN_TASK = Trained("", False, [])


@dataclass
class ExportArguments:
    GROUPS: ClassVar = {"quantize": "smaller files", "name": "what is written"}

    model: str = field(metadata={"help": "a model folder, or a model on the Hub (user/name)"})
    to: str = field(metadata={"help": "gguf or onnx"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    quantize: str | None = field(
        default=None,
        metadata={"help": "quantise the weights: f16, q8_0, q4_0 (gguf), fp16, int8 (onnx)"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "the folder that prepare_dataset.py wrote, to measure prompts followed"}
    )
    num_prompts: int = field(default=200, metadata={"help": "prompts of --dataset to answer (default 200)"})
    task: str | None = field(
        default=None, metadata={"help": "the Python file of a task of your own, whose code is run; others are known"}
    )
    accept_loss: bool = field(
        default=False, metadata={"help": "write a quantised file that loses more than the limits"}
    )
    name: str | None = field(
        default=None,
        metadata={"help": "the model's name in the file (default: its folder's)"},
    )
    license: str | None = field(
        default=None, metadata={"help": "an SPDX id for the GGUF file (default: that of the model's card)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier export in output_dir"})


def main() -> Path:
    """Returns the folder it wrote."""
    (args,) = parse(sys.argv[1:], ExportArguments, description=__doc__)
    check(args)
    inputs = {"--model": args.model, "--dataset": args.dataset}
    with claimed(args.output_dir, "export.py", args.overwrite, inputs) as output:
        export(args, find_model(args.model), output)
    return output.path


def check(args: ExportArguments) -> None:
    """Checks every value, that keys go together, and that the packages are installed.

    Raises:
        UserError: one of these checks fails.
    """
    if args.to not in NEEDED:
        raise UserError(f"--to {args.to} is unknown; choose gguf or onnx.")
    if args.quantize and args.quantize not in KINDS[args.to]:
        raise UserError(
            f"--quantize {args.quantize} is no kind of {args.to}; choose one of {', '.join(KINDS[args.to])}."
        )
    if args.to == "onnx" and (args.name or args.license):
        raise UserError(
            "--name and --license are written into a GGUF file, and ONNX has no place for them; leave them out."
        )
    if args.dataset and not args.quantize:
        raise UserError("--dataset measures what --quantize loses; add --quantize, or leave --dataset out.")
    check_ranges(args, {"num_prompts": AT_LEAST_ONE})
    if missing := [package for package in NEEDED[args.to] if find_spec(package) is None]:
        raise UserError(
            f"Export to {args.to} needs {', '.join(missing)}; `pip install 'fledge-gpt[export]'` brings it."
        )
    if args.to == "gguf" and args.quantize and not (args.accept_loss or find_spec("llama_cpp")):
        raise UserError(
            "What --quantize loses is measured by llama.cpp: `pip install llama-cpp-python`, or pass --accept_loss."
        )


def export(args: ExportArguments, source: Path, output: Output) -> None:
    """Writes the float32 file and proves it; then replaces it by the quantised one and measures that."""
    from fledge.models import load_model

    quiet()
    model, tokenizer = load_model(args.model)
    model.cpu()
    trained = read_trained(source) or UNKNOWN_TASK
    to_target = to_gguf if args.to == "gguf" else to_onnx
    with output.staged() as folder:
        record = to_target(args, source, folder, (model, tokenizer), trained)
        write_json(folder / "export.json", {"to": args.to, "quantize": args.quantize} | record)
    file = output.path / record["file"]
    print(f"{file} has {file.stat().st_size / 1e6:,.1f} MB.")
    if args.to == "gguf":
        print(f"Next: llama-cli -m {file}\n      ollama create {file.stem.lower()} -f {output.path / 'Modelfile'}")
    else:
        print(f"{output.path} runs in transformers.js and onnxruntime.")


def to_gguf(args: ExportArguments, source: Path, folder: Path, model: "ModelAndTokenizer", trained: Trained) -> dict:
    """Writes the GGUF file and Ollama's Modelfile; returns the content of `export.json`."""
    from fledge.exporting.gguf_file import Description, write_gguf
    from fledge.exporting.programs import GGUF_TOLERANCE, LlamaCpp
    from fledge.exporting.templates import modelfile
    from fledge.models import context_of

    name = args.name or name_of(args.model)
    about = Description(name, args.license or license_of(source), trained.system)
    stem, context = re.sub(r"[^\w.-]+", "-", name), context_of(model[0].config)
    file = folder / f"{stem}-f32.gguf"
    for difference in write_gguf(*model, file, about):
        print(difference)
    record = {}
    if find_spec("llama_cpp"):
        program, text = LlamaCpp(file, context), probe(model[1])
        record["proof"] = prove(model, program, GGUF_TOLERANCE, "llama.cpp")
        if program.ids(text) != model[1](text, add_special_tokens=False)["input_ids"]:
            raise UserError(f"llama.cpp splits {text!r} into other tokens; nothing was written.")
    else:
        print("Not proven: `pip install llama-cpp-python` lets this script compare llama.cpp's logits.")
    if args.quantize:
        file.unlink()
        file = folder / f"{stem}-{args.quantize}.gguf"
        write_gguf(*model, file, about, args.quantize)
        if find_spec("llama_cpp"):
            record["loss"] = measure(args, model, LlamaCpp(file, context), trained)
    (folder / "Modelfile").write_text(modelfile(*model, file.name, trained.system), encoding="utf-8")
    return record | {"file": file.name}


def to_onnx(args: ExportArguments, source: Path, folder: Path, model: "ModelAndTokenizer", trained: Trained) -> dict:
    """Writes the ONNX graph, configs and tokenizer; returns the content of `export.json`."""
    from fledge.exporting.onnx_graph import quantize_onnx, write_onnx
    from fledge.exporting.programs import ONNX_TOLERANCE, OnnxRuntime

    write_onnx(*model, folder, trained.system)
    file = folder / "onnx" / "model.onnx"
    record = {"proof": prove(model, OnnxRuntime(file), ONNX_TOLERANCE, "onnxruntime")}
    if args.quantize:
        file = quantize_onnx(folder, args.quantize)
        record["loss"] = measure(args, model, OnnxRuntime(file), trained)
    return record | {"file": file.relative_to(folder).as_posix()}


def probe(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A text that another program must split as transformers does."""
    from fledge.encoding import prompt_text

    messages = [{"role": "user", "content": "What did Zoë's 2 cats do?\n\nThey ran."}]
    return prompt_text(tokenizer, messages) if tokenizer.chat_template else messages[0]["content"]


def prove(model: "ModelAndTokenizer", program: "Program", tolerance: float, by: str) -> dict:
    """Compares the float32 logits of a program with the model's own.

    Raises:
        UserError: they differ by more than `tolerance` of the largest one.
    """
    from fledge.exporting.programs import largest_error, logits_of, random_prompts

    prompts = random_prompts(*model)
    error = largest_error(model[0], prompts, logits_of(program, prompts))
    if error > tolerance:
        raise UserError(f"{by} computes other logits: {error:.1e} of the largest one; nothing was written.")
    print(f"Proven by {by}: float32 logits within {error:.1e} of the largest one, with the cache and without.")
    return {"by": by, "largest_logit_error": error}


def measure(args: ExportArguments, model: "ModelAndTokenizer", program: "Program", trained: Trained) -> dict:
    """Measures the loss of a quantised file; returns its entry in `export.json`.

    Raises:
        UserError: it is more than the limits, and --accept_loss is not given.
    """
    from fledge.exporting.programs import largest_error, logits_of, random_prompts
    from fledge.exporting.verdict import held_out, judge, self_written

    trial = (
        held_out(Path(args.dataset), args.task, model[1], args.num_prompts)
        if args.dataset
        else self_written(*model, trained.example)
    )
    prompts = random_prompts(*model)
    error = largest_error(model[0], prompts, logits_of(program, prompts))
    with progress("quantised: answers", len(trial.prompts)) as tell:
        verdict = judge(*model, program, trial, error, tell)
    print(f"Measured at {args.quantize}: {verdict}")
    if verdict.faults and not args.accept_loss:
        raise UserError(
            f"--quantize {args.quantize} loses too much: {' and '.join(verdict.faults)}; nothing was written. "
            "Choose a finer kind, or pass --accept_loss."
        )
    return verdict.record


def name_of(model: str) -> str:
    """The name of a model's folder, or of the folder above if that is only called `model`."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def license_of(folder: Path) -> str | None:
    """The license that the model's card states, if it has a card."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    return ModelCard.load(card).data.license if card.exists() else None
