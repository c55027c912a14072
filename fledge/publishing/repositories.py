"""Builds the folders that are uploaded: the model and the dataset, each with its card."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

from fledge.cli import read_json, write_json
from fledge.errors import UserError
from fledge.hub import download
from fledge.models import fingerprint
from fledge.publishing.card import Named, model_card, read_records, read_samples, render
from fledge.sampling import Sampling

# Files of training that nobody needs who loads the model.
NOT_PUBLISHED = ("README.md", "training_args.bin")


def dataset_card(budget: dict, rows: list[dict], prompt: str) -> str:
    """The README of a dataset folder, from its budget report, some of its rows, and the prompt of the first of them."""
    from huggingface_hub import DatasetCardData

    use = "preference" if budget["keep"] == "pairs" else "instruction-tuning"
    metadata = DatasetCardData(
        language=None if budget["source"] == "columns" else "en",
        license=budget["license"],
        task_categories=["text-generation"],
        tags=[use, "fledge"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*.parquet"} for name in budget["splits"]],
            }
        ],
    )
    asks_once = budget["about_task"]["asks_once"]
    return render(
        "dataset.md.jinja", metadata=metadata.to_yaml(), budget=budget, rows=rows, prompt=prompt, asks_once=asks_once
    )


def build_model(
    folder: Path,
    model_dir: Path,
    evaluation_dir: Path | None,
    named: Named,
) -> None:
    """Fills `folder` with the model's files, its records, and its card.

    Raises:
        UserError: a file that the card needs is missing or of an older Fledge, or the evaluation is of other weights.
    """
    records = read_records(model_dir, evaluation_dir)
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and file.name not in NOT_PUBLISHED and not file.name.startswith("."):
            shutil.copy(file, folder)
    for part in ("adapter", "onnx"):
        if (model_dir / part).is_dir():
            shutil.copytree(model_dir / part, folder / part, ignore=shutil.ignore_patterns("README.md", ".*"))
    if evaluation_dir:
        check_evaluated(model_dir, evaluation_dir)
        shutil.copy(evaluation_dir / "metrics.json", folder)
    config = read_json(model_dir / "generation_config.json", "train_sft.py")
    sampling = published_sampling(model_dir, evaluation_dir)
    kept = {key: value for key, value in config.items() if key not in Sampling().decoding()}
    write_json(folder / "generation_config.json", kept | sampling.decoding())
    samples = read_samples(evaluation_dir)
    try:
        card = model_card(folder, records, samples, sampling, named)
    except KeyError as error:
        raise UserError(f"A record lacks {error}, which the card says; run the stage that wrote it again.") from error
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_evaluated(model_dir: Path, evaluation_dir: Path) -> None:
    """Checks that an evaluation measured the weights that are published, by the journal of its answers.

    Raises:
        UserError: it measured others, as when the model was trained again since; or its journal is damaged.
    """
    journal = evaluation_dir / "answers.jsonl"
    if not journal.exists():
        return
    try:
        with journal.open(encoding="utf-8") as lines:
            measured = json.loads(next(lines))["--model"]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{journal} is damaged; run evaluate_model.py again.") from error
    if measured != fingerprint(model_dir):
        raise UserError(
            f"{evaluation_dir} measured other weights than those of {model_dir}; run evaluate_model.py with this model."
        )


def published_sampling(model_dir: Path, evaluation_dir: Path | None) -> Sampling:
    """The published sampling: that of the evaluation, or else of the model's generation_config.json.

    Raises:
        UserError: a record is damaged.
    """
    if evaluation_dir:
        said = read_json(evaluation_dir / "metrics.json", "evaluate_model.py", sampling=dict)["sampling"]
    else:
        said = read_json(model_dir / "generation_config.json", "train_sft.py")
        said = said if said.get("do_sample", True) else {**said, "temperature": 0.0}
    known = {entry.name for entry in fields(Sampling)}
    try:
        sampling = Sampling(**{key: value for key, value in said.items() if key in known})
        sampling.check()
    except TypeError as error:
        raise UserError(f"The record of how answers are drawn is damaged: {error}.") from error
    return sampling


def build_dataset(folder: Path, data_dir: Path) -> None:
    """Fills `folder` with the parquet files, the card that was made with them, and the budget report.

    Raises:
        UserError: `data_dir` is not a prepared dataset.
    """
    read_json(data_dir / "budget.json", "prepare_dataset.py")
    if not (data_dir / "README.md").exists() or not any((data_dir / "data").glob("*.parquet")):
        raise UserError(f"{data_dir} holds no data/*.parquet with a README.md; prepare_dataset.py writes them.")
    shutil.copytree(data_dir / "data", folder / "data", ignore=shutil.ignore_patterns(".*"))
    for name in ("README.md", "budget.json", "budget.md", "budget.png"):
        if (data_dir / name).exists():
            shutil.copy(data_dir / name, folder)


def download_records(repo_id: str) -> Path:
    """Downloads the records of a published model that a Space needs.

    Raises:
        UserError: there is no such model, or Fledge did not publish it.
    """
    folder = download(repo_id, None, ("budget.json", "generation_config.json", "README.md", "*_fledge_gpt.py"))
    if not (folder / "budget.json").exists():
        raise UserError(f"{repo_id} holds no budget.json, so Fledge did not publish it; name a model that it did.")
    return folder


def dataset_of(model_dir: Path) -> str | None:
    """The dataset that the card of a published model names; `None` if it names none."""
    from huggingface_hub import RepoCard

    card = model_dir / "README.md"
    named = RepoCard.load(card).data.to_dict().get("datasets") if card.exists() else None
    return named[0] if named else None
