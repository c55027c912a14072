"""Raw text → a byte-level BPE tokenizer that `AutoTokenizer` opens, with a report of its compression.

python train_tokenizer.py --data corpus.txt --vocab_size 8000 --output_dir tokenizer
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.cli import parse, write_json
from fledge.commands import next_command
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.ranges import AT_LEAST_ONE, Range, check_ranges

RANGES = {"vocab_size": Range(at_least=1, below=2**32), "min_frequency": AT_LEAST_ONE}


@dataclass
class TokenizerArguments:
    data: list[str] = field(
        metadata={
            "help": "text, .jsonl or .parquet files (or .gz, .zst), folders of them, or Hub datasets (owner/name)"
        }
    )
    output_dir: str = field(metadata={"help": "the folder to write"})
    vocab_size: int = field(
        default=8192, metadata={"help": "size of the vocabulary, including bytes and special tokens (default 8192)"}
    )
    special_tokens: list[str] = field(
        default_factory=list, metadata={"help": "further special tokens; <|endoftext|> is always the first"}
    )
    min_frequency: int = field(default=2, metadata={"help": "pairs that occur less often are not merged (default 2)"})
    text_column: str = field(default="text", metadata={"help": "the column with the text (default text)"})
    document_start: str | None = field(
        default=None, metadata={"help": "a regular expression: documents also begin at lines that match"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier tokenizer in output_dir"})


def main() -> Path:
    """Returns the folder it wrote."""
    (args,) = parse(sys.argv[1:], TokenizerArguments, description=__doc__)
    check_ranges(args, RANGES)
    extra = args.special_tokens
    for token in extra:
        if not token.strip() or ["<|endoftext|>", *extra].count(token) > 1:
            raise UserError(
                f"--special_tokens names {token!r}, which is empty or there twice; name each other token once."
            )
    if args.vocab_size <= 256 + 1 + len(extra):
        raise UserError(
            f"--vocab_size {args.vocab_size} leaves no merge beside 256 bytes and {1 + len(extra)} special tokens; "
            "ask for more."
        )
    with claimed(args.output_dir, "train_tokenizer.py", args.overwrite, {"--data": args.data}) as output:
        make_tokenizer(args, output)
    return output.path


def make_tokenizer(args: TokenizerArguments, output: Output) -> None:
    from fledge.reading.documents import END, pieces
    from fledge.tokenizers.training import HeldOut, measure_tokenizer, save, train

    print(f"Reading {', '.join(args.data)} ...", flush=True)
    held_out = HeldOut(pieces(args.data, args.text_column, args.document_start))
    tokenizer = train(held_out, args.vocab_size, [END, *args.special_tokens], args.min_frequency)
    with output.staged() as folder:
        save(tokenizer, folder)
    record: dict[str, Any] = {"data": args.data, "documents": held_out.documents, "bytes": held_out.bytes}
    record |= measure_tokenizer(tokenizer, held_out)
    output.add("tokenizer_report.json", lambda folder: write_json(folder / "tokenizer_report.json", record))
    print(f"{record['vocab_size']:,} tokens from {record['documents']:,} documents, {record['bytes']:,} bytes.")
    gpt2 = record["gpt2_bytes_per_token"]
    print(
        f"On {record['report_bytes']:,} bytes {record['report_on']}: {record['bytes_per_token']:.2f} bytes a token"
        + (f" (GPT-2's 50,257 tokens: {gpt2:.2f})" if gpt2 else "")
        + f"; {record['vocabulary_used']:.0%} of the vocabulary occurs."
    )
    print(f"The longest tokens: {', '.join(map(repr, record['longest_tokens'][:8]))}")
    used = {
        "data": args.data if len(args.data) > 1 else args.data[0],
        "tokenizer": args.output_dir,
        "document_start": args.document_start,
        "text_column": None if args.text_column == "text" else args.text_column,
    }
    print(f"Next: {next_command('pretrain.py', used, {'output_dir': str(output.path.parent / 'base')})}")
