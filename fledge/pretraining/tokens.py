"""A corpus → token ids on disk, two or four bytes each, and memory-mapped windows of them for training."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fledge.cli import read_json, write_json
from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.folders import claimed
from fledge.reading.documents import names_and_sizes, pieces
from fledge.tokenizers import encoding_of
from fledge.tokenizers.fast import TextEncoder, UnequalIds
from fledge.tokenizers.spelling import Spelling, named

BATCH = 4_000_000  # characters that are encoded at once


@dataclass
class Corpus:
    """The files of a corpus, and how they are split into documents."""

    data: list[str]
    text_column: str
    document_start: str | None
    validation_data: list[str]
    validation_share: float


class Windows(Dataset):
    """Token ids of one split, cut into windows of the context length.

    The split is one sequence of ids with end-of-text after every document. The beginning-of-text token comes before the
    first document, and before every document if it differs from end-of-text, as in Llama's vocabularies. Window k reads
    positions kC to kC + C − 1 and predicts kC + 1 to kC + C, so each token after the first is predicted exactly once.
    The last window is padded with ids whose labels are ignored.
    """

    def __init__(self, folder: Path, split: str, tokens: dict, context_length: int):
        """Opens a split of the token ids in `folder`.

        Raises:
            UserError: the split is shorter than two tokens.
        """
        record = tokens["splits"][split]
        if record["tokens"] < 2:
            raise UserError(f"The {split} split has {record['tokens']} tokens, and none to predict; give more text.")
        self.ids = np.memmap(folder / f"{split}.bin", dtype=tokens["dtype"], mode="r")
        self.context_length = context_length
        self.bytes_per_token = record["bytes"] / (len(self.ids) - 1)

    def __len__(self) -> int:
        return math.ceil((len(self.ids) - 1) / self.context_length)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, (context_length,). Labels are already shifted; `shift_labels` says so."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        begin = k * self.context_length
        ids = torch.from_numpy(self.ids[begin : begin + self.context_length + 1].astype(np.int64))
        missing = self.context_length + 1 - len(ids)
        labels = F.pad(ids[1:], (0, missing), value=IGNORED)
        return {"input_ids": F.pad(ids[:-1], (0, missing)), "labels": labels, "shift_labels": labels}


def open_tokens(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The record of the token ids in `folder`. They are written first, unless those of the same corpus are there.

    Raises:
        UserError: there is no text, the tokenizer cannot encode it, or the folder is not Fledge's.
    """
    told: list[object] = [names_and_sizes(corpus.data), names_and_sizes(corpus.validation_data), corpus.text_column]
    told += [corpus.document_start, corpus.validation_share, tokenizer.backend_tokenizer.to_str()]
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        told.append(tokenizer.bos_token_id)
    fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    if (folder / "tokens.json").exists():
        record = read_json(folder / "tokens.json", "pretrain.py")
        if record["fingerprint"] == fingerprint:
            return record
    inputs = {"--data": corpus.data, "--validation_data": corpus.validation_data}
    stage = "pretrain.py (tokens)"
    with claimed(folder, stage, True, inputs, "--tokens_dir") as output, output.staged() as building:
        try:
            writer = TokenWriter(building, tokenizer, TextEncoder(tokenizer))
            writer.write(corpus)
        except UnequalIds:
            writer = TokenWriter(building, tokenizer, TextEncoder(tokenizer, fast=False))
            writer.write(corpus)
        record = {"fingerprint": fingerprint, "dtype": writer.dtype, "splits": writer.splits}
        write_json(building / "tokens.json", record)
    return record


class TokenWriter:
    """Writes `train.bin` and `validation.bin` into a folder, two or four bytes per token, in batches of text."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, encode: TextEncoder):
        self.folder, self.tokenizer, self.encode = folder, tokenizer, encode
        self.spelling = Spelling(tokenizer)
        self.begun: set[str] = set()  # splits whose last document continues
        self.dtype = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"
        self.splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in ("train", "validation")}

    def write(self, corpus: Corpus) -> None:
        with (self.folder / "train.bin").open("wb") as train, (self.folder / "validation.bin").open("wb") as held_out:
            files = {"train": train, "validation": held_out}
            documents = pieces(corpus.data, corpus.text_column, corpus.document_start)
            if corpus.validation_data:
                self._write_batches((("train", *piece) for piece in documents), files)
                documents = pieces(corpus.validation_data, corpus.text_column, corpus.document_start)
                self._write_batches((("validation", *piece) for piece in documents), files)
            else:
                self._write_batches(_deal(documents, corpus.validation_share), files)
        if self.splits["validation"]["documents"] == 0:
            self._split_the_end_off(corpus.validation_share)

    def _write_batches(self, dealt: Iterable[tuple[str, str, bool]], files: Mapping[str, IO[bytes]]) -> None:
        batch: list[tuple[str, str, bool]] = []
        size, told = 0, 0
        for piece in dealt:
            batch.append(piece)
            size += len(piece[1])
            if size >= BATCH:
                self._write_batch(batch, files)
                batch, size = [], 0
                if (tokens := self.splits["train"]["tokens"]) >= told + 100_000_000:
                    print(f"  {tokens:,} tokens written", flush=True)
                    told = tokens
        self._write_batch(batch, files)

    def _write_batch(self, batch: list[tuple[str, str, bool]], files: Mapping[str, IO[bytes]]) -> None:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if missing := {part for _, text, _ in batch for part in self.spelling.missing(text)}:
            # Some tokenizers would drop it silently.
            raise UserError(
                f"The corpus holds {named(Counter(sorted(missing)))}, which the vocabulary lacks; take it out, or "
                "train a tokenizer by train_tokenizer.py."
            )
        with encoding_of("The corpus"):
            encoded = self.encode([text for _, text, _ in batch])
        for (split, text, is_end), ids in zip(batch, encoded, strict=True):
            record = self.splits[split]
            is_begin = split not in self.begun and (begin != end or not record["tokens"])
            row = [*([begin] if is_begin else []), *ids, *([end] if is_end else [])]
            (self.begun.discard if is_end else self.begun.add)(split)
            np.array(row, dtype=self.dtype).tofile(files[split])
            record["tokens"] += len(row)
            record["documents"] += is_end
            record["bytes"] += len(text.encode())

    def _split_the_end_off(self, share: float) -> None:
        """Holds out the last tokens, if there are too few documents to hold out a whole one."""
        file = self.folder / "train.bin"
        ids = np.memmap(file, dtype=self.dtype, mode="r")
        kept = len(ids) - max(2, round(share * len(ids)))
        held_out = np.array(ids[max(0, kept) :])
        held_out.tofile(self.folder / "validation.bin")
        text = cast(str, self.tokenizer.decode(held_out.tolist(), skip_special_tokens=True))
        size = len(text.encode())
        self.splits["validation"] |= {"tokens": len(held_out), "bytes": size}
        self.splits["train"]["tokens"] -= len(held_out)
        self.splits["train"]["bytes"] -= size
        del ids
        with file.open("r+b") as whole:
            whole.truncate(max(0, kept) * held_out.itemsize)


def _deal(documents: Iterable[tuple[str, bool]], share: float) -> Iterator[tuple[str, str, bool]]:
    """Assigns every n-th document to the validation split."""
    every, number = round(1 / share), 1
    for text, is_end in documents:
        yield "train" if number % every else "validation", text, is_end
        number += is_end
