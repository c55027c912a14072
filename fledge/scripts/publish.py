"""A finished model, its dataset and a page to try it on → the Hub, or the same folders on this machine.

    python publish.py --model model --evaluation evaluation --repo_id user/name --dry_run --output_dir repository
    python publish.py --model model --evaluation evaluation --repo_id user/name --license apache-2.0 \\
        --dataset data --dataset_repo_id user/data --space_repo_id user/demo
    python publish.py --model model --base base --space static --space_repo_id user/demo --dry_run --output_dir page

Each repository gets one commit with the files that changed. The token is that of `hf auth login` or HF_TOKEN.
"""

import contextlib
import re
import sys
import tempfile
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from fledge.cli import check_hub_id, parse, write_json
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.hub import check_license, download, find_model
from fledge.terminal import quiet

SPACES = ("gradio", "static")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")


@dataclass
class PublishArguments:
    model: str | None = field(
        default=None,
        metadata={"help": "the folder that train_sft.py wrote, or a model that publish.py put on the Hub"},
    )
    repo_id: str | None = field(default=None, metadata={"help": "user/name of the model on the Hub"})
    evaluation: str | None = field(default=None, metadata={"help": "the folder that evaluate_model.py wrote"})
    dataset: str | None = field(default=None, metadata={"help": "the folder that prepare_dataset.py wrote"})
    dataset_repo_id: str | None = field(default=None, metadata={"help": "user/name of the dataset on the Hub"})
    space_repo_id: str | None = field(default=None, metadata={"help": "user/name of the Space on the Hub"})
    space: str = field(
        default="gradio",
        metadata={"help": "gradio: a server runs the model; static: the visitor's browser does (default gradio)"},
    )
    base: str | None = field(
        default=None, metadata={"help": "the base's folder or Hub id, to run beside the model in a static Space"}
    )
    quantize: str | None = field(
        default=None,
        metadata={"help": "int8: a static Space of half the size, if its measured loss is within limits"},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "the base's Hub id, if it has one: named on the card, compared in the Space"}
    )
    base_data: str | None = field(
        default=None, metadata={"help": "what the base was trained on, for the card: 'TinyStories (cdla-sharing-1.0)'"}
    )
    license: str | None = field(
        default=None, metadata={"help": "the licence of model and Space: an SPDX id such as apache-2.0"}
    )
    language: str = field(default="en", metadata={"help": "the language of the model: an ISO 639-1 code (default en)"})
    private: bool = field(default=False, metadata={"help": "make the repositories private"})
    revision: str | None = field(default=None, metadata={"help": "the branch to commit to, created if missing"})
    create_pr: bool = field(default=False, metadata={"help": "open pull requests instead of committing"})
    dry_run: bool = field(default=False, metadata={"help": "write and check the folders, upload nothing"})
    output_dir: str | None = field(
        default=None, metadata={"help": "keep the folders here (default in a dry run: <model or dataset>-repository)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier publication in output_dir"})


def check(args: PublishArguments) -> None:
    """Checks the form of ids and that keys go together.

    Raises:
        UserError: an id has a wrong form, or a key lacks the one that it needs.
    """
    for key in ("repo_id", "dataset_repo_id", "space_repo_id", "base_model"):
        value = vars(args)[key]
        if value:
            check_hub_id(f"--{key}", value)
    if args.license:
        check_license(args.license)
    if not LANGUAGE.fullmatch(args.language):
        raise UserError(f"--language {args.language} is no ISO 639 code of two or three letters, such as en.")
    if not (args.repo_id or args.dataset_repo_id or args.space_repo_id):
        raise UserError("Nothing to publish; give --repo_id, --dataset_repo_id, --space_repo_id, or several of them.")
    if (args.repo_id or args.space_repo_id) and not args.model:
        raise UserError(f"--{'repo_id' if args.repo_id else 'space_repo_id'} needs --model.")
    if args.repo_id and args.model:
        find_model(args.model)
    check_space(args)
    if bool(args.dataset) != bool(args.dataset_repo_id):
        raise UserError("--dataset and --dataset_repo_id go together.")
    if args.create_pr and args.revision:
        raise UserError("--create_pr opens a pull request against main; leave out --revision.")


def check_space(args: PublishArguments) -> None:
    """Checks that `--space` goes with the other keys, and that a static Space can be built.

    Raises:
        UserError: the kind is unknown, a key lacks the one that it needs, or a package is missing.
    """
    if args.space not in SPACES:
        raise UserError(f"--space {args.space} is unknown; choose {' or '.join(SPACES)}.")
    if args.quantize not in (None, "int8"):
        raise UserError(f"--quantize {args.quantize} is no kind of a static Space; give int8, or leave it out.")
    if args.space == "gradio":
        if args.quantize:
            raise UserError("--quantize goes with --space static; a Gradio Space loads the published weights.")
        if args.base:
            raise UserError("--base goes with --space static; a Gradio Space compares with --base_model user/name.")
        if args.space_repo_id and not args.repo_id and args.model and Path(args.model).is_dir():
            raise UserError(
                "A Gradio Space loads its model from the Hub; give --repo_id too, a published --model user/name, or "
                "--space static, which holds the model itself."
            )
        return
    if not args.space_repo_id:
        raise UserError("--space static needs --space_repo_id.")
    if missing := [package for package in ONNX_NEEDS if find_spec(package) is None]:
        raise UserError(f"--space static needs {', '.join(missing)}; `pip install 'fledge-gpt[export]'` brings it.")
    for key in ("model", "base"):
        if vars(args)[key]:
            find_model(vars(args)[key])


def main() -> Path | None:
    """Returns the folder it wrote; `None` if that was temporary."""
    (args,) = parse(sys.argv[1:], PublishArguments, description=__doc__)
    check(args)
    output_dir = args.output_dir
    if args.dry_run and not output_dir:
        source = Path(args.model or args.dataset)
        output_dir = f"{source if source.is_dir() else source.name}-repository"
    inputs = {"--model": args.model, "--base": args.base, "--evaluation": args.evaluation, "--dataset": args.dataset}
    with contextlib.ExitStack() as stack:
        if not output_dir:
            output_dir = f"{stack.enter_context(tempfile.TemporaryDirectory(prefix='fledge-'))}/publication"
        output = stack.enter_context(claimed(output_dir, "publish.py", args.overwrite, inputs))
        publish(args, output)
    return output.path if output.path.exists() else None


def publish(args: PublishArguments, output: Output) -> None:
    from fledge.publishing.upload import Repository, files_of, send

    quiet()
    # The Space names the model and the model the dataset, so each is there before it is named.
    wanted = {"dataset": args.dataset_repo_id, "model": args.repo_id, "space": args.space_repo_id}
    repositories = {kind: repo_id for kind, repo_id in wanted.items() if repo_id}
    with output.staged() as folder:
        for kind in repositories:
            (folder / kind).mkdir()
        build(args, folder)
        sizes = {}
        for kind, repo_id in repositories.items():
            sizes[kind] = {path: file.stat().st_size for path, file in files_of(folder / kind).items()}
            print(f"\n{kind} {repo_id}: {len(sizes[kind])} files, {readable(sum(sizes[kind].values()))}")
            for path, size in sizes[kind].items():
                print(f"  {path:<44} {readable(size):>10}")
        content = {kind: {"repo_id": repo_id, "files": sizes[kind]} for kind, repo_id in repositories.items()}
        write_json(folder / "publication.json", content)
    print()
    if args.dry_run:
        print(f"{output.path} holds what the Hub would get. Nothing was sent.")
        return
    for kind, repo_id in repositories.items():
        repository = Repository(kind, repo_id, args.private, args.revision, args.create_pr)
        sent = send(output.path / kind, repository)
        print(f"{sent.url}: {describe(sent.changed, sent.deleted)}", flush=True)


def build(args: PublishArguments, folder: Path) -> None:
    """Fills `folder`/dataset, /model and /space, those that are requested, and checks them."""
    from fledge.cli import read_json
    from fledge.publishing.card import Named
    from fledge.publishing.preflight import check_folder, check_model
    from fledge.publishing.repositories import build_dataset, build_model

    evaluation_dir = Path(args.evaluation) if args.evaluation else None
    if args.dataset:
        build_dataset(folder / "dataset", Path(args.dataset))
        check_folder("dataset", folder / "dataset")
        if "\nlicense:" not in (folder / "dataset" / "README.md").read_text(encoding="utf-8"):
            print("The dataset's card names no licence; that of its source belongs there.")
    model = args.model or ""  # check() asks for one where it is used
    if args.repo_id:
        target, model_dir = folder / "model", whole(model)
        named = Named(**{entry.name: vars(args)[entry.name] for entry in fields(Named)})
        build_model(target, model_dir, evaluation_dir, named)
        if args.dataset and not is_trained_on(target, folder / "dataset"):
            print(f"{args.dataset} is not the dataset that {model} was trained on, and the card names it as that.")
        check_folder("model", target)
        example = read_json(target / "budget.json", "train_sft.py", about_task=dict)["about_task"]["example"]
        print(f"The model reloads and answers: {check_model(target, example)!r}")
        if not evaluation_dir:
            print("The card has no figures, because the model is not evaluated; --evaluation DIR adds them.")
        if not args.license:
            print("The card names no licence, so nobody may use the model; --license apache-2.0, say, names one.")
    if args.space_repo_id:
        build_page(args, folder / "space", evaluation_dir)
        check_folder("space", folder / "space")


def is_trained_on(model: Path, dataset: Path) -> bool:
    """Whether the budget that a model keeps is that of the dataset."""
    return (model / "budget.json").read_bytes() == (dataset / "budget.json").read_bytes()


def build_page(args: PublishArguments, folder: Path, evaluation_dir: Path | None) -> None:
    """Fills `folder` with a Gradio or a static Space."""
    from fledge.publishing.repositories import dataset_of, download_records
    from fledge.publishing.spaces import About, build_space

    model = args.model or ""
    published = not Path(model).is_dir()
    model_dir = whole(model) if args.repo_id or args.space == "static" else download_records(model)
    repo_id = args.repo_id or (model if published else None)
    title = (repo_id or args.space_repo_id or "").split("/")[-1]
    dataset = args.dataset_repo_id or (dataset_of(model_dir) if published else None)
    about = About(title, repo_id, dataset, args.base_model, args.license, args.language)
    if args.space == "static":
        from fledge.publishing.static_space import build_static_space

        build_static_space(folder, model_dir, args.base, evaluation_dir, about, args.quantize)
    else:
        build_space(folder, model_dir, evaluation_dir, about)


def whole(model: str) -> Path:
    """The folder of a model, with all files of its repository if it is on the Hub."""
    return Path(model) if Path(model).is_dir() else download(model)


def describe(changed: list[str], deleted: list[str]) -> str:
    if not changed and not deleted:
        return "nothing changed, nothing sent"
    return f"{len(changed)} files sent" + (f", {len(deleted)} old ones deleted" if deleted else "")


def readable(size: int) -> str:
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} B"
