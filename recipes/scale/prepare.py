"""prepare_dataset.py as a datatrove pipeline, for a corpus that one machine does not hold: the same rows.

    python recipes/scale/prepare.py --tasks 2 --workers 2 --data tales.txt.gz --tokenizer base --output_dir data

All keys of prepare_dataset.py work, recipes too, but for --limit, --num_proc and --show. README.md beside this file
tells how it goes on a cluster.
"""

import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from fledge.cli import parse, run, writing
from fledge.errors import UserError
from fledge.folders import check_inputs, claimed
from fledge.locks import locked
from fledge.marks import MARK, files_in, read_mark, write_mark
from fledge.scripts.prepare_dataset import Plan, PrepareArguments, make_plan, write_dataset

STAGE = "recipes/scale/prepare.py"


@dataclass
class ScaleArguments:
    tasks: int = field(default=2, metadata={"help": "into how many parts the work is cut (default 2)"})
    workers: int = field(default=2, metadata={"help": "how many of them run at once (default 2)"})
    ray: bool = field(default=False, metadata={"help": "run them on the Ray cluster at RAY_ADDRESS, else on one here"})
    chunks: str | None = field(
        default=None, metadata={"help": "where all machines see the same folder; default: output_dir with -chunks"}
    )


class Half(PipelineStep):
    """Either half of the work; a task makes its plan anew where it runs."""

    type = "Fledge"

    def __init__(self, arguments: PrepareArguments, chunks: Path):
        super().__init__()
        self.arguments, self.chunks = arguments, chunks

    def plan(self) -> Plan:
        plan = make_plan(self.arguments)
        plan.preparation.folder = self.chunks
        return plan


class MakeChunks(Half):
    """The first, in as many tasks as there are: records → rows and facts on disk, a file each a chunk."""

    name = "Rows of each chunk"

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        from fledge.preparation.chunks import named_chunks, prepare_chunks

        plan = self.plan()
        files, preparation = plan.arguments.data, plan.preparation
        prepare_chunks(preparation, lambda: named_chunks(plan.source, files, None, rank, world_size), num_proc=1)
        yield from data or ()


class WriteDataset(Half):
    """The second, one task: what is known of all rows decides where each goes, and the dataset is written."""

    name = "Splits and files"

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        from fledge.preparation.chunks import Facts

        plan = self.plan()
        arguments = self.arguments
        with (
            claimed(arguments.output_dir, "prepare_dataset.py", arguments.overwrite) as output,
            output.staged() as folder,
        ):
            print(write_dataset(plan, Facts.read(self.chunks), folder).markdown())
        yield from data or ()


def main():
    scale, arguments = parse(sys.argv[1:], ScaleArguments, PrepareArguments, description=__doc__)
    if arguments.limit:
        raise UserError("--limit counts records from the beginning, which tasks cannot; leave it out.")
    chunks = Path(scale.chunks or f"{arguments.output_dir}-chunks").absolute()
    inputs = {"--data": arguments.data, "--tokenizer": arguments.tokenizer}
    check_inputs(chunks, "--chunks", inputs)
    with claimed(arguments.output_dir, "prepare_dataset.py", arguments.overwrite, inputs | {"--chunks": str(chunks)}):
        make_plan(arguments)  # what is wrong with it is said here, not in a task's log
    with locked(chunks, "--chunks"):
        prepare(scale, arguments, chunks)


def on_ray() -> type:
    """datatrove's executor for Ray, whose workers find this repository.

    Raises:
        UserError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UserError("--ray needs Ray, which is not installed: pip install ray.")
    import ray
    from datatrove.executor import RayPipelineExecutor

    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}, log_to_driver=False)
    return RayPipelineExecutor


def prepare(scale: ScaleArguments, arguments: PrepareArguments, chunks: Path) -> None:
    """Both halves, on this machine; `chunks` goes on from what an interrupted run has made there."""
    with writing(chunks):
        chunks.mkdir(exist_ok=True)
        if (read_mark(chunks) or {}).get("stage") != STAGE and any(files_in(chunks)):
            raise UserError(f"{chunks} holds no {MARK} of {STAGE}, so its files are of others; name another --chunks.")
        write_mark(chunks, STAGE, {})
    multiprocess.set_forkserver_preload(["__main__", "fledge.preparation.chunks"])  # imported once for all workers
    executor = on_ray() if scale.ray else LocalPipelineExecutor
    make = executor(
        [MakeChunks(arguments, chunks)], tasks=scale.tasks, workers=scale.workers, logging_dir=f"{chunks}/logs/make"
    )
    write = executor(
        [WriteDataset(arguments, chunks)], tasks=1, workers=1, logging_dir=f"{chunks}/logs/write", depends=make
    )
    write.run()
    print(f"{arguments.output_dir} is ready; {chunks} may be deleted.")


if __name__ == "__main__":
    run(main)
