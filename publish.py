"""A finished model → a repository folder with a card that is made from the run's own records.

python publish.py --model model --evaluation evaluation --repo_id user/name --dry_run --output_dir repository
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fledge.cli import UserError, check_output_dir, parse, run, staged


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "the folder that train_sft.py wrote"})
    repo_id: str = field(metadata={"help": "user/name on the Hub"})
    evaluation: str | None = field(default=None, metadata={"help": "the folder that evaluate_model.py wrote"})
    license: str | None = field(default=None, metadata={"help": "an SPDX id, such as apache-2.0"})
    private: bool = field(default=False, metadata={"help": "make the repository private"})
    dry_run: bool = field(default=False, metadata={"help": "write the folder and send nothing"})
    output_dir: str | None = field(default=None, metadata={"help": "the folder to write (default: <model>-repository)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier folder in output_dir"})


def main():
    (args,) = parse(sys.argv[1:], PublishArguments, description=__doc__)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        raise UserError(f"--repo_id {args.repo_id} is not of the form user/name.")
    output_dir = args.output_dir or f"{args.model.rstrip('/')}-repository"
    check_output_dir(output_dir, args.overwrite, "README.md")

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    from fledge.publishing import build_repository

    evaluation = Path(args.evaluation) if args.evaluation else None
    with staged(output_dir, args.overwrite, "README.md") as folder:
        build_repository(folder, Path(args.model), evaluation, args.repo_id, args.license)
        files = sorted(file for file in folder.iterdir())
        for file in files:
            print(f"  {file.name:<24} {file.stat().st_size / 1e6:>8.2f} MB")
    if not evaluation:
        print("The card says that the model is not evaluated; --evaluation DIR adds the figures.")
    if not args.license:
        print("The card names no licence; --license apache-2.0, for example, adds one.")
    if args.dry_run:
        print(f"{output_dir} is what {args.repo_id} would hold. Nothing was sent.")
        return
    try:
        url = HfApi().create_repo(args.repo_id, private=args.private, exist_ok=True)
        HfApi().upload_folder(repo_id=args.repo_id, folder_path=output_dir, commit_message="Publish with Fledge")
    except (HTTPError, LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The Hub did not take it: {reason} `hf auth login` signs in; {output_dir} is ready."
        ) from error
    print(f"Published at {url}")


if __name__ == "__main__":
    run(main)
