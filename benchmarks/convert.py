"""What the proof costs: converting a 162.7M-parameter checkpoint against merely loading and saving its tensors.

    python benchmarks/convert.py

The checkpoint is the 125M topic-ending layout (12 layers, 12 heads saved one by one, width 768, an untied head of
50,257 rows with a bias) with random weights. Each round runs both in turn, each in a process of its own, timed after
its imports; peak memory is the process's largest resident set, of which Python and its libraries are a part.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, HEADS, LAYERS = 50_257, 512, 768, 12, 12


def write_input(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models

    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    def norm(name: str) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)

    tensors["embeddings.token_embedding.weight"] = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) * 0.02
    tensors["embeddings.pos_embedding.weight"] = torch.randn(CONTEXT_LENGTH, WIDTH, generator=generator) * 0.02
    for n in range(LAYERS):
        norm(f"blocks.{n}.layer_norm1")
        norm(f"blocks.{n}.layer_norm2")
        for h in range(HEADS):
            for part in "qkv":
                linear(f"blocks.{n}.mha.heads.{h}.{part}", WIDTH // HEADS, WIDTH)
        linear(f"blocks.{n}.mha.out_proj", WIDTH, WIDTH)
        linear(f"blocks.{n}.feed_forward.layers.0", 4 * WIDTH, WIDTH)
        linear(f"blocks.{n}.feed_forward.layers.2", WIDTH, 4 * WIDTH)
    norm("layer_norm")
    linear("output_layer", VOCAB_SIZE, WIDTH)
    torch.save({"model_state_dict": tensors, "epoch": 1}, folder / "checkpoint.pt")
    vocab = {"<|endoftext|>": 0} | {f"word{i}": i for i in range(1, VOCAB_SIZE)}
    Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))


def copy(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    start = time.perf_counter()
    tensors = torch.load(folder / "checkpoint.pt", weights_only=True)["model_state_dict"]
    save_file(tensors, folder / "copy.safetensors")
    report(time.perf_counter() - start)


def convert(folder: Path) -> None:
    import accelerate  # noqa: F401  both are imported before the clock starts
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    sys.path.insert(0, str(ROOT))
    from fledge.scripts import convert_checkpoint

    sys.argv = ["convert_checkpoint.py", "--checkpoint", str(folder / "checkpoint.pt")]
    sys.argv += ["--tokenizer", str(folder / "tokenizer.json"), "--output_dir", str(folder / "base"), "--overwrite"]
    start = time.perf_counter()
    convert_checkpoint.main()
    report(time.perf_counter() - start)


def report(seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def run(what: str, folder: Path) -> str:
    """Output of one of this file's functions in a process of its own; a child's peak would begin with its parent's."""
    command = [sys.executable, __file__, what, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(what: str, folder: Path) -> dict:
    return json.loads(run(what, folder).splitlines()[-1])


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("write_input", folder)
        size = (folder / "checkpoint.pt").stat().st_size >> 20
        rounds = [(measure("copy", folder), measure("convert", folder)) for _ in range(5)]
    copied, converted = (statistics.median(pair[i]["seconds"] for pair in rounds) for i in (0, 1))
    peak = max(converted_round["peak_mib"] for _, converted_round in rounds)
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in rounds)
    print(f"load + save {copied:.2f} s, convert with proof {converted:.2f} s: {ratios[2]:.2f}x ", end="")
    print(f"({ratios[0]:.2f} to {ratios[-1]:.2f}x, five rounds)")
    print(f"peak memory {peak:,} MiB for {size:,} MiB of float32 weights: {peak / size:.2f}x")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"write_input": write_input, "copy": copy, "convert": convert}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
