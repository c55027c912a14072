"""Scripts in processes of their own, forked from a server that has imported torch and TRL.

Importing takes most of the seconds of a short script. What a script does before it imports, and that its imports work,
is for `conftest.run_script` to test, which starts Python anew.
"""

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
COMMON = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
IMPORTED = [
    "accelerate",
    "datasets",
    "matplotlib.pyplot",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.pipelines",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
]
LIMIT = 300  # seconds, after which a script that hangs is ended
READ_ENVIRONMENT = ("huggingface_hub.constants", "datasets.config")  # once, when they are imported
# Windows cannot fork, and macOS not with the libraries that torch loads: there each process imports for itself.
FORKS = sys.platform == "linux"
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    CONTEXT.set_forkserver_preload(IMPORTED)


def as_python(command: list[str], folder: str, environment: dict[str, str], said: str) -> None:
    """What `python *command` does, in the process that was forked for it: a file, `-m module` or `-c code`."""
    gc.freeze()  # what was imported is no garbage
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(f"{said}/stdin", os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", closefd=False))
    for name in READ_ENVIRONMENT:
        importlib.reload(importlib.import_module(name))
    way, *given = command
    try:
        if way == "-c":
            sys.argv = ["-c", *given[1:]]
            exec(compile(given[0], "<string>", "exec"), {"__name__": "__main__"})
        elif way == "-m":
            sys.argv = given
            runpy.run_module(given[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(way).absolute().parent))
            runpy.run_path(way, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


@contextlib.contextmanager
def forked(*arguments: object, folder: Path = ROOT, typed: str = "", **variables: str):
    """Starts `python *arguments` in `folder` and ends it with the block; `said` is where its output goes.

    `typed` is what it reads from standard input.
    """
    environment = os.environ | COMMON | {"PYTHONPATH": str(ROOT)} | variables
    if FORKS:
        with mock.patch.dict(os.environ, COMMON):  # libraries look there when the server imports them
            forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as said:
        Path(said, "stdin").write_text(typed, encoding="utf-8")
        for name in ("stdout", "stderr"):
            Path(said, name).touch()
        given = (list(map(str, arguments)), str(folder), environment, said)
        process = CONTEXT.Process(target=as_python, args=given)
        process.start()
        try:
            yield SimpleNamespace(process=process, said=Path(said))
        finally:
            if process.is_alive():
                process.terminate()
            process.join()


def completed(run: SimpleNamespace, arguments: tuple) -> subprocess.CompletedProcess:
    out, err = ((run.said / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, run.process.exitcode, out, err)


def fork_script(*arguments: object, check: bool = True, folder: Path = ROOT, typed: str = "", **variables: str):
    """As `conftest.run_script`, whose process has imported the libraries before it begins."""
    with forked(*arguments, folder=folder, typed=typed, **variables) as run:
        run.process.join(LIMIT)
        assert run.process.exitcode is not None, f"{arguments[0]} does not end"
        done = completed(run, arguments)
    assert not check or done.returncode == 0, done.stderr
    return done


def fork_two(*arguments: object, check: bool = True, **variables: str) -> list[subprocess.CompletedProcess]:
    """A script in two processes that work together, with the variables that torchrun sets; if one fails, both end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with contextlib.ExitStack() as both:
        ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
        runs = [both.enter_context(forked(*arguments, **where | rank | variables)) for rank in ranks]
        running = [run.process for run in runs]
        while running and not any(run.process.exitcode for run in runs):
            assert connection.wait([process.sentinel for process in running], LIMIT), f"{arguments[0]} does not end"
            running = [process for process in running if process.is_alive()]
        for process in running:
            process.terminate()
            process.join()
        done = [completed(run, arguments) for run in runs]
    assert not check or [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    return done


def variables_of(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells two processes by their environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if os.environ.get(k) != v}
