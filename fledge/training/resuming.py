"""Stopping and resuming: finds the newest complete checkpoint, and saves one on SIGTERM."""

import json
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from fledge.errors import UserError
from fledge.folders import Output
from fledge.guards import check_overrides


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: one whose `trainer_state.json`, which is written last, can be read."""

    def is_complete(checkpoint: Path) -> bool:
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return state.get("global_step") == int(checkpoint.name.rpartition("-")[2])

    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    return max(filter(is_complete, found), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def find_checkpoint(output: Output, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or `None` for a fresh start.

    `resume` is the path of a checkpoint, or "auto" for the newest complete one in the run's own folder, if there is
    any.

    Raises:
        UserError: there is a checkpoint and the user asked neither to resume nor to overwrite; `resume` names no
            checkpoint; or the output folder holds files that must not be replaced.
    """
    if resume and resume != "auto" and not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(f"--resume {resume} is no checkpoint; name a folder checkpoint-N, or say --resume auto.")
    newest = newest_checkpoint(output.work)
    if newest and not resume and not overwrite and output.owns_work:
        raise UserError(
            f"{output.path} holds an unfinished run, saved at {newest.name}; "
            "go on with --resume auto or start anew with --overwrite."
        )
    if resume == "auto":
        # A run that was interrupted before its first checkpoint starts again; a finished model is not replaced.
        output.check(overwrite or newest is not None or not output.is_finished)
        return str(newest) if newest else None
    output.check(overwrite or output.is_own_work(resume))
    return resume


def tokens_seen(checkpoint: str | None) -> int:
    """How many tokens the run had read when it saved `checkpoint`."""
    if not checkpoint:
        return 0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["num_input_tokens_seen"]


@check_overrides
class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after the current step on SIGTERM, which batch systems send before they end a job.

    With several processes, all stop at the same step as soon as one of them has received it. Only the main thread of a
    process can receive it, so a training in another thread does not stop.
    """

    def __init__(self) -> None:
        self.was_told = False
        self.earlier: Any = None  # the handler of SIGTERM before the training

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.earlier = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.was_told = True

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            told = torch.tensor(int(self.was_told), device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.was_told = bool(told)
        if self.was_told and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def let_go(self) -> None:
        """Gives SIGTERM its earlier handler. Trainer calls no callback at the end of a training that failed."""
        if self.earlier is not None:
            signal.signal(signal.SIGTERM, self.earlier)
            self.earlier = None

    def leave_if_told(self, state: TrainerState) -> None:
        """Exits with the status of SIGTERM if training ended early because of it."""
        if self.was_told and state.global_step < state.max_steps:
            if state.is_world_process_zero:
                print(f"Stopped by SIGTERM at step {state.global_step}, saved; go on with --resume auto.")
            sys.exit(143)
