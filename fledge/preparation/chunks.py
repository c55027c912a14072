"""Chunks of records → rows on disk, by several processes, so that memory does not grow with the data.

A chunk NAME becomes two Arrow files: `NAME.rows.arrow` (messages, the task's columns, token ids) and
`NAME.facts.arrow`, the few numbers per row that `fledge.preparation.curation` needs. The files depend only on the
chunk's own records, not on the process that makes them or on the order.
"""

import json
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fledge.encoding import Encoded, encode, encode_rejected, fit, meets, shortest
from fledge.errors import UserError
from fledge.messages import Messages
from fledge.preparation.duplicates import save_signatures
from fledge.preparation.preferences import Choice
from fledge.preparation.reasons import ANSWER_LOST, too_long, unmet, unwritable
from fledge.preparation.tables import facts_table, read_table, rows_table, write_table
from fledge.sources import Chunk, Source
from fledge.tasks import RejectedRecord, open_task
from fledge.templates import contents
from fledge.tokenizers import encoding_of
from fledge.tokenizers.fast import TextEncoder, UnequalIds
from fledge.tokenizers.spelling import Spelling

RECORDS = 500  # records that a process holds at a time


@dataclass
class NamedChunk:
    """A chunk of a source, or its first `limit` records. Names sort in the order of the data."""

    name: str
    chunk: Chunk
    limit: int | None = None


@dataclass
class Preparation:
    """The settings of a preparation. Calling it with a chunk writes the chunk's rows and facts into `folder`."""

    source: Source
    task: str
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    max_length: int
    overflow: str
    seed: int
    near_duplicates: bool = False
    folder: Path | None = None
    choice: Choice | None = None  # for a model's answers
    only: Sequence[str] = ()  # COLUMN=VALUE, the conditions of an example that is kept

    def __post_init__(self) -> None:
        self.spelling = Spelling(self.tokenizer)

    @property
    def has_pairs(self) -> bool:
        return self.choice is not None and self.choice.keep == "pairs"

    def __call__(self, named: NamedChunk) -> None:
        """Makes the rows of a chunk and writes them with their facts.

        Raises:
            UserError: the source cannot read a record.
            UnequalIds: see `TextEncoder`.
        """
        task, found = open_task(self.task), Found()
        rows, facts, texts = [rows_table(task, [], self.has_pairs)], [facts_table(task, [], None, self.tokenizer)], []
        numbered = enumerate(self.source.parse(named.chunk)[: named.limit])
        while records := list(islice(numbered, RECORDS)):
            examples = []
            for number, record in records:
                found.counts["read"] += 1
                try:
                    if self.choice:
                        made = self.choice.examples(record, task)
                    else:
                        # Each record has its own seed, so that its examples do not depend on the records before it.
                        made = task.checked_examples(record, random.Random(f"{self.seed} {named.name} {number}"))
                except RejectedRecord as reason:
                    found.rejected[str(reason)] += 1
                    continue
                except UserError:
                    raise
                except Exception as error:
                    if not self.task.endswith(".py"):
                        raise
                    raise UserError(  # whatever the file's own code raises
                        f"--task {self.task} fails with {type(error).__name__}: {error}, on the record "
                        f"{str(record)[:80]!r} of {named.chunk.origin}; raise RejectedRecord for what gives no example."
                    ) from error
                found.counts["used"] += 1
                found.counts["examples"] += len(made)
                kept = [example for example in made if meets(example, self.only)]
                if len(kept) < len(made):
                    found.rejected[unmet(self.only).text] += len(made) - len(kept)
                examples += kept
            fitted = self._encoded(examples, found)
            rows.append(rows_table(task, fitted, self.has_pairs))
            facts.append(facts_table(task, fitted, named.chunk.split, self.tokenizer))
            texts += ["\n".join(message["content"] for message in example["messages"]) for example, _ in fitted]
        assert self.folder
        written = json.dumps(vars(found))
        write_table(self.folder / f"{named.name}.rows.arrow", pa.concat_tables(rows))
        facts = pa.concat_tables(facts).replace_schema_metadata({"chunk": written})
        write_table(self.folder / f"{named.name}.facts.arrow", facts)
        if self.near_duplicates:
            save_signatures(self.folder / f"{named.name}.minhash.npy", texts)

    def _encoded(self, examples: list[dict[str, Any]], found: "Found") -> list[tuple[dict[str, Any], Encoded]]:
        """The examples that the vocabulary can write and that fit, with their ids; counts the others in `found`."""
        writable = []
        for example in examples:
            if missing := self.spelling.missing(contents(example["messages"]) + example.get("rejected", "")):
                found.rejected[unwritable().text] += 1
                found.lacking.update(missing)
            else:
                writable.append(example)
        with encoding_of("A record"):
            encoded = encode(self.tokenizer, [example["messages"] for example in writable], self.encoder)
            if self.has_pairs:
                rejected, stopped = ([example[name] for example in writable] for name in ("rejected", "stopped"))
                encode_rejected(self.tokenizer, encoded, rejected, stopped, self.encoder)
        task, rows = open_task(self.task), []
        for example, whole in zip(writable, encoded, strict=True):
            messages = example["messages"]
            found.counts["cuttable"] += task.may_cut and shortest(messages) != messages
            fitted = fit(self.tokenizer, messages, whole, self.max_length, self.overflow, task.may_cut)
            if fitted is None:
                found.rejected[too_long(self.max_length).text] += 1
                found.remedies.update(self._remedies(messages, whole, task.may_cut))
            elif fitted[0] != messages and task.answer_is_lost(messages, fitted[0]):
                found.rejected[ANSWER_LOST.text] += 1
            else:
                example["messages"], ids = fitted
                rows.append((example, ids))
        return rows

    def _remedies(self, messages: Messages, whole: Encoded, may_cut: bool) -> Iterator[str]:
        """The keys that would keep an example which is too long."""
        if len(whole) <= self.tokenizer.model_max_length:
            yield f"--max_length {self.tokenizer.model_max_length}"
        if self.overflow != "cut_completion" and len(whole) - self.max_length < whole.completion_length:
            yield "--overflow cut_completion"
        cut = shortest(messages) if may_cut and self.overflow != "cut_prompt" else messages
        if cut != messages and len(encode(self.tokenizer, [cut])[0]) <= self.max_length:
            yield "--overflow cut_prompt"


@dataclass
class Found:
    """Counts that are collected while rows are made.

    `counts` has the records read and used, the examples, and those whose prompt may be cut. `rejected` has the reasons
    for leaving out the others. `lacking` has the characters that the vocabulary lacks, with the number of examples.
    `remedies` has the keys that would have kept over-long examples.
    """

    counts: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    lacking: Counter = field(default_factory=Counter)
    remedies: Counter = field(default_factory=Counter)

    def update(self, other: dict[str, dict[str, int]]) -> None:
        for name, numbers in other.items():
            getattr(self, name).update(numbers)


@dataclass
class Facts:
    """The facts of all rows, in the order of the data.

    `folder` holds the rows of each chunk in a file of its own.
    """

    folder: Path
    chunks: list[str]
    rows: np.ndarray  # (chunks,), the number of rows of each
    columns: dict[str, np.ndarray]  # (all rows,) each
    found: Found

    @property
    def total(self) -> int:
        return int(self.rows.sum())

    def of(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of some rows, which `chosen` selects by a mask or by numbers."""
        return {name: values[chosen] for name, values in self.columns.items()}

    def files(self, suffix: str) -> list[Path]:
        """The file of this kind of each chunk: `rows.arrow` or `minhash.npy`."""
        return [self.folder / f"{chunk}.{suffix}" for chunk in self.chunks]

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Reads the facts of every chunk in `folder`.

        Raises:
            UserError: there is no chunk.
        """
        files = sorted(folder.glob("*.facts.arrow"))
        tables = [read_table(file) for file in files]
        if not tables:
            raise UserError("The data holds no record; give some.")
        found = Found()
        for table in tables:
            found.update(json.loads(table.schema.metadata[b"chunk"]))
        columns = pa.concat_tables([table.replace_schema_metadata() for table in tables])
        return cls(
            folder,
            [file.name.removesuffix(".facts.arrow") for file in files],
            np.array([len(table) for table in tables], dtype=int),
            {name: columns[name].to_numpy() for name in columns.column_names},
            found,
        )


def named_chunks(
    source: Source, files: list[str], limit: int | None = None, rank: int = 0, tasks: int = 1
) -> Iterator[NamedChunk]:
    """Yields the chunks of all files, up to the first `limit` records.

    With several tasks, each gets whole files, or every n-th chunk if there are fewer files than tasks.
    """
    by_file = len(files) >= tasks
    for place, file in enumerate(files):
        if by_file and place % tasks != rank:
            continue
        for number, chunk in enumerate(source.chunks(file)):
            if not by_file and number % tasks != rank:
                continue
            named = NamedChunk(f"{place:05d}-{number:07d}", chunk)
            if limit is not None:
                named.limit = min(limit, len(source.parse(chunk)))
                limit -= named.limit
            yield named
            if limit == 0:
                return


def prepare_chunks(preparation: Preparation, chunks: Callable[[], Iterator[NamedChunk]], num_proc: int) -> None:
    """Makes rows of all chunks.

    Raises:
        UserError: a source cannot be read, or a record cannot be encoded.
    """
    print(f"Encoding with {preparation.encoder.way}.", flush=True)
    try:
        for _ in spread(preparation, chunks(), num_proc):
            pass
    except UnequalIds:
        preparation.encoder = TextEncoder(preparation.tokenizer, fast=False)
        prepare_chunks(preparation, chunks, num_proc)


def spread(work: Callable[[NamedChunk], Any], chunks: Iterable[NamedChunk], num_proc: int) -> Iterator[Any]:
    """Yields `work(chunk)` for each chunk, in order. A single chunk runs in this process, more in `num_proc` processes.

    Raises:
        UserError: a process died.
    """
    chunks = iter(chunks)
    head = list(islice(chunks, 2))
    chunks = chain(head, chunks)
    if num_proc == 1 or len(head) < 2:
        yield from map(work, chunks)
        return
    try:
        with ProcessPoolExecutor(num_proc, initializer=_begin, initargs=(work,)) as pool:
            # A few chunks are queued, so that no process waits; more would only fill the memory.
            waiting = deque(pool.submit(_work, chunk) for chunk in islice(chunks, 2 * num_proc))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_work, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise UserError("A process was killed, perhaps for want of memory; pass a smaller --num_proc.") from error


_work_of_this_process: Callable[[NamedChunk], Any]


def _begin(work: Callable[[NamedChunk], Any]) -> None:
    global _work_of_this_process
    _work_of_this_process = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(named: NamedChunk) -> Any:
    return _work_of_this_process(named)
