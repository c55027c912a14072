"""Checkpoints that people trained and published, converted with no more than a tokenizer and their own text.

    python benchmarks/real_checkpoints.py --data DIR

DIR holds `checkpoints/` (three GPTs with character vocabularies, each beside the text it was trained on: their authors'
repositories are adityasasidhar/mini-gpt, farismismar/tiny-gpt and unable-splanck/minigpt) and `stories15M/` (llama2.c's
model with its tokenizer). Prints the target, the errors measured and the loss, and a story that stories15M wrote.
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
    print("| checkpoint | becomes | float64 error | after reloading | loss on its text |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint, more in given:
            base = Path(folder, checkpoint.stem)
            run("convert_checkpoint.py", "--checkpoint", checkpoint, *more, "--output_dir", base)
            report = json.loads((base / "conversion.json").read_text(encoding="utf-8"))
            proof = report["proof"]
            loss = f"{proof['probe_text_loss']:.3f}" if "probe_text_loss" in proof else ""
            print(f"| {checkpoint.name} | {report['target']} | {proof['float64_max_error']:.1e} ", end="")
            print(f"| {proof['max_relative_error']:.1e} | {loss} |", flush=True)
        print(run("generate.py", "--model", base, "--prompt", "Once upon a time, there was a small boat"))


if __name__ == "__main__":
    main()
