"""Base against instruct: the same held-out prompts, the same decoding, every answer kept and scored by its task.

python evaluate_model.py --model model --base base --dataset data --output_dir evaluation
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fledge.cli import UserError, check_output_dir, parse, run, staged, write_json
from fledge.sampling import Sampling


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "the folder that train_sft.py wrote"})
    base: str = field(metadata={"help": "the folder that convert_checkpoint.py wrote"})
    dataset: str = field(metadata={"help": "the folder that prepare_dataset.py wrote"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    split: str = field(default="test", metadata={"help": "the split to ask from (default test)"})
    num_prompts: int = field(default=200, metadata={"help": "prompts to answer (default 200, or all there are)"})
    batch_size: int = field(default=64, metadata={"help": "prompts answered together (default 64)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier evaluation in output_dir"})


def main():
    args, sampling = parse(sys.argv[1:], EvaluateArguments, Sampling, description=__doc__)
    sampling.check()
    if args.num_prompts < 1 or args.batch_size < 1:
        raise UserError("--num_prompts and --batch_size must be at least 1.")
    check_output_dir(args.output_dir, args.overwrite, "metrics.json")
    data = Path(args.dataset)

    import transformers

    from fledge.encoding import open_prepared, open_rows, prompt_length
    from fledge.evaluation import COMMON, completion_losses, paired_difference, report, summarise, table
    from fledge.generation import answer_all, load_model
    from fledge.tasks import load_task

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    budget, tokenizer, encoded = open_prepared(data)
    if args.split not in encoded:
        raise UserError(f"{data} has no split {args.split!r}; it has {', '.join(encoded)}.")
    task = load_task(budget["task"])
    text = open_rows(data)
    labels = {name: [row["ending"] for row in split] for name, split in text.items()}
    stories = {name: [row["messages"][-1]["content"] for row in split] for name, split in text.items()}
    rows = encoded[args.split].select(range(min(args.num_prompts, len(encoded[args.split])))).to_list()
    prompts = [row["input_ids"][: prompt_length(row["labels"])] for row in rows]
    instructions = [row["messages"][-2]["content"] for row in text[args.split][: len(rows)]]

    # The judge learns from the training split and is itself judged on the two others.
    judge = task.EndingJudge(stories["train"], labels["train"])
    unseen = [name for name in text if name != "train"]
    accuracy = judge.accuracy(
        [story for name in unseen for story in stories[name]],
        [label for name in unseen for label in labels[name]],
    )
    judge_n = sum(len(text[name]) for name in unseen)
    judged_by = (
        f"The ending classifier is right on {accuracy:.1%} of {judge_n} unseen stories, both endings weighing the same."
    )
    print(judged_by, flush=True)

    metrics = {
        "task": budget["task"],
        "split": args.split,
        "sampling": asdict(sampling),
        "judge": {"accuracy": accuracy, "n": judge_n},
        "meaning": task.MEANING | COMMON,
    }
    answers, scores = {}, {}
    for name, folder in (("base", args.base), ("model", args.model)):

        def progress(done: int, doing: str, name=name):
            print(f"\r  {name:<5}  {doing} {done}/{len(rows)}  ", end="", flush=True)

        model, _ = load_model(folder)
        if model.get_input_embeddings().num_embeddings != len(tokenizer):
            raise UserError(
                f"{folder} has another vocabulary than the dataset; evaluate the models it was prepared for."
            )
        nats, counts = completion_losses(model, tokenizer, rows, args.batch_size, lambda n: progress(n, "read"))
        made = answer_all(model, tokenizer, prompts, sampling, args.batch_size, lambda n: progress(n, "answered"))
        print()
        endings = judge.judge([answer.text for answer in made])
        answers[name] = made
        scores[name] = [
            task.score(instruction, answer.text, answer.stopped, ending) | {"eos_rate": float(answer.stopped)}
            for instruction, answer, ending in zip(instructions, made, endings, strict=True)
        ]
        metrics[name] = summarise(scores[name], nats, counts)
    metrics["difference"] = paired_difference(scores["base"], scores["model"])

    with staged(args.output_dir, args.overwrite, "metrics.json") as folder:
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as samples:
            for i, instruction in enumerate(instructions):
                sample = {"instruction": instruction, "reference": stories[args.split][i]}
                for name in ("base", "model"):
                    sample[name] = asdict(answers[name][i]) | {"scores": scores[name][i]}
                samples.write(json.dumps(sample, ensure_ascii=False) + "\n")
        (folder / "report.md").write_text(report(metrics, judged_by), encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
    print(f"\n{table(metrics)}\n\n{len(rows)} prompts, 95% intervals. {args.output_dir} holds every answer.")
    print("Next: generate.py")


if __name__ == "__main__":
    run(main)
