"""The Gradio Space: an app of three files, its settings for one model, and its card."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fledge.cli import read_json, write_json
from fledge.pages import FLEDGE_PAGE, MODEL_CARD
from fledge.publishing.card import read_samples, render
from fledge.publishing.repositories import published_sampling
from fledge.sampling import Sampling

GRADIO = "6.31.0"  # the Space's version, as in constraints.txt
EXAMPLES = 4  # on the Space's page
NOTICE = "Answers are made up by a small model; nobody has checked them. What you type is kept nowhere."


@dataclass
class About:
    """What a Space's page and its card say about the model; an id that is `None` gets no link."""

    title: str
    repo_id: str | None
    dataset_repo_id: str | None
    base_model: str | None
    license: str | None
    language: str


def build_space(folder: Path, model_dir: Path, evaluation_dir: Path | None, about: About) -> None:
    """Fills `folder` with a Gradio app, its settings for this model, and its card. The app does not need Fledge."""
    from huggingface_hub import SpaceCardData

    sampling = published_sampling(model_dir, evaluation_dir)
    settings = space_settings(model_dir, read_samples(evaluation_dir), about, sampling)
    for name in ("app.py", "requirements.txt"):
        shutil.copy(MODEL_CARD / "space" / name, folder)
    write_json(folder / "settings.json", settings)
    metadata = SpaceCardData(
        title=settings["title"],
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        license=about.license,
        models=[name for name in (about.repo_id, about.base_model) if name],
        datasets=[about.dataset_repo_id] if about.dataset_repo_id else None,
        colorFrom="green",
        colorTo="blue",
        emoji="\N{OPEN BOOK}",
        short_description="A small language model to try",
    )
    card = render("space/README.md.jinja", metadata=metadata.to_yaml(), repo_id=about.repo_id, **settings)
    (folder / "README.md").write_text(card, encoding="utf-8")


def space_settings(model_dir: Path, samples: list[dict], about: About, sampling: Sampling) -> dict:
    """The settings of the Space's app.py: the models, the pages, and how input becomes a prompt."""
    budget = read_json(model_dir / "budget.json", "train_sft.py", task=str, about_task=dict)
    name, asks = budget["task"], budget["about_task"]
    asked = [sample["messages"] for sample in samples if sample["sample"] == 0] or [asks["example"]]
    # Examples must be understandable alone, so later turns of a conversation are excluded.
    alone = [messages for messages in asked if sum(message["role"] == "user" for message in messages) == 1]
    examples = [messages[-1]["content"] for messages in alone[:EXAMPLES]]
    story = chat = None
    if name == "topic_ending":
        from fledge.tasks import load_task
        from fledge.tasks.topic_ending import instruction, requested

        story = {
            "tab": "Story",
            "label": "Topic",
            "placeholder": requested(asks["example"][-1]["content"])[0],
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
        "model": about.repo_id,
        "base": about.base_model,
        "trust_remote_code": any(model_dir.glob("modeling_*.py")),
        "title": about.title,
        "links": links(about),
        "description": f"A language model trained to {asks['purpose']}.",
        "notice": NOTICE,
        "system": [message for message in asks["example"] if message["role"] == "system"],
        "temperature": sampling.temperature,
        "decoding": {key: getattr(sampling, key) for key in ("top_k", "top_p", "repetition_penalty")},
        "length": sampling.max_new_tokens,
        "story": story,
        "chat": chat,
    }


def links(about: About) -> list[dict[str, str]]:
    """The links of the page: the model, its data, Fledge."""
    hub = "https://huggingface.co/"
    known = {"The model": about.repo_id, "Its data": about.dataset_repo_id and f"datasets/{about.dataset_repo_id}"}
    found = [{"label": label, "url": hub + path} for label, path in known.items() if path]
    return [*found, {"label": "Made with Fledge", "url": FLEDGE_PAGE}]
