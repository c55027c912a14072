"""Folders as the Hub gets them: the model, the dataset, and the Space, each with its card."""

import shutil
from dataclasses import fields
from pathlib import Path

from fledge.cli import UserError, read_json, write_json
from fledge.hub import download
from fledge.pages import MODEL_CARD
from fledge.publishing.card import Named, model_card, read_records, read_samples, render
from fledge.sampling import Sampling

# What training leaves besides the model, and nobody who loads the model needs.
NOT_PUBLISHED = ("README.md", "training_args.bin")
GRADIO = "6.31.0"  # what the Space runs on, as constraints.txt pins it
EXAMPLES = 4  # on the Space's page
NOTICE = "Answers are made up by a small model; nobody has checked them. What you type is kept nowhere."


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
    """Fills `folder` with the model's files, the records of its making, and its card.

    Raises:
        UserError: a file that the card needs is missing.
    """
    records = read_records(model_dir, evaluation_dir)
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and file.name not in NOT_PUBLISHED and not file.name.startswith("."):
            shutil.copy(file, folder)
    for part in ("adapter", "onnx"):
        if (model_dir / part).is_dir():
            shutil.copytree(model_dir / part, folder / part, ignore=shutil.ignore_patterns("README.md", ".*"))
    if evaluation_dir:
        shutil.copy(evaluation_dir / "metrics.json", folder)
    config = read_json(model_dir / "generation_config.json", "train_sft.py")
    sampling = published_sampling(model_dir, evaluation_dir)
    kept = {key: value for key, value in config.items() if key not in Sampling().decoding()}
    write_json(folder / "generation_config.json", kept | sampling.decoding())
    samples = read_samples(evaluation_dir)
    card = model_card(folder, records, samples, sampling, named)
    (folder / "README.md").write_text(card, encoding="utf-8")


def published_sampling(model_dir: Path, evaluation_dir: Path | None) -> Sampling:
    """How answers are drawn: as the figures were measured, or as the model's generation_config.json says.

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
        UserError: `data_dir` is no prepared dataset.
    """
    read_json(data_dir / "budget.json", "prepare_dataset.py")
    if not (data_dir / "README.md").exists() or not any((data_dir / "data").glob("*.parquet")):
        raise UserError(f"{data_dir} holds no data/*.parquet with a README.md; prepare_dataset.py writes them.")
    shutil.copytree(data_dir / "data", folder / "data", ignore=shutil.ignore_patterns(".*"))
    for name in ("README.md", "budget.json", "budget.md", "budget.png"):
        if (data_dir / name).exists():
            shutil.copy(data_dir / name, folder)


def build_space(
    folder: Path,
    model_dir: Path,
    evaluation_dir: Path | None,
    repo_id: str,
    license_id: str | None,
    base_model: str | None,
) -> None:
    """Fills `folder` with a Gradio app, its settings for this model, and its card. The app needs no Fledge."""
    from huggingface_hub import SpaceCardData

    sampling = published_sampling(model_dir, evaluation_dir)
    settings = space_settings(model_dir, read_samples(evaluation_dir), repo_id, base_model, sampling)
    for name in ("app.py", "requirements.txt"):
        shutil.copy(MODEL_CARD / "space" / name, folder)
    write_json(folder / "settings.json", settings)
    metadata = SpaceCardData(
        title=settings["title"],
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        license=license_id,
        models=[repo_id, *([base_model] if base_model else [])],
        colorFrom="green",
        colorTo="blue",
        emoji="\N{OPEN BOOK}",
        short_description="A small language model to try",
    )
    card = render("space/README.md.jinja", metadata=metadata.to_yaml(), repo_id=repo_id, **settings)
    (folder / "README.md").write_text(card, encoding="utf-8")


def space_settings(
    model_dir: Path, samples: list[dict], repo_id: str, base_model: str | None, sampling: Sampling
) -> dict:
    """What the Space's app.py reads: the models, which pages it shows, and how a visitor's words become a prompt."""
    budget = read_json(model_dir / "budget.json", "train_sft.py", task=str, about_task=dict)
    name, about = budget["task"], budget["about_task"]
    asked = [sample["messages"] for sample in samples if sample["sample"] == 0] or [about["example"]]
    # An example stands alone: the later turn of a conversation does not.
    alone = [messages for messages in asked if sum(message["role"] == "user" for message in messages) == 1]
    examples = [messages[-1]["content"] for messages in alone[:EXAMPLES]]
    story = chat = None
    if name == "topic_ending":
        from fledge.tasks import load_task
        from fledge.tasks.topic_ending import instruction, requested

        story = {
            "tab": "Story",
            "label": "Topic",
            "placeholder": requested(about["example"][-1]["content"])[0],
            "empty": "Please type a topic first.",
            "instruction": instruction("{topic}", "{ending}"),
            "endings": list(load_task(name).classes["ending"]),
            "examples": [list(requested(example)) for example in examples],
        }
    elif name == "story_chat":
        from fledge.tasks.story_chat import PHRASINGS

        story = {
            "tab": "Story",
            "label": "Words",
            "placeholder": "boat, brave, laugh",
            "empty": "Please type some words first.",
            "instruction": PHRASINGS["words"][0].replace("{words}", "{topic}"),
            "endings": [],
            "examples": [["boat, brave, laugh"], ["cat, rain, window"]],
        }
    if name != "topic_ending":
        chat = {
            "tab": "Chat",
            "placeholder": "Ask for something, then ask about it.",
            "empty": "Please type something first.",
            "examples": examples,
        }
    return {
        "model": repo_id,
        "base": base_model,
        "trust_remote_code": any(model_dir.glob("modeling_*.py")),
        "title": repo_id.split("/")[-1],
        "description": f"A language model trained to {about['purpose']}.",
        "notice": NOTICE,
        "system": [message for message in about["example"] if message["role"] == "system"],
        "temperature": sampling.temperature,
        "decoding": {key: getattr(sampling, key) for key in ("top_k", "top_p", "repetition_penalty")},
        "length": sampling.max_new_tokens,
        "story": story,
        "chat": chat,
    }


def download_records(repo_id: str) -> Path:
    """What a Space needs to know of a published model.

    Raises:
        UserError: there is no such model, or Fledge did not publish it.
    """
    folder = download(repo_id, None, ("budget.json", "generation_config.json", "*_fledge_gpt.py"))
    if not (folder / "budget.json").exists():
        raise UserError(f"{repo_id} holds no budget.json, so Fledge did not publish it; name a model that it did.")
    return folder
