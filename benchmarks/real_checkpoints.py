"""Checkpoints that people trained and published, converted with no more than a tokenizer and their own text.

    python benchmarks/real_checkpoints.py --data DIR

DIR holds `checkpoints/` (three GPTs with character vocabularies, each beside the text it was trained on: their authors'
repositories are adityasasidhar/mini-gpt, farismismar/tiny-gpt and unable-splanck/minigpt) and `stories15M/` (llama2.c's
model with its tokenizer). Prints the target, the errors measured, the loss on windows of a whole context (up to 128 of
the whole text, and the first 16), and a story that stories15M wrote.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def loss_of_first_windows(base: Path, text: Path, count: int = 16) -> float:
    """Nats a token over the first `count` windows of a whole context, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    length = model.config.max_position_embeddings
    windows = torch.stack([ids[begin : begin + length + 1] for begin in range(0, count * length, length)])
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data.resolve()
    mini, tiny, minigpt = (
        data / "checkpoints" / name
        for name in ("adityasasidhar_mini-gpt", "farismismar_tiny-gpt", "unable-splanck_minigpt")
    )
    given = [
        (mini / "tiny_transformer.pt", ["--tokenizer", mini / "chars.json", "--probe_text", mini / "data.txt"]),
        (tiny / "tiny_gpt.pt", ["--probe_text", tiny / "knowledge.txt"]),
        (minigpt / "minigpt.pt", ["--probe_text", minigpt / "data.txt"]),
        (data / "stories15M", ["--tokenizer", data / "stories15M"]),
    ]
    print("| checkpoint | becomes | float64 error | after reloading | loss on its text | its first 16 windows |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint, more in given:
            base = Path(folder, checkpoint.stem)
            run("convert_checkpoint.py", "--checkpoint", checkpoint, *more, "--output_dir", base)
            report = json.loads((base / "conversion.json").read_text(encoding="utf-8"))
            proof = report["proof"]
            losses = " | "
            if "probe_text_loss" in proof:
                losses = f"{proof['probe_text_loss']:.3f} | {loss_of_first_windows(base, more[-1]):.3f}"
            print(f"| {checkpoint.name} | {report['target']} | {proof['float64_max_error']:.1e} ", end="")
            print(f"| {proof['max_relative_error']:.1e} | {losses} |", flush=True)
        print(run("generate.py", "--model", base, "--prompt", "Once upon a time, there was a small boat"))


if __name__ == "__main__":
    main()
