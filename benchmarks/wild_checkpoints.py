"""Checkpoints of strangers, converted in each way and held against their authors' own modules.

    python benchmarks/wild_checkpoints.py --wild FOLDER --table table.md

FOLDER/checkpoints.tsv names them, one a line: a folder in FOLDER, the checkpoint in it, and where it is from. The
tokenizer is what the checkpoint holds, else a text in the folder that has as many characters as the model has tokens,
else GPT-2's for GPT-2's sizes, else invented words. FOLDER/authors.py, if there is one, has `load(name, checkpoint)`,
which gives the author's module as a function of ids (B, T) to logits. It runs the authors' code; read that first.

"text" leaves the checkpoint in its folder, and "apart" takes it out of reach of the code. Each cell says what the
converter said, and whether the logits are the author's. "Proven" and wrong must never occur.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEAVY = ("fledge.checkpoints.custom", "fledge.checkpoints.evidence", "fledge.checkpoints.proof", "fledge.tokenizers")
"""What a conversion imports: done once, before its processes part."""
TIME = 300  # seconds for one conversion
TOLERANCE = 1e-4
"""Largest |Δ logit| in float32, as a share of the largest |logit|. A wrong GELU is about 5e-4 off."""
GPT2_SIZES = (50257, 50304)


def vocabulary_size(checkpoint: Path) -> int | None:
    """How many tokens the model has; None where the checkpoint holds its vocabulary or nothing tells."""
    from fledge.checkpoints.loading import load_checkpoint
    from fledge.checkpoints.roles import detect
    from fledge.errors import UserError

    try:
        found = load_checkpoint(str(checkpoint))
        roles = detect(found.tensors, {}).roles
    except UserError:
        return None
    names = [name for name, role in roles.items() if role == "token_embedding.weight"]
    return None if found.vocabulary or not names else found.tensors[names[0]].shape[0]


def tokenizer_of(folder: Path, size: int | None, invented: Path) -> tuple[list[str], Path | None]:
    """Arguments that name a tokenizer, and a text of the model's."""
    texts = sorted(folder.rglob("*.txt"), key=lambda file: -file.stat().st_size)
    texts = [file for file in texts if file.name != "requirements.txt"]
    if size is None:
        return [], texts[0] if texts else None
    for file in texts:
        with contextlib.suppress(UnicodeDecodeError):
            if len(set(file.read_text(encoding="utf-8"))) == size:
                return ["--tokenizer", str(file)], file
    if size in GPT2_SIZES:
        return ["--tokenizer", "gpt2"], texts[0] if texts else None
    invented.write_text(json.dumps({f"word{i}": i for i in range(size)}))
    return ["--tokenizer", str(invented)], None


def convert(arguments: list[str], output: Path) -> tuple[str, str]:
    """What became of it (Proven, text, assumed, stops or fails) and the sentence that says so.

    A child of this process converts: it has imported everything already, and what it does to itself ends with it.
    """
    said_by = output.with_suffix(".txt")
    child = multiprocessing.get_context("fork").Process(target=_convert, args=(arguments, output, said_by))
    child.start()
    child.join(TIME)
    if child.is_alive():
        child.kill()
        return "fails", f"after {TIME} seconds"
    lines = said_by.read_text(encoding="utf-8").strip().splitlines()
    if child.exitcode:
        return ("stops" if child.exitcode == 2 else "fails"), lines[-1] if lines else ""
    said = next(line for line in reversed(lines) if line.startswith(("Proven", "Converted")))
    return (
        "Proven"
        if said.startswith("Proven")
        else "text"
        if "by text" in said
        else "assumed"
        if "not proven" in said
        else "uncompared"
    ), said


def _convert(arguments: list[str], output: Path, said_by: Path) -> None:
    from fledge.cli import run
    from fledge.scripts import convert_checkpoint

    with (
        said_by.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.argv = ["convert_checkpoint.py", *arguments, "--output_dir", str(output)]
        run(convert_checkpoint.main)


def error(folder: Path, author) -> float:
    """Largest |Δ logit| between the converted model and the author's, over the largest |logit|."""
    import torch

    from fledge.models import open_model

    model = open_model(folder)
    with torch.no_grad():
        size = author(torch.tensor([[1]])).shape[-1]
        vocabulary, length = min(model.config.vocab_size, size), model.config.max_position_embeddings
        # Token 0 is padding in some authors' masks.
        ids = torch.randint(1, vocabulary, (4, min(length, 64)), generator=torch.Generator().manual_seed(0))
        expected = author(ids)[..., :vocabulary].double()
        found = model(ids).logits[..., :vocabulary].double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def load_authors(wild: Path):
    if not (wild / "authors.py").exists():
        return None
    spec = importlib.util.spec_from_file_location("authors", wild / "authors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ways(folder: Path, text: Path | None) -> dict[str, list[str]]:
    """The arguments of each way to convert a checkpoint of `folder`."""
    given = {"bare": [], "accepted": ["--accept_assumptions"]}
    if text:
        given["text"] = given["apart"] = ["--probe_text", str(text)]
    return given | {"reference": ["--reference", str(folder)]}


def measure(wild: Path, wanted: list[str]) -> list[dict]:
    """A row for each checkpoint: what each way gave, how it was said, and how far the logits are from the author's."""
    for module in HEAVY:
        importlib.import_module(module)
    authors, rows = load_authors(wild), []
    for line in (wild / "checkpoints.tsv").read_text(encoding="utf-8").splitlines():
        name, checkpoint, origin = line.split("\t")
        row = {"name": name, "checkpoint": checkpoint, "origin": origin, "ways": {}}
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            folder, scratch = wild / name, Path(scratch)
            size = vocabulary_size(folder / checkpoint)
            tokenizer, text = tokenizer_of(folder, size, scratch / "vocabulary.json")
            for way, more in ways(folder, text).items():
                if way not in wanted:
                    continue
                output = scratch / way
                file = folder / checkpoint
                if way == "apart":  # the text alone, where no code lies beside the checkpoint
                    (scratch / "apart_from_code").mkdir()
                    file = Path(shutil.copy(file, scratch / "apart_from_code"))
                arguments = ["--checkpoint", str(file), *tokenizer, "--allow_custom_code", *more]
                kind, said = convert(arguments, output)
                entry = row["ways"][way] = {"kind": kind, "said": said.replace(str(wild), "")}
                if (output / "conversion.json").exists():
                    entry["target"] = json.loads((output / "conversion.json").read_text())["target"]
                    author = authors.load(name, checkpoint) if authors else None
                    if author:
                        entry["error"] = error(output, author)
        rows.append(row)
        print(f"{name}/{checkpoint}: {', '.join(f'{way} {cell(entry)}' for way, entry in row['ways'].items())}")
        sys.stdout.flush()
    return rows


def cell(entry: dict) -> str:
    if entry["kind"] in ("stops", "fails"):
        return entry["kind"]
    judged = (
        "" if "error" not in entry else ", right" if entry["error"] <= TOLERANCE else f", WRONG {entry['error']:.1e}"
    )
    return f"{entry['kind']}{judged} ({entry['target']})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wild", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=["bare", "accepted", "text", "apart", "reference"])
    parser.add_argument("--table", type=Path, help="a file for the table, and .json beside it for all that was said")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a forked child waits for its parent's threads
    rows = measure(args.wild.resolve(), args.ways)
    table = [f"| checkpoint | {' | '.join(args.ways)} |", "|---|" + "---|" * len(args.ways)]
    for row in rows:
        cells = [cell(row["ways"][way]) if way in row["ways"] else "" for way in args.ways]
        table.append(f"| {row['name']} {row['checkpoint']} | {' | '.join(cells)} |")
    for way in args.ways:
        counts = Counter(cell(row["ways"][way]).partition(" (")[0].split(" 1")[0] for row in rows if way in row["ways"])
        table.append(f"\n{way}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    wrong = [row["name"] for row in rows for entry in row["ways"].values() if cell(entry).startswith("Proven, WRONG")]
    table.append(f"\nProven and wrong: {len(wrong)} {sorted(set(wrong))}")
    print("\n".join(table))
    if args.table:
        args.table.write_text("\n".join(table) + "\n", encoding="utf-8")
        args.table.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
