"""prepare_dataset.py against what else would do its work, on the same records, and its peak memory.

    python benchmarks/prepare.py                                # 300 MB
    python benchmarks/prepare.py --megabytes 3000 --only_whole  # time and peak memory of the whole

The corpus is examples/tales.txt.gz over and over, with other names and another last sentence each time; ids are
GPT-2's. Rates are megabytes of the corpus and examples a second, first by the clock and then of processor time, which
says more on a machine that is not idle: two idle cores reach twice the latter where both are used. Of the whole, and of
nothing else, they include Python's start and its imports. Memory is the largest sum over all its processes of their
proportional set sizes, sampled twice a second: a page that two processes share counts once.
"""

import argparse
import contextlib
import gzip
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENDS = ("la", "ro", "mi", "ta", "ne", "ko", "vi", "sa", "du", "be")
FIELDS = ("Summary:", "Features:", "Words:", "Random sentence:", "Story:")


def write_corpus(file: Path, megabytes: float) -> None:
    with gzip.open(ROOT / "examples" / "tales.txt.gz", "rt", encoding="utf-8") as stream:
        text = stream.read()
    known = "|".join(sorted(set(re.findall(r"named ([A-Z]\w+)", text))))
    pieces = re.split(rf"\b({known})\b", text.replace("\n<|endoftext|>", " That was on day DAY.\n<|endoftext|>"))
    size, copy = 0, 0
    with file.open("wb") as stream:
        while size < megabytes * 1e6:
            end = "".join(ENDS[int(digit)] for digit in f"{copy:03d}")
            pieces_of_copy = (f"{piece}{end}" if place % 2 else piece for place, piece in enumerate(pieces))
            content = "".join(pieces_of_copy).replace("DAY", str(copy)).encode()
            # The corpus ends with the record that fills it.
            cut = content.find(b"<|endoftext|>\n", max(0, int(megabytes * 1e6) - size))
            size += stream.write(content if cut < 0 else content[: cut + len(b"<|endoftext|>\n")])
            copy += 1


def save_tokenizer(folder: Path):
    from fledge.templates import add_template
    from fledge.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("gpt2", context_length=1024)
    add_template(tokenizer, "story")
    tokenizer.save_pretrained(folder)
    return tokenizer


def parse_row_by_row(corpus: Path, out: Path) -> None:
    """As people stream the line-a-row form of the Hub: a state machine over rows, a JSON line a record."""
    from datasets import load_dataset

    rows = load_dataset("text", data_files=str(corpus), split="train", streaming=True)
    record, field = {}, None
    with out.open("w", encoding="utf-8") as stream:
        for row in rows:
            line = row["text"]
            if line == "<|endoftext|>":
                stream.write(json.dumps(record) + "\n")
                record, field = {}, None
                continue
            for name in FIELDS:
                if line.startswith(name):
                    field, line = name, line[len(name) :].strip()
                    break
            if field:
                record[field] = f"{record[field]}\n{line}" if field in record else line


class ParseAndWrite:
    """A chunk's records as parquet: what preparation does but for examples and tokens."""

    def __init__(self, source, folder: Path):
        self.source, self.folder = source, folder

    def __call__(self, named) -> int:
        import pyarrow as pa
        import pyarrow.parquet

        records = self.source.parse(named.chunk)
        columns = {name: [record.get(name) for record in records] for name in ("Summary", "Words", "Features", "Story")}
        pa.parquet.write_table(pa.table(columns), self.folder / f"{named.name}.parquet")
        return len(records)


def parse_and_write(corpus: Path, out: Path) -> None:
    from fledge.preparation.chunks import named_chunks, spread
    from fledge.sources import load_source

    out.mkdir()
    source = load_source("tinystories_instruct")
    assert sum(spread(ParseAndWrite(source, out), named_chunks(source, [str(corpus)], None), num_proc=2))


def conversations(corpus: Path, count: int) -> list[list[dict]]:
    """The first that topic_ending makes, by the library itself."""
    import random

    from fledge.sources import load_source
    from fledge.tasks import load_task
    from fledge.text.stories import COMPLETE

    records = load_source("tinystories_instruct").records(str(corpus))
    usable = (record for record in records if {"Summary", "Story"} <= record.keys())
    complete = (record for record in usable if record["Story"].endswith(COMPLETE))
    return [
        load_task("topic_ending").examples(record, random.Random(0))[0]["messages"]
        for record in islice(complete, count)
    ]


def prepare_with_trl(corpus: Path, tokenizer, count: int, num_proc: int | None) -> "Cost":
    """SFTTrainer's preparation of prompts and completions."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    rows = [{"prompt": [ask], "completion": [answer]} for ask, answer in conversations(corpus, count)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_length=1024, dataset_num_proc=num_proc, use_cpu=True, bf16=False)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8))
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows[:2]), processing_class=tokenizer
        )
        dataset = Dataset.from_list(rows)
        with Cost() as cost:
            prepared = trainer._prepare_dataset(dataset, tokenizer, args, False, None, "train")
    assert len(prepared) == len(rows)
    return cost


def tokenize_with_transformers(corpus: Path, tokenizer, count: int) -> "Cost":
    """Nothing but the batched tokenizer, with all its threads."""
    from fledge.encoding import prompt_text

    asked = conversations(corpus, count)
    prompts, answers = [prompt_text(tokenizer, messages[:1]) for messages in asked], [m[1]["content"] for m in asked]
    with Cost() as cost:
        for begin in range(0, len(asked), 1000):
            tokenizer(prompts[begin : begin + 1000])
            tokenizer(answers[begin : begin + 1000])
    return cost


def prepare_whole(corpus: Path, tokenizer: Path, out: Path) -> tuple["Cost", float, dict]:
    """What prepare_dataset.py costs, its peak memory in bytes, and its budget."""
    import psutil

    peak = 0
    command = [sys.executable, "prepare_dataset.py", "--data", corpus, "--tokenizer", tokenizer, "--output_dir", out]
    with Cost(watching=True) as cost:
        process = subprocess.Popen([*map(str, command), "--overwrite"], cwd=ROOT, stdout=subprocess.DEVNULL)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended: the next sample sees the others
                peak = max(peak, sum(p.memory_full_info().pss for p in (tree, *tree.children(recursive=True))))
            time.sleep(0.5)
    assert process.returncode == 0
    return cost, peak, json.loads((out / "budget.json").read_text(encoding="utf-8"))


class Cost:
    """Seconds by the clock and of the processors between entering and leaving: this process's and its ended children's.

    `watching` leaves out this process, which then only samples another's memory.
    """

    def __init__(self, watching: bool = False):
        own = [] if watching else [resource.RUSAGE_SELF]
        self.counted = [*own, resource.RUSAGE_CHILDREN]

    def __enter__(self) -> "Cost":
        self.clock, self.processor = time.perf_counter(), self._processor()
        return self

    def __exit__(self, *_) -> None:
        self.clock, self.processor = time.perf_counter() - self.clock, self._processor() - self.processor

    def _processor(self) -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, self.counted))


def rates(amount: float, cost: Cost) -> str:
    return f"{amount / cost.clock:,.1f} a second by the clock, {amount / cost.processor:,.1f} of processor time"


def against(whole: Cost, whole_count: int, other: Cost, count: int) -> str:
    clock, processor = (
        (whole_count / getattr(whole, kind)) / (count / getattr(other, kind)) for kind in ("clock", "processor")
    )
    return f"the whole: {clock:.2f} times that by the clock, {processor:.2f} of processor time"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--only_whole", action="store_true", help="time and memory of prepare_dataset.py alone")
    parser.add_argument("--folder", type=Path, help="where there is room for five times the corpus")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        corpus = folder / "corpus.txt"
        write_corpus(corpus, args.megabytes)
        megabytes = corpus.stat().st_size / 1e6
        tokenizer = save_tokenizer(folder / "tokenizer")
        print(f"{megabytes:,.0f} MB of records", flush=True)

        whole, peak, budget = prepare_whole(corpus, folder / "tokenizer", folder / "data")
        tokens, count = sum(split["tokens"] for split in budget["splits"].values()), budget["examples"]
        print(f"prepare_dataset.py: {whole.clock:,.1f} s, {whole.processor:,.1f} s of processor time,", end=" ")
        print(
            f"{budget['rows_read']:,} records, {count:,} examples, {tokens:,} tokens; peak memory {peak / 1e9:.2f} GB"
        )
        print(f"  MB: {rates(megabytes, whole)}\n  examples: {rates(count, whole)}", flush=True)
        if args.only_whole:
            return

        with Cost() as cost:
            parse_row_by_row(corpus, folder / "rows.jsonl")
        print(f"row by row, streamed, MB: {rates(megabytes, cost)}")
        with Cost() as cost:
            parse_and_write(corpus, folder / "parquet")
        print(f"parse and write in chunks, MB: {rates(megabytes, cost)}", flush=True)
        some = 10_000
        bare = tokenize_with_transformers(corpus, tokenizer, some)
        print(f"transformers' tokenizer alone, examples: {rates(some, bare)}; {against(whole, count, bare, some)}")
        for num_proc in (None, 2):
            trl = prepare_with_trl(corpus, tokenizer, some, num_proc)
            print(f"TRL, dataset_num_proc={num_proc}, examples: {rates(some, trl)}; {against(whole, count, trl, some)}")


if __name__ == "__main__":
    main()
