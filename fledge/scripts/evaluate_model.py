"""Base against instruct: the same held-out prompts, the same decoding, every answer kept and scored by its task.

python evaluate_model.py --model model --base base --dataset data --output_dir evaluation
python evaluate_model.py --config recipes/quickstart/evaluate.yaml --resume --ratings ratings.json
python evaluate_model.py --model model --dataset data --split train --num_samples 8 --answers_only --output_dir answers
python evaluate_model.py --model model --capabilities
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from fledge.cli import parse, write_json, writing
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.hub import find_model
from fledge.marks import MARK
from fledge.ranges import AT_LEAST_ONE, POSITIVE, check_ranges
from fledge.sampling import Sampling
from fledge.terminal import progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fledge.evaluation.measuring import Answering
    from fledge.evaluation.prompts import Prompts
    from fledge.messages import Answer

RANGES = dict.fromkeys(("num_prompts", "num_samples", "batch_size", "judge_samples"), AT_LEAST_ONE)
RANGES["judge_timeout"] = POSITIVE  # seconds
NEEDED = ("base", "dataset", "output_dir")


@dataclass
class EvaluateArguments:
    GROUPS: ClassVar = {"split": "prompts", "resume": "the run", "ratings": "further judges"}
    REQUIRED: ClassVar = ("base", "dataset", "output_dir")

    model: str = field(metadata={"help": "the folder that train_sft.py wrote, or a model on the Hub"})
    base: str | None = field(
        default=None, metadata={"help": "the base that it was trained from: a folder or a model on the Hub"}
    )
    dataset: str | None = field(default=None, metadata={"help": "the folder that prepare_dataset.py wrote"})
    task: str | None = field(
        default=None, metadata={"help": "the Python file of a task of your own, whose code is run; others are known"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "the folder to write"})
    split: str = field(default="test", metadata={"help": "the split with the prompts (default test)"})
    num_prompts: int = field(default=200, metadata={"help": "prompts to answer (default 200, or all there are)"})
    only: list[str] = field(
        default_factory=list, metadata={"help": "use only these prompts: COLUMN=VALUE, as in kind=words"}
    )
    num_samples: int = field(default=1, metadata={"help": "answers to each prompt (default 1)"})
    batch_size: int = field(default=64, metadata={"help": "prompts answered together (default 64)"})
    resume: bool = field(default=False, metadata={"help": "reuse the answers that output_dir already has"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier evaluation in output_dir"})
    answers_only: bool = field(
        default=False,
        metadata={
            "help": "only answer, with rewards, for prepare_dataset.py --source answers: no base, scores or report"
        },
    )
    capabilities: bool = field(
        default=False, metadata={"help": "only show answers to fixed prompts of the task story_chat"}
    )
    ratings: list[str] | None = field(default=None, metadata={"help": "files of ratings that report.html saved"})
    judge_url: str | None = field(default=None, metadata={"help": "an OpenAI-compatible server: http://HOST:PORT/v1"})
    judge_model: str | None = field(default=None, metadata={"help": "the model on that server that judges"})
    judge_samples: int = field(default=3, metadata={"help": "replies asked for each answer (default 3)"})
    judge_pairs: bool = field(default=False, metadata={"help": "also compare the two answers, in both orders"})
    judge_timeout: float = field(default=60.0, metadata={"help": "seconds to wait for a reply (default 60)"})

    def check(self) -> None:
        """Checks every value, and that keys go together.

        Raises:
            UserError: a value out of range, or a key that needs another one.
        """
        check_ranges(self, RANGES)
        needed = () if self.capabilities else ("dataset", "output_dir") if self.answers_only else NEEDED
        for name in needed:
            if getattr(self, name) is None:
                others = "--capabilities and --answers_only do" if name == "base" else "--capabilities does"
                raise UserError(f"--{name} is missing; only {others} without it.")
        for name in ("base", "ratings", "judge_url", "capabilities") if self.answers_only else ():
            if getattr(self, name):
                raise UserError(f"--answers_only asks the model alone and writes no report; leave out --{name}.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("--judge_url and --judge_model belong together; give both or neither.")
        if self.judge_url is not None and not is_address(self.judge_url):
            raise UserError(f"--judge_url {self.judge_url} is no address; it looks like http://localhost:8000/v1.")
        if self.judge_pairs and not self.judge_url:
            raise UserError("--judge_pairs needs --judge_url and --judge_model.")


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:  # brackets of IPv6 that do not match, or a port that is no number
        return False


def main() -> Path | None:
    """Returns the folder it wrote."""
    args, sampling = parse(sys.argv[1:], EvaluateArguments, Sampling, description=__doc__)
    sampling.check()
    args.check()
    folders = [find_model(name).resolve() for name in (args.model, args.base) if name]
    if len(set(folders)) < len(folders):
        raise UserError(f"--base {args.base} is --model itself; name the model that it was trained from.")
    if args.capabilities:
        from fledge.evaluation.capabilities import show_capabilities

        quiet()
        show_capabilities(args.model, args.base, sampling)
        return None
    inputs = {f"--{name}": vars(args)[name] for name in ("model", "base", "dataset", "ratings")}
    with claimed(args.output_dir, "evaluate_model.py", None, inputs) as output:
        if output.owns_work and not (args.overwrite or args.resume):
            raise UserError(f"{output.path} holds an unfinished evaluation; --resume goes on, --overwrite begins anew.")
        output.check(args.overwrite or args.resume)
        (answer if args.answers_only else evaluate)(args, sampling, output)
    return output.path


def evaluate(args: EvaluateArguments, sampling: Sampling, output: Output) -> None:
    """Answers the prompts with each model, scores the answers, and writes the report.

    Each answer is stored as soon as it is made. An earlier evaluation stays until this one is complete.
    """
    from fledge.evaluation import report
    from fledge.evaluation.measuring import measure
    from fledge.evaluation.scoring import MEANING, Scoring, figures
    from fledge.evaluation.wording import Wording

    quiet()

    # ------------------------------------------------------------ Load and check
    ratings = [report.read_ratings(file) for file in args.ratings or []]
    prompts = open_asked(args)
    scorer = prompts.task.scorer(prompts.train_rows, prompts.unseen_rows)
    scoring = Scoring(prompts, scorer, Wording(prompts.tokenizer, prompts.rows, prompts.train_rows))
    models = open_models(args, prompts.tokenizer)
    answering = open_answering(args, sampling, prompts, output)

    # ------------------------------------------------------------ Answer and score
    answered = {who: measure(model, who, prompts, answering) for who, model in models.items()}
    for model in answered.values():
        model.scores = scoring.score(model.answers)

    samples = side_by_side(prompts, {who: (model.answers, "scores", model.scores) for who, model in answered.items()})
    meaning, judged = prompts.task.meaning | MEANING, {"judge": scorer.judge}
    if args.judge_url:
        judged["llm_judge"] = ask_judge(args, samples, output.work)
        meaning["judge_score"] = f"0 to 100 from {args.judge_model}, the mean over the answers that have a score"
    if ratings:
        judged["human"] = report.fold_ratings(ratings, samples)

    # ------------------------------------------------------------ Save
    headline = report.HEADLINE
    metrics = {
        "task": prompts.task.name,
        "split": args.split,
        "only": args.only,
        "num_prompts": len(prompts.rows),
        "num_samples": args.num_samples,
        "sampling": asdict(sampling),
        "constraints": prompts.task.constraints,
        **judged,
        **figures(scoring, answered, {headline: meaning[headline]} | meaning),
    }
    save(metrics, samples, {"base": str(args.base), "model": args.model}, list(prompts.task.classes), output)
    said = [report.table(metrics), *report.cautions(metrics), *report.headroom(metrics), *report.judged_by(metrics)]
    print("\n".join(["", *said]))
    print(f"\n{report.asked(metrics)}, 95% intervals. Instruction following: {report.beside(metrics)}.")
    print(f"{output.path}/report.html shows every answer.")
    print(f"Next: {next_command('generate.py', {'model': args.model}, {'prompt': 'PROMPT'})}")


def answer(args: EvaluateArguments, sampling: Sampling, output: Output) -> None:
    """Answers the prompts with the model alone, and stores each answer with the task's rewards."""
    from fledge.rewards.functions import Rewarder

    quiet()
    prompts = open_asked(args)
    rewarder = Rewarder(prompts.task, prompts.train_rows)
    model = open_models(args, prompts.tokenizer)["model"]
    answering = open_answering(args, sampling, prompts, output)
    with progress("answers", len(prompts.rows) * prompts.num_samples) as tell:
        answers = answering.answers(model, "model", tell)
    rewards = rewarder.rewards(prompts.row_of_each_answer, answers)
    samples = side_by_side(prompts, {"model": (answers, "rewards", rewards)})
    with output.staged() as folder:
        keep_answers(samples, output.work, folder)
    print(f"{len(samples):,} answers to {len(prompts.rows):,} prompts. Mean rewards: {mean_rewards(rewards)}.")
    suggested = {"source": "answers", "tokenizer": args.model, "task": prompts.task.name}
    suggested["output_dir"] = str(output.path.parent / "pairs")
    print(f"Next: {next_command('prepare_dataset.py', {'data': output.path}, suggested)}")


def open_asked(args: EvaluateArguments) -> "Prompts":
    from fledge.evaluation.prompts import open_prompts

    data = Path(str(args.dataset))
    return open_prompts(data, args.task, args.split, args.num_prompts, args.num_samples, args.only)


def mean_rewards(rewards: list[dict[str, float]]) -> str:
    """The mean of each reward over the answers that have it."""
    names = dict.fromkeys(name for found in rewards for name in found)
    means = {name: statistics.fmean(found[name] for found in rewards if name in found) for name in names}
    return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def open_models(args: EvaluateArguments, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "PreTrainedModel"]:
    """`base` and `model`, with embedding rows for tokens that a template added.

    Raises:
        UserError: a model has another vocabulary than the dataset.
    """
    from fledge.models import load_model
    from fledge.resizing import add_rows

    models = {}
    for who, folder in (("base", args.base), ("model", args.model)):
        if folder is None:
            continue
        models[who], own = load_model(folder)
        if not own.get_vocab().items() <= tokenizer.get_vocab().items():
            raise UserError(
                f"{folder} has another vocabulary than {args.dataset}; evaluate the models it was prepared for."
            )
        add_rows(models[who], tokenizer)
    return models


def open_answering(args: EvaluateArguments, sampling: Sampling, prompts: "Prompts", output: Output) -> "Answering":
    """How the prompts are answered; its journal has the answers of an earlier run with the same weights and settings.

    The prompts of that run must have been the same, too.
    """
    from fledge.evaluation.measuring import Answering, fingerprint_of_prompts
    from fledge.journal import Journal
    from fledge.models import fingerprint

    folders = {"--base": args.base, "--model": args.model}
    made_with = {
        **{key: fingerprint(find_model(folder)) for key, folder in folders.items() if folder},
        "--dataset, --only or --num_prompts": fingerprint_of_prompts(prompts.ids),
        "--num_samples": args.num_samples,
        **{f"--{name}": value for name, value in asdict(sampling).items()},
    }
    begin_or_resume(output, args.resume)
    journal = Journal(output.work / "answers.jsonl", made_with)
    return Answering(prompts.tokenizer, prompts.ids, prompts.num_samples, sampling, args.batch_size, journal)


def side_by_side(
    prompts: "Prompts", answered: dict[str, tuple[list["Answer"], str, list[dict[str, float]]]]
) -> list[dict]:
    """The lines of `samples.jsonl`: a prompt, its row, and the answer of each model with its scores or rewards.

    `answered` maps each model to its answers, the name of their values ("scores" or "rewards"), and these values.
    """
    samples = []
    for number, row in enumerate(prompts.row_of_each_answer):
        made = {who: vars(answers[number]) | {name: of[number]} for who, (answers, name, of) in answered.items()}
        samples.append(
            {
                "task": prompts.task.name,
                "split": prompts.split,
                "prompt": number // prompts.num_samples,
                "sample": number % prompts.num_samples,
                "instruction": row["messages"][-2]["content"],
                "reference": row["messages"][-1]["content"],
                **row,
                "messages": row["messages"][:-1],
                **made,
            }
        )
    return samples


def save(metrics: dict, samples: list[dict], folders: dict[str, str], columns: list[str], output: Output) -> None:
    """Moves the complete evaluation into place at once. Then adds the reports, each of which may fail alone."""
    from fledge.evaluation import report

    with output.staged() as folder:
        keep_answers(samples, output.work, folder)
        write_json(folder / "metrics.json", metrics)
    pages = {"report.md": lambda: report.report(metrics)}
    pages["report.html"] = lambda: report.page(metrics, samples, columns, folders)
    for name, make in pages.items():

        def write(folder: Path, name: str = name, make: Callable[[], str] = make) -> None:
            (folder / name).write_text(make(), encoding="utf-8")

        output.add(name, write)


def keep_answers(samples: list[dict], unfinished: Path, folder: Path) -> None:
    """Writes `samples.jsonl` and copies the journals in `unfinished` into `folder`."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    for kept in unfinished.iterdir():
        if kept.name != MARK:
            shutil.copy(kept, folder)


def begin_or_resume(output: Output, resume: bool) -> None:
    """Empties `unfinished/`, or with `resume` copies the answers of a complete evaluation into it."""
    is_begun = output.owns_work
    output.begin_work(output.work / "answers.jsonl" if resume else None)
    if resume and not is_begun:
        for name in ("answers.jsonl", "judgements.jsonl"):
            if (output.path / name).exists():
                with writing(output.work):
                    shutil.copy(output.path / name, output.work)


def ask_judge(args: EvaluateArguments, samples: list[dict], unfinished: Path) -> dict:
    """Adds a language model's scores and preferences to `samples`, and returns what `metrics.json` says about them."""
    from fledge.evaluation.intervals import preference
    from fledge.evaluation.judge import PAIR, SCORE, Judge, judge_pairs, judge_scores
    from fledge.journal import Journal

    journal = Journal(unfinished / "judgements.jsonl", {"--judge_model": args.judge_model, "questions": [SCORE, PAIR]})
    judge = Judge(str(args.judge_url), str(args.judge_model), args.judge_timeout, journal)
    requests = ["\n\n".join(message["content"] for message in sample["messages"]) for sample in samples]
    texts = {name: [sample[name]["text"] for sample in samples] for name in ("base", "model")}
    record: dict[str, Any] = {"model": args.judge_model, "samples": args.judge_samples}
    with progress("judge: scores", 2 * len(samples) * args.judge_samples) as tell:
        scores, record["scores"] = judge_scores(judge, requests, texts, args.judge_samples, tell)
    for name, of_model in scores.items():
        for sample, score in zip(samples, of_model, strict=True):
            sample[name]["scores"] |= {} if score is None else {"judge_score": score}
    if args.judge_pairs:
        with progress("judge: pairs", 2 * len(samples)) as tell:
            verdicts, record["pairs"] = judge_pairs(judge, requests, texts["base"], texts["model"], tell)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample["judge_preference"] = verdict
        record["preference"] = preference([[] if verdict is None else [verdict] for verdict in verdicts])
    return record | {"last_failure": judge.last_failure}
