"""Locks an output so that only one run writes it. The system releases a lock when its process ends in any way."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from fledge.cli import write_json, writing
from fledge.errors import UserError


@contextlib.contextmanager
def locked(output: Path, key: str) -> Iterator[None]:
    """Locks `output`, the value of `key`, by a file beside it. A second file says which process holds the lock.

    Raises:
        UserError: another run holds the lock, or the folder above cannot be written.
    """
    file, holder = (output.with_name(f".{output.name}.fledge-{name}") for name in ("lock", "holder"))
    made = [place for place in output.parents if not place.exists()]
    lock = FileLock(file)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"Another run is writing {output} at this moment{_told(holder)}; wait for it or name another {key}."
        ) from error
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    # Files of others with the same names are kept.
    ours = [file] if isinstance(lock, SoftFileLock) or not file.stat().st_size else []
    try:
        if not holder.exists() or not holder.stat().st_size or _told(holder):
            ours.append(holder)
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            who = {"script": Path(sys.argv[0]).name, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
            with writing(output):
                write_json(holder, who)
        yield
    finally:
        for path in reversed(ours):  # while locked, so that a process that has opened the file sees that it is gone
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()
        for place in made:
            with contextlib.suppress(OSError):  # it contains the output
                place.rmdir()


def _told(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f" ({who['script']}, process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
