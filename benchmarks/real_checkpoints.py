"""Checkpoints that strangers wrote and trained: what a conversion says of each, and whether it is right.

    python benchmarks/real_checkpoints.py --data DIR [--only NAME]

DIR holds `checkpoints/` and `checkpoints_wild/` (see its README). Each is converted with nothing but the file (and a
tokenizer), with its own text (`--probe_text`, away from the author's code), with its author's folder (`--reference`),
with that and `--allow_custom_code`, and with `--accept_assumptions` to see what would have been written. "Right" means
that the logits of the converted model equal those of the author's own module, which is made here by hand from the
author's code; where it is not at hand, the cell says so. No conversion that says "Proven" may be wrong. One that text
settled and that differs from the published code is judged by the text: the author changed the code after training if
the published code predicts it worse, and both losses are printed.
"""

import argparse
import io
import json
import math
import re
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Case:
    """A checkpoint with its text, and how its author's module is made: source files, class, globals, arguments."""

    folder: str
    checkpoint: str
    text: str | None = None
    vocabulary: str | int | None = None
    code: tuple[str, ...] = ()
    author: str = ""
    names: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)


WILD = "checkpoints_wild"
TEXT = 100_000
"""Characters of a text on which two models are compared."""
CASES = [
    Case("checkpoints/adityasasidhar_mini-gpt", "tiny_transformer.pt", "data.txt", "chars.json"),
    Case("checkpoints/farismismar_tiny-gpt", "tiny_gpt.pt", "knowledge.txt"),
    Case("checkpoints/unable-splanck_minigpt", "minigpt.pt", "data.txt"),
    Case(f"{WILD}/gpt-from-scratch", "gpt_model.pth", "data/input.txt", None,
         ("src/transformer_block.py", "src/gpt_model.py"), "GPT",
         {"vocab_size": 65, "embedding_dim": 32, "block_size": 8, "num_heads": 4}),
    Case(f"{WILD}/decoder-only-transformer", "checkpoints/model.pt", None, None, ("model.py",),
         "DecoderOnlyTransformer", {}, {"vocab_size": 31, "d_ff": 128, "max_len": 9}),
    Case(f"{WILD}/minigpt-decoder", "mini_gpt.pth", "data/input.txt", None,
         ("model/attention.py", "model/transformer_block.py", "model/gpt.py"), "MiniGPT", {},
         {"vocab_size": 196, "d_model": 128, "n_layers": 4, "n_heads": 4, "max_len": 64}),
    Case(f"{WILD}/smallgpt", "transformer_model.pth", "naver_news_extracted_text.txt", None, ("Small_LM.py",),
         "Small_GPT", {"n_embed": 32, "block_size": 8, "n_layer": 4, "dropout": 0.0, "device": "cpu"},
         {"vocab_length": 254}),
    Case(f"{WILD}/nano-gpt", "model.pt", "input.txt", None, ("bigram.py",), "BigramLanguageModel",
         {"n_embed": 32, "block_size": 128, "n_layer": 4, "n_head": 4, "dropout": 0.0, "device": "cpu",
          "vocab_size": 65}),
    Case(f"{WILD}/first-llm", "bigram_model.pth", "data.txt"),
    Case(f"{WILD}/shakespearegpt", "bigram_model.pth", "input.txt", None, ("modelcode.py",), "BigramLanguageModel",
         {"n_embd": 64, "block_size": 32, "n_layer": 4, "n_head": 4, "dropout": 0.0, "device": "cpu",
          "vocab_size": 65}),
    Case(f"{WILD}/chatbot", "gpt.pth", "dataset.txt", "vocab.json", ("train.py",), "TinyGPT",
         {"n_embd": 128, "block_size": 64, "n_layer": 3, "n_head": 4, "device": "cpu", "vocab_size": 53}),
    Case(f"{WILD}/custom-gpt", "mini_gpt.pth", None, "vocab.pkl", ("train_mini_gpt.py",), "MiniGPT", {},
         {"vocab_size": 25, "n_embed": 64, "n_head": 2, "n_layer": 2}),
    Case(f"{WILD}/whole-pickle", "model-01.pkl", None, 77, ("training.py",), "GPTLanguageModel",
         {"n_embed": 128, "block_size": 32, "n_layer": 4, "n_head": 4, "dropout": 0.0, "device": "cpu"},
         {"vocab_size": 77}),
]  # fmt: skip


def vocabulary_of(data: Path, case: Case, into: Path) -> Path | None:
    """The characters in the order of their ids, as JSON, for those checkpoints that hold none."""
    file = data / case.folder / str(case.vocabulary or case.text or "")
    if case.folder.endswith(("farismismar_tiny-gpt", "unable-splanck_minigpt", "decoder-only-transformer")):
        return None
    if isinstance(case.vocabulary, int):  # not published: other characters stand in, which no logit shows
        into.write_text(json.dumps([chr(0x4E00 + i) for i in range(case.vocabulary)]), encoding="utf-8")
        return into
    if file.suffix in (".json", ".pkl"):
        return file
    into.write_text(json.dumps(sorted(set(file.read_text(encoding="utf-8")))), encoding="utf-8")
    return into


def author_of(data: Path, case: Case):
    """The author's module with his weights: his classes alone, run in one namespace that holds his constants."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from fledge.checkpoints.loading import load_checkpoint

    if not case.author:
        return None
    space = {"torch": torch, "nn": nn, "F": F, "math": math, **case.names}
    if "num_heads" in case.names:
        space["head_size"] = case.names["embedding_dim"] // case.names["num_heads"]
    for name in case.code:
        code = (data / case.folder / name).read_text(encoding="utf-8")
        for definition in re.findall(r"(?ms)^class .*?(?=^[^\s#)]|\Z)", code):  # the rest may be of a later Python
            exec(compile(definition, name, "exec"), space)
    module = space[case.author](**case.arguments)
    file = data / case.folder / case.checkpoint
    if file.suffix == ".pkl":  # a whole module: its tensors alone, without the masks
        module.load_state_dict(load_checkpoint(file).tensors, strict=False)
        return module.eval()
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = next((state[key] for key in ("model_state", "model_state_dict", "model") if key in state), state)
    module.load_state_dict(state)
    return module.eval()


def verdict_of(data: Path, case: Case, base: Path, by_text: bool) -> str:
    """Whether a converted model computes what the author's module does, as a share of the largest logit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fledge.custom import open_as_strangers_do

    if (author := author_of(data, case)) is None:
        return "no author's code"
    report = json.loads((base / "conversion.json").read_text(encoding="utf-8"))
    model = open_as_strangers_do(base) if report["custom_code"] else AutoModelForCausalLM.from_pretrained(base)
    length = min(report["context_length"], 64)
    ids = torch.randint(1, report["vocab_size"], (4, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, found = author(ids), model(input_ids=ids).logits
    own = own[0] if isinstance(own, tuple) else own
    error = ((own - found).abs().max() / own.abs().max()).item()
    if error < 1e-4:
        return f"right ({error:.0e})"
    if by_text:
        text = (data / case.folder / case.text).read_text(encoding="utf-8")[:TEXT]
        tokens = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
        windows = tokens[: len(tokens) // length * length].view(-1, length)
        published, chosen = loss_of(author, windows), loss_of(lambda ids: model(input_ids=ids).logits, windows)
        if chosen < published:
            return f"settled by text, differs from the published code ({chosen:.3f} against {published:.3f} nats)"
    return f"**wrong** ({error:.0e})"


def loss_of(model, windows) -> float:
    """Nats per token of what a model predicts inside windows of ids (N, T)."""
    import torch

    total = 0.0
    with torch.no_grad():
        for ids in windows.split(64):
            logits = model(ids)
            logits = logits[0] if isinstance(logits, tuple) else logits
            total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() * len(
                ids
            )
    return total / len(windows)


def convert(data: Path, case: Case, base: Path, tokenizer: Path | None, *more: object) -> str:
    """What the conversion says in a word, and whether what it wrote is right."""
    from fledge.cli import run
    from fledge.scripts import convert_checkpoint

    command = ["convert_checkpoint.py", "--output_dir", base]
    command += [] if "--checkpoint" in more else ["--checkpoint", data / case.folder / case.checkpoint]
    command += ["--tokenizer", tokenizer] if tokenizer else []
    sys.argv = [*map(str, [*command, *more, "--overwrite"])]
    out, error = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(error):
            run(convert_checkpoint.main)
    except SystemExit as left:
        if left.code:
            return stopped(error.getvalue().strip().removeprefix("convert_checkpoint.py: "))
    said = json.loads((base / "conversion.json").read_text(encoding="utf-8"))["verdict"]
    word = "Proven" if said.startswith("Proven") else "by text" if "settled by text" in said else "assumed"
    word = "not compared" if "no code was compared" in said else word
    return f"{word}, {verdict_of(data, case, base, '--probe_text' in more)}"


def stopped(error: str) -> str:
    """Why a conversion wrote nothing: the names of what was assumed, or the start of the reason."""
    if found := re.search(r"Nothing shows (\d+) fact", error):
        rare = re.search(r"nothing that few authors have \((.*?)\), stated", error)
        assumed = re.findall(r"(?:assumed: |; )(?!and )(\w+) [^;]*?, stated by", error)
        assumed += [part.split()[0] for part in rare[1].split(", ")] if rare else []
        return f"stops: {', '.join(assumed)}" if len(assumed) < 4 else f"stops, {found[1]} assumed"
    if beside := re.search(r"nothing else shows (\d+) fact", error):  # the author's code lies there
        return f"stops, {beside[1]} assumed"
    reason = error.splitlines()[-1] if error else "no reason"
    return "stops: needs `--allow_custom_code`" if "--allow_custom_code" in reason else f"refused: {reason[:120]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()

    from fledge.cpu import describe

    data = args.data.resolve()
    print(describe(), flush=True)
    folder = "`--reference FOLDER`"
    print(f"| checkpoint | the file alone | with its text | {folder} | {folder} `--allow_custom_code` | as assumed |")
    print("|---|---|---|---|---|---|")
    for case in [case for case in CASES if args.only in case.folder]:
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = vocabulary_of(data, case, Path(folder, "characters.json"))
            text = ["--probe_text", data / case.folder / case.text] if case.text else None
            apart = Path(folder, "apart", Path(case.checkpoint).name)  # out of reach of the author's code
            apart.parent.mkdir()
            shutil.copy(data / case.folder / case.checkpoint, apart)
            own = "--allow_custom_code"
            reference = ["--reference", data / case.folder] if case.folder.startswith(WILD) else None
            written = [*reference, own] if reference else None
            for more in ([], [*text, own] if text else None, reference, written, ["--accept_assumptions", own]):
                by_text = more is not None and "--probe_text" in more
                more = [*more, "--checkpoint", apart] if by_text else more
                said = "" if more is None else convert(data, case, Path(folder, "base"), tokenizer, *more)
                cells.append(said.replace("|", "/"))
        print(f"| {case.folder.split('/')[-1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
