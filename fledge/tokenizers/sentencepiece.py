"""SentencePiece's `.model` and llama2.c's `tokenizer.bin` → a `tokenizers.Tokenizer` with the same ids."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass
class Piece:
    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass
class SentencePiece:
    """The parts of a SentencePiece model that determine its encoding; `pieces[i]` is the token with id i."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read_sentencepiece(file: Path) -> Tokenizer:
    """Reads sentencepiece_model.proto's ModelProto (google/sentencepiece) without the sentencepiece package.

    The ids are those of that library, with two exceptions: a control piece such as `</s>` in a text is recognised, and
    `tokenizers` normalises a letter together with its combining marks if the model has a rule for the letter.

    Raises:
        ValueError: damaged, neither BPE nor unigram, or an option that `tokenizers` does not support.
        IndexError, struct.error: the file is truncated.
    """
    model, parts = SentencePiece(), set()
    for number, value in _fields(file.read_bytes()):
        parts.add(number)
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            model.pieces.append(Piece(piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
            model.model_type = trainer.get(3, UNIGRAM)
            model.byte_fallback = bool(trainer.get(35, False))
            if trainer.get(24, False):
                raise ValueError("it marks white space behind words (treat_whitespace_as_suffix)")
        elif number == 3:
            normalizer = dict(_fields(value))
            model.charsmap = normalizer.get(2, b"")
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
            if not normalizer.get(5, True):
                raise ValueError("it keeps spaces as they are (escape_whitespaces is off)")
    if not {1, 2, 3} <= parts:
        raise ValueError("its pieces, trainer or normalizer are missing")
    return _build(model)


def read_llama2c(file: Path) -> Tokenizer:
    """Reads the BPE that llama2.c's tokenizer.py exports.

    The file holds the longest piece in bytes (uint32), then for each piece its score (float32), its length (uint32) and
    its UTF-8 text with spaces for "▁"; `<unk>`, `<s>`, `</s>` and the 256 bytes come first.

    Raises:
        ValueError: damaged, or the pieces of another tokenizer.
        struct.error: the file is truncated.
    """

    content, at = file.read_bytes(), 4
    pieces: list[Piece] = []
    (longest,) = struct.unpack_from("<I", content)
    while at < len(content):
        score, length = struct.unpack_from("<fI", content, at)
        text, at = content[at + 8 : at + 8 + length], at + 8 + length
        if length > longest or at > len(content):
            raise ValueError(f"piece {len(pieces)} is {length} bytes long, with {longest} at most and {len(text)} left")
        pieces.append(Piece(text.decode("utf-8"), score))
    first = [piece.text.strip("\n") for piece in pieces[:3]]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    # Early versions of llama2.c write a byte as the character of its number.
    if first != ["<unk>", "<s>", "</s>"] or [piece.text for piece in pieces[3:259]] not in (
        byte_pieces,
        [chr(byte) for byte in range(256)],
    ):
        raise ValueError("it does not begin with <unk>, <s>, </s> and the 256 bytes")
    pieces = [
        *(Piece(text, type=type) for text, type in zip(first, (UNKNOWN, CONTROL, CONTROL), strict=True)),
        *(Piece(text, type=BYTE) for text in byte_pieces),
        *(Piece(piece.text.replace(" ", "▁"), piece.score) for piece in pieces[259:]),
    ]
    return _build(SentencePiece(pieces, BPE, byte_fallback=True, remove_extra_whitespaces=False))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message as (number, value): an integer, or the bytes of anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
            continue
        size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        if at + size > len(message):
            raise ValueError("it is cut short")
        yield number, message[at : at + size]
        at += size


def _build(model: SentencePiece) -> Tokenizer:
    texts = [piece.text for piece in model.pieces]
    vocabulary = {text: i for i, text in enumerate(texts)}
    if twice := next((text for i, text in enumerate(texts) if vocabulary[text] != i), None):
        raise ValueError(f"{twice!r} stands in it twice")
    unknowns = [i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
    if len(unknowns) != 1:
        raise ValueError(f"it has {len(unknowns)} unknown pieces, not one")
    unknown = unknowns[0]
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    if model.model_type == BPE:
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                _merges(model.pieces),
                unk_token=texts[unknown],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                ignore_merges=bool(symbols),  # no merges lead to a user-defined symbol
            )
        )
    elif model.model_type == UNIGRAM:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        # With a space it matches nothing; "<unk>" in a text is text, as SentencePiece has it.
        scored[unknown] = (f" {texts[unknown]}", 0.0)
        tokenizer = Tokenizer(models.Unigram(scored, unknown, model.byte_fallback))
    else:
        raise ValueError("it is neither BPE nor unigram")
    if symbols:
        pattern = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.normalizer = _normalizer(model)
    decoded = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*decoded, *prefix])
    control = [piece.text for piece in model.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The merges of a BPE model in order of rank.

    SentencePiece merges the neighbours whose piece has the highest score, and the leftmost of equal scores. Here merges
    are ranked instead. For equal scores, such as those of Llama's runs of spaces, the longer piece comes first, which
    also builds a run from the left.
    """
    mergeable = {piece.text for piece in pieces if piece.type == NORMAL}
    ranked = sorted((piece for piece in pieces if piece.type == NORMAL), key=lambda p: (-p.score, -len(p.text)))
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in ranked
        for cut in range(len(piece.text) - 1, 0, -1)
        if piece.text[:cut] in mergeable and piece.text[cut:] in mergeable
    ]


def _normalizer(model: SentencePiece) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if steps:
        try:
            steps[0].normalize_str("".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x110000)])))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust side is no Exception
            raise ValueError("its normalization rules are damaged") from error
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +(?= |\z)"), ""))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
