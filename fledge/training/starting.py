"""The keys that all fine-tuning scripts share, and their start. Heavy imports are inside functions."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from fledge.cli import parse
from fledge.errors import UserError
from fledge.folders import claimed
from fledge.hub import find_model
from fledge.ranges import check_ranges
from fledge.terminal import quiet


@dataclass
class BaseArguments:
    """Keys of TRL's configurations, which take seconds to import."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "the model to start from: a folder or one on the Hub"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "the folder to write"})
    model_revision: str = field(default="main", metadata={"help": "its revision on the Hub (default main)"})


@dataclass
class RunArguments:
    REQUIRED: ClassVar = ("model_name_or_path", "output_dir")

    dataset: str = field(metadata={"help": "a folder of prepare_dataset.py"})
    dropout: float = field(
        default=0.0, metadata={"help": "dropout rate of all layers (default 0, best for a short fine-tuning)"}
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "freeze the first N blocks and the embeddings; the last N if negative"}
    )
    freeze_modules: list[str] = field(default_factory=list, metadata={"help": "freeze modules by name, such as wte"})
    resume_with_changes: bool = field(
        default=False, metadata={"help": "resume although the data or settings differ from the checkpoint's"}
    )
    resume: str | None = field(
        default=None, metadata={"help": "a checkpoint to resume from, or auto: the newest in output_dir, if any"}
    )
    smoke: bool = field(default=False, metadata={"help": "run three steps of the recipe into output_dir-smoke"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier model in output_dir"})

    @property
    def trained_parts(self) -> dict[str, Any]:
        """Which parameters train, for the record of the run and for comparison with a resumed run."""
        return {name: getattr(self, name) for name in ("dropout", "freeze_layers", "freeze_modules")}


def start(
    script: str,
    about: str | None,
    kind: type[RunArguments],
    config_kind: Callable[[], type],
    train: Callable[..., None],
) -> Path:
    """Parses the keys of `script`, claims its output folder, and calls `train(args, config, model_args, output)`.

    `kind` holds Fledge's own keys, which `--help` shows with the text `about`. `config_kind` imports the class of the
    trainer's configuration. Returns the folder that was written.

    Raises:
        UserError: a key is wrong or would have no effect, or the output folder cannot be used.
    """
    if {"-h", "--help"} & set(sys.argv):  # TRL's own keys take seconds to import
        parse(sys.argv[1:], BaseArguments, kind, description=about)
    arguments = ["--help" if argument == "--help_all" else argument for argument in sys.argv[1:]]
    if "--help" not in arguments:
        (named,) = parse(arguments, BaseArguments, partly=True)
        if not named.model_name_or_path:
            raise UserError("--model_name_or_path is missing; name the base, a folder or a model of the Hub.")
        find_model(named.model_name_or_path, named.model_revision)

    from trl import ModelConfig

    from fledge.training.configuration import check_processes, smoke
    from fledge.training.settings import RANGES, check_effect

    args, config, model_args = parse(arguments, kind, config_kind(), ModelConfig, description=about)
    for given in (args, model_args):
        check_ranges(given, RANGES)
    check_effect(config, model_args)
    quiet()
    if args.smoke:
        args, config = replace(args, overwrite=True), smoke(config)
    config.run_name = config.run_name or run_name(config.output_dir)
    check_processes(config, script)
    inputs = {"--dataset": args.dataset, "--model_name_or_path": model_args.model_name_or_path}
    with claimed(config.output_dir, script, None, inputs, is_main=config.process_index == 0) as output:
        train(args, config, model_args, output)
    return output.path


def run_name(output_dir: str) -> str:
    """The name of a run in trackers: its output folder and the folder above, as in `quickstart-model`."""
    return "-".join(part for part in Path(output_dir).parts[-2:] if part not in ("/", ".."))
