"""Models by their Hub id, from a Hub on loopback; and what is missing, said before torch is imported."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, run_script
from hub import Hub, Repository
from processes import fork_script
from small import BYTE_LEVEL_SIZE, byte_level
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = [pytest.mark.slow, pytest.mark.network]

MISSING = {
    "generate.py": ["--model", "{}", "--prompt", "x"],
    "evaluate_model.py": ["--model", "{}", "--capabilities"],
    "export.py": ["--model", "{}", "--to", "gguf", "--output_dir", "out"],
    "publish.py": ["--model", "{}", "--repo_id", "a/b", "--dry_run"],
    "trim_vocabulary.py": ["--model", "{}", "--data", "x", "--output_dir", "out"],
    "train_sft.py": ["--model_name_or_path", "{}", "--dataset", "x", "--output_dir", "out"],
    "pretrain.py": ["--tokenizer", "{}", "--data", "x", "--output_dir", "out"],
}

EVERY_SCRIPT = """
import runpy, sys
for line in open(sys.argv[1]).read().splitlines():
    sys.argv = line.split()
    try:
        runpy.run_path(f"{sys.argv[0]}.py", run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, line
"""


IN_TURN = """
import contextlib, io, json, runpy, sys
told = []
for given in json.load(open(sys.argv[1])):
    sys.argv = given
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_path(given[0], run_name="__main__")
        except SystemExit as stopped:
            told.append([stopped.code, said.getvalue()])
print(json.dumps(told))
"""


def test_a_missing_model_is_told_before_torch_is_imported(tmp_path):
    """By each script, in one process that has not imported torch and cannot."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    scripts = [script for script in MISSING if script != "export.py" or find_spec("gguf")]
    asked = [(script, "nobody/nothing") for script in scripts] + [("generate.py", "./nowhere"), ("pretrain.py", "no")]
    commands = [[script, *(argument.format(name) for argument in MISSING[script])] for script, name in asked]
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    done = run_script("-c", IN_TURN, tmp_path / "commands.json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    for (script, name), (status, said) in zip(asked, json.loads(done.stdout), strict=True):
        assert status == 2, (script, said)
        assert f"at {name}: " in said, script
        assert len(said.strip().splitlines()) == 1, script


@pytest.fixture
def hub(tmp_path):
    """Two models: one as it is saved today, one as it was years ago, with a file for another program beside it."""
    server = Hub()
    for name, old in (("new", False), ("old", True)):
        folder = tmp_path / name
        shape = GPT2Config(vocab_size=BYTE_LEVEL_SIZE, n_positions=512, n_embd=32, n_layer=1, n_head=4, eos_token_id=0)
        model = GPT2LMHeadModel(shape)
        model.save_pretrained(folder)
        byte_level().save_pretrained(folder)
        if old:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"model.gguf": b"GGUF"}
        commit = "1" * 40
        server.repos["model", f"someone/{name}"] = Repository(False, refs={"main": commit}, trees={commit: files})
    yield server
    server.shutdown()
    server.server_close()


def test_every_script_takes_a_model_of_the_hub(hub, tmp_path):
    rows, out, prompts = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("t5\nt6\n", encoding="utf-8")
    table = "".join(f'{{"instruction": "t3 t{number}", "response": "t5 t6"}}\n' for number in range(10, 19))
    rows.write_text(table, encoding="utf-8")
    lines = [
        "generate --model someone/new --compare someone/old --prompt t5 --max_new_tokens 3",
        f"generate --model someone/new --prompts_file {prompts} --output_file {out}.jsonl --max_new_tokens 3",
        "evaluate_model --model someone/old --base someone/new --capabilities --max_new_tokens 3",
        f"train_sft --model_name_or_path someone/new --dataset {rows} --output_dir {out} --max_steps 1 --use_cpu",
        f"export --model someone/new --to gguf --name tales --output_dir {tmp_path / 'gguf'}",
    ]
    (tmp_path / "lines").write_text("\n".join(lines), encoding="utf-8")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": f"{tmp_path}/home"}
    (tmp_path / "driver.py").write_text(EVERY_SCRIPT, encoding="utf-8")
    fork_script(tmp_path / "driver.py", tmp_path / "lines", **online)
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert (out / "model.safetensors").exists()
    assert (tmp_path / "gguf" / "tales-f32.gguf").exists()
    assert not any("model.gguf" in request for request in hub.requests)
    hub.shutdown()
    hub.server_close()
    again = fork_script("generate.py", "--model", "someone/new", "--prompt", "t5", **online | {"HF_HUB_OFFLINE": "1"})
    assert again.stdout.strip()
