"""Cards: the templates of `model_card/`, filled from the records of a run. Nothing on them is written by hand."""

import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from jinja2 import UndefinedError
from safetensors import safe_open

from fledge.cli import ORIGINS, read_json
from fledge.errors import UserError
from fledge.evaluation.intervals import NO_SHARES
from fledge.evaluation.report import (
    LOWER_IS_BETTER,
    NEUTRAL,
    WHO,
    asked,
    beside,
    cautions,
    headroom,
    held_against,
    judged_by,
    table,
    table_by,
    title,
)
from fledge.models import open_config
from fledge.pages import open_templates
from fledge.sampling import Sampling

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

STAGES = {
    "conversion": "convert_checkpoint.py",
    "pretraining": "pretrain.py",
    "budget": "prepare_dataset.py",
    "run": "train_sft.py",
    "metrics": "evaluate_model.py",
}
SHOWN = 2  # answers on the card
BESIDE = "\n\n--- The base, asked the same:\n\n"


def render(template: str, **values: object) -> str:
    """Renders a template of `model_card/` into Markdown, YAML or code."""
    environment = open_templates(keep_trailing_newline=True)
    environment.filters |= {"fenced": fenced, "cell": cell, "number": "{:,}".format, "words": title}
    environment.filters |= {"shell": shlex.quote, "json": as_json}
    try:
        return environment.get_template(template).render(**values)
    except (UndefinedError, TypeError) as error:
        raise UserError(f"A record lacks what the card says ({error}); run the stage that wrote it again.") from error


def fenced(text: str, language: str = "text") -> str:
    """A Markdown code block with a fence that is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def cell(value: object) -> str:
    """A value as the text of a table's cell."""
    return "not set" if value is None else re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def as_json(value: object) -> str:
    """JSON that is also a Python literal, because messages contain only text."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Named:
    """What a card needs and no record has: ids on the Hub, and what the user says about the model."""

    repo_id: str
    license: str | None = None
    language: str = "en"
    base_model: str | None = None
    base_data: str | None = None
    dataset_repo_id: str | None = None
    space_repo_id: str | None = None


class Records(TypedDict):
    """The record of each stage; `None` if there is none."""

    budget: dict[str, Any]
    conversion: dict[str, Any] | None
    metrics: dict[str, Any] | None
    pretraining: dict[str, Any] | None
    run: dict[str, Any]


def read_records(model_dir: Path, evaluation_dir: Path | None) -> Records:
    """The record of each stage, `None` if there is none. The records of data and training must exist.

    Raises:
        UserError: a required record is missing, or a record is damaged.
    """
    if not (model_dir / "budget.json").exists():
        raise UserError(
            f"{model_dir} has no budget.json, as train_sft.py leaves it after training on a folder of "
            "prepare_dataset.py, so no card can say what it learned; prepare the data (a table with --source columns) "
            "and train on that."
        )
    files: dict[str, Path | None] = {name: model_dir / f"{name}.json" for name in STAGES}
    files["metrics"] = evaluation_dir / "metrics.json" if evaluation_dir else None
    for file in ORIGINS:
        if not (model_dir / file).exists():
            files[Path(file).stem] = None
    return cast(Records, {name: read_json(file, STAGES[name]) if file else None for name, file in files.items()})


def read_samples(evaluation_dir: Path | None) -> list[dict]:
    """Prompts with the answers of base and model, in the order of the evaluation; empty without an evaluation.

    Raises:
        UserError: the evaluation has no samples.jsonl.
    """
    if not evaluation_dir:
        return []
    file = evaluation_dir / "samples.jsonl"
    if not file.exists():
        raise UserError(f"{file} is missing; {STAGES['metrics']} writes it.")
    # Answers may contain Unicode line separators, at which splitlines() would split a line of JSON.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def architecture(folder: Path) -> str:
    """The class of the model in `folder`, and its sizes as far as its config has them under their usual names."""
    config = open_config(folder, folder)
    named = {"num_hidden_layers": "layers", "num_attention_heads": "heads", "hidden_size": "width"}
    named["vocab_size"] = "vocabulary"
    sizes = [f"{word} {getattr(config, key):,}" for key, word in named.items() if hasattr(config, key)]
    return ", ".join([f"`{name}`" for name in config.architectures or ()] + sizes)


def count_parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files; a tied head is stored once."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, the handle is no mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def failures(samples: list[dict], meaning: dict[str, str]) -> list[dict]:
    """The yes-or-no metrics that answers fail, most failed first, each with counts, its meaning, and one such answer.

    The answer is the first one that the card does not show anyway, if there is one.
    """
    found = []
    for name, means in meaning.items():
        if name in (*LOWER_IS_BETTER, *NEUTRAL, *NO_SHARES):  # in which 0 is not a failure
            continue
        scores = {i: s["model"]["scores"][name] for i, s in enumerate(samples) if name in s["model"]["scores"]}
        missed = [i for i, score in scores.items() if score == 0]
        if missed and set(scores.values()) <= {0, 1}:
            example = samples[next((i for i in missed if i >= SHOWN), missed[0])]
            found.append({"name": name, "missed": len(missed), "of": len(scores), "meaning": means, "example": example})
    return sorted(found, key=lambda failure: -failure["missed"] / failure["of"])


def drawn(sampling: Sampling) -> str:
    """The sampling settings, in words."""
    if sampling.temperature == 0:
        said = ["always the likeliest token"]
    else:
        said = [f"temperature {sampling.temperature}", f"top-p {sampling.top_p}"]
        said += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    said += [f"repetition penalty {sampling.repetition_penalty}"] if sampling.repetition_penalty != 1 else []
    return ", ".join(said)


def unusual(sampling: Sampling) -> str:
    """The keys of generate.py that give this `sampling`, where it differs from the defaults."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    changed = {name: getattr(sampling, name) for name in names if getattr(sampling, name) != getattr(Sampling(), name)}
    return "".join(f" --{name} {value}" for name, value in changed.items())


def emissions(model_dir: Path) -> dict | None:
    """The last line of codecarbon's emissions.csv (kilograms of CO2 equivalents, kWh)."""
    if not (model_dir / "emissions.csv").exists():
        return None
    with (model_dir / "emissions.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {"grams": 1000 * float(last["emissions"]), "kwh": float(last["energy_consumed"])}


def model_card(folder: Path, records: Records, samples: list[dict], sampling: Sampling, named: Named) -> str:
    """The README of the model repository in `folder`, from its files and from the answers of the evaluation."""
    firsts = [sample for sample in samples if sample["sample"] == 0][:SHOWN]
    files = files_beside(folder)
    metadata = card_metadata(records, firsts, sampling, named, files)
    return render(
        "model.md.jinja",
        metadata=metadata.to_yaml(),
        name=named.repo_id.split("/")[-1],
        parameters=count_parameters(folder),
        architecture=architecture(folder),
        **how_to_use(folder, records["budget"], samples, sampling),
        shown=firsts,
        **what_was_measured(records["metrics"], samples),
        **vars(named),
        **files,
        **records,
    )


def card_metadata(
    records: Records, firsts: list[dict], sampling: Sampling, named: Named, files: dict[str, Any]
) -> "ModelCardData":
    """The metadata of a card: the YAML block at its beginning."""
    from huggingface_hub import ModelCardData

    budget, measured = records["budget"], files["emissions"]
    method = "dpo" if budget.get("keep") == "pairs" else "sft"
    origin = ["from-scratch"] if records["conversion"] or records["pretraining"] else []
    return ModelCardData(
        language=named.language,
        license=named.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=named.base_model,
        datasets=[named.dataset_repo_id] if named.dataset_repo_id else None,
        tags=["fledge", "trl", method, "instruction-tuning", *origin, budget["task"].replace("_", "-")]
        + ["custom_code"] * bool(files["custom_code"]),
        model_name=named.repo_id.split("/")[-1],
        thumbnail=f"https://huggingface.co/{named.repo_id}/resolve/main/loss_curve.png" if files["has_curve"] else None,
        eval_results=results(budget, records["metrics"], named.dataset_repo_id) or None,
        co2_eq_emissions=measured
        and {"emissions": round(measured["grams"], 3), "source": "codecarbon", "training_type": "fine-tuning"},
        widget=[
            {
                "messages": sample["messages"],
                "output": {"text": sample["model"]["text"] + BESIDE + sample["base"]["text"]},
            }
            for sample in firsts
        ]
        or None,
        inference={"parameters": sampling.decoding()},  # the sampling of the page's widget
    )


def results(budget: dict, metrics: dict | None, dataset_repo_id: str | None) -> list["EvalResult"]:
    """Every metric of the model in the Hub's form, with its interval, chance and reference."""
    from huggingface_hub import EvalResult

    if metrics is None:
        return []
    found = []
    for name, metric in metrics["model"].items():
        levels = {"chance": metrics["chance"]["model"].get(name), "reference": metrics["reference"].get(name)}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset_repo_id or budget["task"],
                # A model that learned from answers is measured on the dataset that their prompts came from.
                dataset_name=budget["task"] if budget.get("keep") else f"{budget['task']} from {budget['source']}",
                dataset_split=metrics["split"],
                metric_type=name,
                metric_name=title(name),
                metric_value=round(metric["value"], 4),
                metric_args={
                    "interval_95": [round(metric["low"], 4), round(metric["high"], 4)],
                    "n": metric["n"],
                    **{key: round(level["value"], 4) for key, level in levels.items() if level},
                },
            )
        )
    return found


def how_to_use(folder: Path, budget: dict, samples: list[dict], sampling: Sampling) -> dict:
    """A prompt, its rendered text, and the sampling of its answer, for the card's snippets."""
    from fledge.encoding import encode_prompt, prompt_text
    from fledge.tokenizers import open_tokenizer

    about, tokenizer = budget["about_task"], open_tokenizer(folder)
    messages = samples[0]["messages"] if samples else about["example"]
    # Models with a table of positions fail beyond its end.
    room = tokenizer.model_max_length - len(encode_prompt(tokenizer, messages))
    return {
        "purpose": about["purpose"],
        "messages": messages,
        "each_way": each_way(about, messages),
        "prompt": prompt_text(tokenizer, messages),
        "max_new_tokens": min(sampling.max_new_tokens, room),
        "eos_token": tokenizer.eos_token,
        "drawn": drawn(sampling),
        "unusual": unusual(sampling),
    }


def each_way(about: dict, messages: list[dict]) -> list[list[dict]]:
    """The conversation with each label of the task's first field that has labels, such as both endings.

    For a task without such a field, or a prompt in another wording, only the conversation itself.
    """
    fields, wording = about.get("fields", {}), about.get("wording", "")
    pattern = re.escape(wording)
    for name in fields:
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>.*)")
    made = re.fullmatch(pattern, messages[-1]["content"])
    chosen = next((name for name, labels in fields.items() if labels), None)
    if not (made and chosen):
        return [messages]
    prompts = [wording.format(**made.groupdict() | {chosen: label}) for label in fields[chosen]]
    return [[*messages[:-1], {"role": "user", "content": prompt}] for prompt in prompts]


def what_was_measured(metrics: dict | None, samples: list[dict]) -> dict:
    """The evaluation in words and tables; empty without an evaluation."""
    if metrics is None:
        return {"evaluation": None, "failures": []}
    return {
        "evaluation": {
            "asked": asked(metrics),
            "headline": {called: beside(metrics, who) for who, called in WHO.items()},
            "remarks": [*held_against(metrics), *cautions(metrics), *headroom(metrics), *judged_by(metrics)],
            "table": table(metrics),
            "by_class": table_by(metrics),
        },
        "failures": failures(samples, metrics["meaning"]),
    }


def files_beside(folder: Path) -> dict:
    """The optional files in the repository besides the weights."""
    exports = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in (".gguf", ".onnx")]
    return {
        "emissions": emissions(folder),
        "custom_code": sorted(file.name for file in folder.glob("*_fledge_gpt.py")),
        "has_curve": (folder / "loss_curve.png").exists(),
        "has_adapter": (folder / "adapter").is_dir(),
        "exports": sorted(exports),
    }
