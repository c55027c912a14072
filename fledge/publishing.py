"""Cards and repository folders, generated from what the stages wrote about themselves."""

import json
import shutil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fledge.cli import UserError, read_json

CARDS = Path(__file__).parent.parent / "model_card"


def render(template: str, **values) -> str:
    """Renders a template of `model_card/`; a name that it asks for and nobody gives is an error, never a blank."""
    environment = Environment(
        loader=FileSystemLoader(CARDS),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def dataset_card(budget: dict, example: dict) -> str:
    """The README of a dataset folder, from its budget report and one of its rows."""
    from huggingface_hub import DatasetCardData

    metadata = DatasetCardData(
        language="en",
        task_categories=["text-generation"],
        tags=["instruction-tuning", "fledge"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*.parquet"} for name in budget["splits"]],
            }
        ],
    )
    return render("dataset.md.jinja", metadata=metadata.to_yaml(), budget=budget, example=example)


def build_repository(
    folder: Path, model_dir: Path, evaluation_dir: Path | None, repo_id: str, license_id: str | None
) -> None:
    """Fills `folder` with what the Hub gets: the model's files, the records of its making, and its card.

    Raises:
        UserError: a file that the card needs is missing, or a record names a path of this machine.
    """
    records = {
        "conversion": read_json(model_dir / "conversion.json", "train_sft.py"),
        "budget": read_json(model_dir / "budget.json", "train_sft.py"),
        "run": read_json(model_dir / "run.json", "train_sft.py"),
        "metrics": None,
    }
    for file in sorted(model_dir.iterdir()):
        if file.is_file():
            shutil.copy(file, folder)
    samples = []
    if evaluation_dir:
        records["metrics"] = read_json(evaluation_dir / "metrics.json", "evaluate_model.py")
        shutil.copy(evaluation_dir / "metrics.json", folder)
        samples_file = evaluation_dir / "samples.jsonl"
        if not samples_file.exists():
            raise UserError(f"{samples_file} is missing; evaluate_model.py writes it.")
        # Answers may hold Unicode's own line separators, at which splitlines() would cut a line of JSON.
        samples = [json.loads(line) for line in samples_file.read_text(encoding="utf-8").split("\n") if line]
    card = model_card(repo_id, license_id, model_dir, samples, **records)
    (folder / "README.md").write_text(card, encoding="utf-8")
    refuse_local_paths(folder)


def model_card(
    repo_id: str,
    license_id: str | None,
    model_dir: Path,
    samples: list[dict],
    conversion: dict,
    budget: dict,
    run: dict,
    metrics: dict | None,
) -> str:
    """The README of a model repository, valid for the Hub, from the records and nothing else."""
    from huggingface_hub import EvalResult, ModelCardData

    from fledge.encoding import prompt_text
    from fledge.report import table
    from fledge.tasks import load_task
    from fledge.tokenizers import open_tokenizer

    task, tokenizer = load_task(budget["task"]), open_tokenizer(model_dir)
    example = [{"role": "user", "content": samples[0]["instruction"]}] if samples else task.EXAMPLE
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=budget["task"],
            dataset_name=f"{budget['task']} from {budget['source']}",
            dataset_split=metrics["split"],
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(metric["value"], 4),
        )
        for name, metric in (metrics["model"] if metrics else {}).items()
    ]
    metadata = ModelCardData(
        language="en",
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fledge", "trl", "sft", "instruction-tuning", budget["task"]],
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        widget=[
            {
                "text": prompt_text(tokenizer, [{"role": "user", "content": sample["instruction"]}]),
                "output": {"text": sample["model"]["text"]},
            }
            for sample in samples[:2]
        ]
        or None,
    )
    return render(
        "model.md.jinja",
        metadata=metadata.to_yaml(),
        repo_id=repo_id,
        purpose=task.PURPOSE,
        example=example,
        prompt=prompt_text(tokenizer, example),
        conversion=conversion,
        budget=budget,
        run=run,
        metrics=metrics,
        num_prompts=len(samples),
        samples=samples[:2],
        table=table(metrics) if metrics else "",
    )


def refuse_local_paths(folder: Path) -> None:
    """Raises:
    UserError: a text file of the folder names this user's home or working directory.
    """
    private = {str(path) for path in (Path.home(), Path.cwd()) if len(path.parts) > 1}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jsonl", ".md", ".jinja"):
            text = file.read_text(encoding="utf-8")
            if found := next((path for path in private if path in text), None):
                raise UserError(
                    f"{file.name} names {found}, a path of this machine; publishing it would show it to everyone."
                )
