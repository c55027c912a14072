"""Builds the static Space: a page that runs the model in the visitor's browser, and the model's files."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.exporting.onnx_graph import quantize_onnx, write_onnx
from fledge.exporting.programs import OnnxRuntime, largest_error, logits_of, random_prompts
from fledge.exporting.verdict import judge, self_written
from fledge.messages import Messages
from fledge.models import context_of, load_model
from fledge.pages import MODEL_CARD, open_templates
from fledge.publishing.card import count_parameters, read_samples, render
from fledge.publishing.repositories import published_sampling
from fledge.publishing.spaces import About, space_settings
from fledge.resizing import add_rows
from fledge.trained import read_trained

PAGE = ("app.js", "worker.js", "service_worker.js", "style.css", "icon.svg")
# The files that transformers.js opens besides the weights, and those of a model that uses another's tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
BASE_FILES = MODEL_FILES[:2]
SHORTEST_ANSWER = 16  # tokens of the context that a prompt must leave
HALF_TOLERANCE = 5e-3  # largest change of a logit, as a share of the largest, by rounding the weights to 11 bits
LARGE = 1024  # tensors with at least this many numbers are stored in half precision


def build_static_space(
    folder: Path,
    model_dir: Path,
    base: str | None,
    evaluation_dir: Path | None,
    about: About,
    quantize: str | None = None,
) -> None:
    """Fills `folder` with the page, the card, and the model as ONNX, and the base too if it is named.

    `quantize` is a kind of `quantize_onnx`, or `None` to store the weights in half precision.

    Raises:
        UserError: see `load_model`, `write_onnx`, `store_half` and `measured`; or a record of the model is missing.
    """
    trained = read_trained(model_dir)
    example = trained.example if trained else []
    model, tokenizer = load_model(model_dir)
    models = {"model": write_browser_model(model.cpu(), tokenizer, folder / "model", MODEL_FILES, quantize, example)}
    if base:
        of_base, _ = load_model(base)
        add_rows(of_base.cpu(), tokenizer)
        models["base"] = write_browser_model(of_base, tokenizer, folder / "base", BASE_FILES, quantize, example)
    sampling = published_sampling(model_dir, evaluation_dir)
    gradio = space_settings(model_dir, read_samples(evaluation_dir), about, sampling)
    parameters, size = count_parameters(model_dir), sum(models["model"]["files"].values())
    settings = {
        **{
            key: gradio[key]
            for key in ("description", "notice", "system", "temperature", "decoding", "length", "title", "links")
        },
        "language": about.language,
        "form": gradio["story"] or one_question(gradio["chat"]),
        "size": f"{readable_count(parameters)} parameters, {megabytes(size)}.",
        "context": context_of(model.config),
        "shortest": SHORTEST_ANSWER,
        "ends": read_json(folder / "model" / "generation_config.json", "train_sft.py", eos_token_id=object)[
            "eos_token_id"
        ],
        "models": models,
        "dtype": quantize or "fp32",
        "version": digest(folder),
    }
    _write_page(folder, settings)
    _write_card(folder, about, settings)


def _write_page(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the files that a browser opens."""
    for name in PAGE:
        shutil.copy(MODEL_CARD / "static_space" / name, folder)
    # A data block ends at the first "</script", so "<" is written as an escape.
    data = json.dumps(settings, ensure_ascii=False).replace("<", "\\u003c")
    page = open_templates(autoescape=True).get_template("static_space/index.html.jinja")
    (folder / "index.html").write_text(page.render(settings=settings, data=data), encoding="utf-8")


def _write_card(folder: Path, about: About, settings: dict[str, Any]) -> None:
    """Writes README.md, whose metadata makes the folder a static Space."""
    from huggingface_hub import SpaceCardData

    metadata = SpaceCardData(
        title=about.title,
        sdk="static",
        app_file="index.html",
        license=about.license,
        models=[name for name in (about.repo_id, about.base_model) if name] or None,
        datasets=[about.dataset_repo_id] if about.dataset_repo_id else None,
        colorFrom="green",
        colorTo="blue",
        emoji="\N{OPEN BOOK}",
        short_description="A small language model, run by your browser",
    )
    card = render("static_space/README.md.jinja", metadata=metadata.to_yaml(), **settings)
    (folder / "README.md").write_text(card, encoding="utf-8")


def one_question(chat: dict[str, Any]) -> dict[str, Any]:
    """The form of a task without fields: a prompt, sent unchanged."""
    return {
        "label": "Prompt",
        "placeholder": chat["placeholder"],
        "empty": chat["empty"],
        "instruction": "{topic}",
        "endings": [],
        "examples": [[example] for example in chat["examples"]],
    }


def write_browser_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    beside: tuple[str, ...],
    quantize: str | None,
    example: Messages,
) -> dict[str, Any]:
    """Writes the model as ONNX and the files `beside` it; returns their sizes, the total, and how weights are stored.

    `example` is the prompt for measuring the loss of `quantize`.

    Raises:
        UserError: the architecture has no ONNX export, or onnxruntime computes other logits.
    """
    with tempfile.TemporaryDirectory(prefix="fledge-") as work:
        write_onnx(model, tokenizer, Path(work), [])  # the page sends the system message itself
        if quantize:
            file = quantize_onnx(Path(work), quantize)
            stored = measured(model, tokenizer, file, quantize, example)
        else:
            file = Path(work, "onnx", "model.onnx")
            stored = store_half(model, tokenizer, file)
        files = {}
        for name in (*beside, file.relative_to(work).as_posix()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(work, name), folder / name)
            files[name] = (folder / name).stat().st_size
    size = megabytes(sum(files.values()))
    print(f"{folder.name}: {size}, {stored}")
    return {"files": files, "size": size, "stored": stored}


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str, example: Messages
) -> str:
    """Measures the loss of a quantised graph on texts that the model itself samples; returns it in words.

    Raises:
        UserError: it is more than the limits of `export.py`.
    """
    program, prompts = OnnxRuntime(file), random_prompts(model, tokenizer)
    error = largest_error(model, prompts, logits_of(program, prompts))
    trial = self_written(model, tokenizer, example)
    verdict = judge(model, tokenizer, program, trial, error, lambda done: None)
    if verdict.faults:
        raise UserError(
            f"--quantize {kind} loses too much ({' and '.join(verdict.faults)}); leave it out, and the page holds "
            "weights in half precision."
        )
    return f"stored as {kind} and computed so: {verdict}"


def store_half(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> str:
    """Stores the model's weights in half precision and compares the logits; returns a sentence about it.

    Raises:
        UserError: a weight is too large, or the logits differ by more than `HALF_TOLERANCE`.
    """
    halve(file)
    prompts = random_prompts(model, tokenizer)
    error = largest_error(model, prompts, logits_of(OnnxRuntime(file), prompts))
    if error > HALF_TOLERANCE:
        raise UserError(
            f"In half precision the weights compute other logits ({error:.1e} of the largest one, at most "
            f"{HALF_TOLERANCE:.0e} is allowed); publish it with --space gradio."
        )
    return f"stored in half precision and computed in single precision: logits within {error:.1e} of the largest one."


def halve(file: Path) -> None:
    """Stores the large float32 weights of an ONNX graph as float16, followed by a cast to float32.

    onnxruntime casts them once, when it opens the file. So the file has half the size and is as fast on every device,
    also on those that cannot compute in float16.

    Raises:
        UserError: a weight is too large for float16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = onnx.load(file)
    widened = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LARGE:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise UserError(f"The weight {name} is too large for half precision; publish it with --space gradio.")
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        widened.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.widen", to=TensorProto.FLOAT))
    nodes = [*widened, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    onnx.save(graph, file)


def digest(folder: Path) -> str:
    """A hash of all files below `folder`: if it changes, browsers download the model again."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def readable_count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} million" if parameters >= 1e5 else f"{parameters:,}"
