"""A model with a vocabulary larger than its text needs → the same model with only the tokens that the text uses.

    python trim_vocabulary.py --model base --data corpus.txt --output_dir small

For models with a byte-level BPE or one with byte fallback (Llama's). Text that uses only kept tokens has the same
tokens, with new ids; its probabilities change only by the share of the removed tokens. Other text is encoded with
smaller tokens: all 256 bytes are kept.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.cli import keep_origin, parse, write_json
from fledge.errors import UserError
from fledge.folders import Output, claimed
from fledge.hub import find_model
from fledge.ranges import AT_LEAST_ONE, check_ranges
from fledge.terminal import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fledge.models import ModelAndTokenizer

RANGES = {"min_count": AT_LEAST_ONE}


@dataclass
class TrimArguments:
    model: str = field(metadata={"help": "a model folder with its tokenizer, or a model on the Hub"})
    data: list[str] = field(
        metadata={"help": "text of the kind that the model is for: files, folders, Hub datasets, as for pretrain.py"}
    )
    output_dir: str = field(metadata={"help": "the folder to write"})
    min_count: int = field(default=1, metadata={"help": "keep tokens that occur at least this often (default 1)"})
    text_column: str = field(default="text", metadata={"help": "the column with the text (default text)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier trimmed model in output_dir"})


def main() -> Path:
    """Returns the folder it wrote."""
    (args,) = parse(sys.argv[1:], TrimArguments, description=__doc__)
    check_ranges(args, RANGES)
    source = find_model(args.model)
    inputs = {"--model": args.model, "--data": args.data}
    with claimed(args.output_dir, "trim_vocabulary.py", args.overwrite, inputs) as output:
        trim(args, output, source)
    return output.path


def trim(args: TrimArguments, output: Output, source: Path) -> None:
    import copy

    from fledge.models import load_model
    from fledge.reading.documents import pieces
    from fledge.resizing import keep_rows, trim_tokenizer
    from fledge.tokenizers.training import HeldOut

    quiet()

    # ------------------------------------------------------------ Load and trim
    model, tokenizer = load_model(args.model)
    model = model.cpu()
    # Tokens are counted without the held-out text, on which the result is measured.
    held_out = HeldOut(pieces(args.data, args.text_column))
    used = used_tokens(tokenizer, held_out, args.min_count)
    trimmed, old_ids = trim_tokenizer(tokenizer, used)
    small = copy.deepcopy(model)
    keep_rows(small, old_ids)
    print(f"{len(used):,} of {len(tokenizer):,} tokens occur; with bytes and merges {len(old_ids):,} stay.", flush=True)

    # ------------------------------------------------------------ Measure and save
    measured = measure((model, tokenizer), (small, trimmed), old_ids, held_out.text)
    record = {"min_count": args.min_count, "held_out": held_out.is_unseen, **measured}
    with output.staged() as folder:
        small.save_pretrained(folder)
        trimmed.save_pretrained(folder)
        keep_origin(source, folder)
        write_json(folder / "trimming.json", record)
    print(
        f"{record['parameters_before']:,} to {record['parameters_after']:,} parameters; the head takes "
        f"{record['head_milliseconds_before']} and then {record['head_milliseconds_after']} ms for 256 tokens."
    )
    print(
        f"On {record['texts']} texts {'held out' if held_out.is_unseen else 'of the data'}: "
        f"{record['bits_per_byte_before']:.4f} to {record['bits_per_byte_after']:.4f} bits per byte; "
        f"{record['same_tokens']:.1%} keep their tokens, and there the removed ones had {record['removed']:.2%} "
        f"of the probability; beyond that no log-probability moved by more than {record['largest_error']:.0e}."
    )


def used_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], min_count: int) -> list[int]:
    """The ids that occur at least `min_count` times in `texts`, ascending."""
    import numpy as np

    from fledge.tokenizers import encoding_of

    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for text in texts:
        with encoding_of("The text"):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        np.add.at(counts, ids, 1)
    return np.nonzero(counts >= min_count)[0].tolist()


def measure(before: "ModelAndTokenizer", after: "ModelAndTokenizer", old_ids: list[int], texts: list[str]) -> dict:
    """Sizes, bits per byte, the largest error and the time of the head, before and after trimming.

    Raises:
        UserError: no text fits the context.
    """
    from fledge.models import context_of
    from fledge.resizing import compare_trimmed

    context = context_of(before[0].config)
    # Characters: half a context or so of text like the data, a fifth where each is written with its bytes.
    sizes = (2 * context, context // 2, context // 5)
    begun = [[text[:size] for size in sizes] for text in texts[:200]]
    fitting = [next((text for text in of_one if 0 < len(after[1].encode(text)) < context), None) for of_one in begun]
    short = [text for text in fitting if text]
    if not short:
        raise UserError("No held-out text fits the model's context, so nothing can be measured; give other --data.")
    return {
        "tokens_before": len(before[1]),
        "tokens_after": len(old_ids),
        "parameters_before": before[0].num_parameters(),
        "parameters_after": after[0].num_parameters(),
        **compare_trimmed(before, after, old_ids, short),
        "head_milliseconds_before": head_milliseconds(before[0]),
        "head_milliseconds_after": head_milliseconds(after[0]),
    }


def head_milliseconds(model: "PreTrainedModel") -> float:
    """The time of the output head for 256 tokens, the best of five."""
    import torch

    from fledge.models import embedding_of, head_of

    hidden, head = torch.randn(256, embedding_of(model).embedding_dim), head_of(model)
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            head(hidden)
            times.append(time.perf_counter() - start)
    return round(1000 * min(times), 3)
