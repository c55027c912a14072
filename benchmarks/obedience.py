"""SFT, best-of-n, DPO and GRPO on the same minutes: how far each brings one instruct model, and what it costs.

    python benchmarks/obedience.py --model runs/quickstart/model --dataset runs/quickstart/data --minutes 15 \\
        --output_dir runs/obedience

Every way starts from the same model and has the same wall clock, its sampling included, after short trials that tell
how fast this machine is. SFT goes on with the references. Best-of-n and DPO share one sampling of the training prompts,
whose time counts for each of them. All are then measured on the same held-out prompts. `--ways` chooses some, a way
that was measured is not run again, and the keys of a way are those of its recipe (`--recipes`).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

# Way → its script, the recipe whose keys it has, and what it keeps of the model's answers, if it learns from them.
WAYS = {
    "sft": ("train_sft.py", "quickstart_best_of_n/train.yaml", None),
    "best_of_n": ("train_sft.py", "quickstart_best_of_n/train.yaml", "best"),
    "dpo": ("train_dpo.py", "quickstart_dpo/dpo.yaml", "pairs"),
    "grpo": ("train_grpo.py", "quickstart_grpo/grpo.yaml", None),
}
METRICS = ("ending_match", "ending_match_second", "topic", "coherence", "same_ending", "distinct_2")
LOSS = "completion_loss"
SAMPLES, SAMPLING = 8, 0.5  # answers to a prompt; the share of the minutes that best-of-n and DPO sample
TRIAL = 4  # steps


def run(script: str, **keys: object) -> float:
    """Runs a script, and returns the seconds that it took."""
    command = [sys.executable, script, *(f"--{key}={value}" for key, value in keys.items())]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.monotonic() - start


def train(script: str, seconds: float, output_dir: Path, keys: dict[str, object]) -> dict:
    """Trains for `seconds`, or for all epochs of `keys` if that is shorter; the record of the run."""
    if script != "train_grpo.py":  # which keeps the best of its checkpoints by its evaluations
        keys = keys | {"eval_strategy": "no"}
    trial_dir = output_dir.with_name(f"{output_dir.name}-trial")
    run(script, **keys | {"max_steps": TRIAL, "output_dir": trial_dir})
    trial = read(trial_dir / "run.json")
    steps = int(seconds * trial["steps"] / trial["seconds"])
    if "num_train_epochs" in keys:
        steps = min(steps, int(keys["num_train_epochs"] * trial["rows"]["train"] / trial["effective_batch_size"]))
    run(script, **keys | {"max_steps": max(1, steps), "output_dir": output_dir})
    return read(output_dir / "run.json")


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def sample(args: argparse.Namespace, seconds: float, output_dir: Path) -> float:
    """Answers about as many training prompts as `seconds` allow; how long it took."""
    asked = {"model": args.model, "dataset": args.dataset, "split": "train", "num_samples": SAMPLES}
    asked |= {"answers_only": True, "overwrite": True}
    few, more = (
        run("evaluate_model.py", num_prompts=count, output_dir=output_dir.with_name("answers-trial"), **asked)
        for count in (8, 32)
    )
    prompts = max(32, int(24 * seconds / max(more - few, 1.0)))
    return run("evaluate_model.py", num_prompts=prompts, output_dir=output_dir, **asked)


def go(way: str, args: argparse.Namespace, model: Path) -> dict:
    """Runs a way into `model`; the seconds of sampling and of training, and the steps."""
    script, file, keep = WAYS[way]
    keys = yaml.safe_load((args.recipes / file).read_text(encoding="utf-8"))
    keys |= {"model_name_or_path": args.model, "dataset": args.dataset}
    sampled = 0.0
    if keep:
        answers, timing = args.output_dir / "answers", args.output_dir / "sampling.json"
        if not timing.exists():
            timing.write_text(json.dumps({"seconds": sample(args, 60 * SAMPLING * args.minutes, answers)}))
        sampled = read(timing)["seconds"]
        keys["dataset"] = args.output_dir / f"{way}-data"
        made = {"task": read(args.dataset / "budget.json")["task"], "tokenizer": args.model, "keep": keep}
        made |= {"source": "answers", "data": answers, "output_dir": keys["dataset"], "overwrite": True}
        run("prepare_dataset.py", **made)
    record = train(script, 60 * args.minutes - sampled, model, keys)
    return {"sampled": sampled, "trained": record["seconds"], "steps": record["steps"]}


def measured(way: str, args: argparse.Namespace) -> dict:
    """What a way reached, from its evaluation, which is made if it is not there."""
    folder = args.output_dir / way
    if not (folder / "evaluation" / "metrics.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        spent = go(way, args, folder / "model")
        (folder / "spent.json").write_text(json.dumps(spent))
        asked = {"base": args.model, "dataset": args.dataset, "num_prompts": args.num_prompts}
        run("evaluate_model.py", model=folder / "model", output_dir=folder / "evaluation", overwrite=True, **asked)
    return read(folder / "spent.json") | read(folder / "evaluation" / "metrics.json")


def line(name: str, minutes: str, metrics: dict[str, dict]) -> str:
    headline = metrics["instruction_following"]
    cells = [f"{headline['value']:.1%} ({headline['low']:.1%} to {headline['high']:.1%})"]
    cells += [f"{metrics[key]['value']:.1%}" if key in metrics else "" for key in METRICS]
    cells.append(f"{metrics[LOSS]['value']:.3f}")
    return f"| {' | '.join([name, minutes, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--num_prompts", type=int, default=200)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    columns = ["way", "minutes", "instruction following", *(name.replace("_", " ") for name in (*METRICS, LOSS))]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, way in enumerate(args.ways):
        found = measured(way, args)
        if number == 0:
            lines.append(line("the model at the start", "0", found["base"]))
        minutes = f"{(found['sampled'] + found['trained']) / 60:.1f}"
        minutes += f" (sampling {found['sampled'] / 60:.1f})" if found["sampled"] else ""
        lines.append(line(way.replace("_", "-"), minutes, found["model"]))
        print("\n".join(lines[-2:]), flush=True)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
