"""A journal of finished work: each result is written at once, so that an interruption loses nothing."""

import json
from pathlib import Path

from fledge.cli import writing
from fledge.errors import UserError


class Journal:
    """Finished work by key. The first line of the file holds the settings that it was made with.

    Args:
        file: JSON lines; created if missing. settings: finished work is only reused if these are equal. otherwise: what
            the user can do if they differ, for the message. go_on: what the user can do after a full disk, for the
            message.

    Raises:
        UserError: the file was made with other settings, is not a journal, or cannot be written.
    """

    def __init__(
        self,
        file: Path,
        settings: dict,
        otherwise: str = "pass --overwrite instead of --resume",
        go_on: str = "go on with --resume",
    ):
        self.file, self.done, self.advice = file, {}, f"; make room and {go_on}"
        # A process that was killed may have left half a line.
        found = file.read_bytes() if file.exists() else b""
        whole, first = found.rpartition(b"\n")[0], json.dumps(settings, ensure_ascii=False) + "\n"
        if not whole and not first.encode().startswith(found):
            raise UserError(f"{file} is damaged, or was not written by Fledge; {otherwise}.")
        if whole:
            try:
                found, *entries = [json.loads(line) for line in whole.split(b"\n")]
                self.done = {tuple(entry["key"]): entry["value"] for entry in entries}
                differing = [name for name in found | settings if found.get(name) != settings.get(name)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{file} is damaged; {otherwise}.") from error
            if differing:
                raise UserError(
                    f"{file} was made with another {' and another '.join(differing)}; "
                    f"give what it was made with, or {otherwise}."
                )
            with writing(file, self.advice), file.open("rb+") as kept:
                kept.truncate(len(whole) + 1)
        else:
            with writing(file, self.advice):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(first, encoding="utf-8")

    def add(self, entries: dict[tuple, object]) -> None:
        """Writes finished work at once.

        Raises:
            UserError: the disk is full; an incomplete line is ignored when the file is read again.
        """
        self.done |= entries
        with writing(self.file, self.advice), self.file.open("a", encoding="utf-8") as file:
            for key, value in entries.items():
                file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
