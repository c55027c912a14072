import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, call_script, load_scratch_gpt, write_records
from processes import fork_script

from fledge.judges.endings import last_sentences
from fledge.sources import load_source
from fledge.tasks import load_task
from fledge.text.stories import sentences

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def test_the_shipped_checkpoint_is_small_and_half_precision():
    file = EXAMPLES / "scratch_gpt" / "checkpoint.pt"
    assert file.stat().st_size <= 8_000_000
    checkpoint = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in checkpoint["model_state_dict"].values()} == {torch.float16}
    assert checkpoint["config"]["vocab_size"] == 4096
    assert checkpoint["config"]["context_length"] == 512


def test_the_shipped_checkpoint_converts_with_proof(tmp_path):
    done = call_script(
        "convert_checkpoint.py", "--config", "recipes/quickstart/convert.yaml", "--output_dir", tmp_path / "b"
    )
    assert "arg max equal at 100.00%" in done.stdout


def test_the_shipped_records_are_small_and_hold_both_endings():
    file = EXAMPLES / "tales.txt.gz"
    assert file.stat().st_size <= 1_500_000
    examples = load_task("topic_ending").examples
    made = [examples(record, random.Random(0)) for record in load_source("tinystories_instruct").records(str(file))]
    endings = [example["ending"] for (example,) in made]
    assert (endings.count("happy"), endings.count("sad")) == (2000, 1600)


def test_two_endings_are_varied_and_nearly_half_in_pairs():
    file = EXAMPLES / "two_endings.txt.gz"
    assert file.stat().st_size <= 1_500_000
    make = load_task("topic_ending").examples
    records = list(load_source("tinystories_instruct").records(str(file)))
    rows = [row for record in records for row in make(record, random.Random(0))]
    endings_of, last = {}, {"happy": Counter(), "sad": Counter()}
    for row in rows:
        endings_of.setdefault(row["group"], []).append(row["ending"])
        last[row["ending"]][tuple(sentences(last_sentences(row["messages"][-1]["content"]))[-1].split()[:3])] += 1
    assert sum(sorted(endings) == ["happy", "sad"] for endings in endings_of.values()) >= 600
    for openings in last.values():
        assert openings.total() == 1360
        assert openings.most_common(1)[0][1] <= 0.02 * openings.total()


def test_the_hand_written_gpt_trains_goes_on_holds_out_and_samples(tmp_path):
    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt.gz"
    write_records(text, 40)
    first = text.read_text(encoding="utf-8").split("<|endoftext|>")[0]
    held_out.write_bytes(gzip.compress(first.encode()))
    short = ("--text", text, "--minutes", 0.001, "--batch_size", 1)
    shape = ("--emb_dim", 32, "--n_heads", 2, "--n_layers", 1)  # the default takes seconds to sample from
    done = fork_script("examples/scratch_gpt.py", "train", *short, *shape, "--hold_out", held_out, "--out", tmp_path)
    assert "39 documents, " in done.stdout
    weights = (tmp_path / "checkpoint.pt").read_bytes()
    again = ("--start_from", tmp_path, "--out", tmp_path / "on", "--length", 64)
    fork_script("examples/scratch_gpt.py", "train", *short, *again)
    assert (tmp_path / "on" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert (tmp_path / "on" / "checkpoint.pt").read_bytes() != weights
    sampled = fork_script("examples/scratch_gpt.py", "sample", "--checkpoint", tmp_path, "--prompt", "Lily had")
    assert sampled.stdout.startswith("Lily had")


@pytest.mark.parametrize("length", [1, 7, 16])
def test_the_hand_written_gpt_is_causal(length):
    torch.manual_seed(0)
    model = load_scratch_gpt().ScratchGPT(vocab_size=50, context_length=16, emb_dim=24, n_heads=3, n_layers=2)
    ids = torch.randint(50, (1, 16))
    torch.testing.assert_close(model(ids)[:, :length], model(ids[:, :length]))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_the_notebook_alone_fetches_the_repository_and_what_it_needs(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    (setup,) = ("".join(cell["source"]) for cell in cells if "setup" in cell["metadata"].get("tags", ()))
    assert "https://github.com/YOUR-NAME/fledge" in setup
    program = setup.replace("https://github.com/YOUR-NAME/fledge", ROOT.as_uri()) + '\nprint(*sorted(os.listdir(".")))'
    # pip checks that everything is to be had, and installs nothing.
    pip = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | pip, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"scratch_gpt", "tales.txt.gz"} <= set(done.stdout.split())
