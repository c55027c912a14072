"""A GPT that no class of transformers holds: converted, trained, asked, measured, published, opened by strangers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call_script
from processes import fork_script
from torch import nn
from transformers import AutoTokenizer

from fledge.custom import FILES, check_custom_code
from fledge.errors import UserError

pytestmark = pytest.mark.slow


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.w2(nn.functional.silu(self.w1(h)) * self.w3(h))


class LearnedPositionsWithRMSNorm(nn.Module):
    """LLaMA's blocks behind GPT-2's table of positions."""

    def __init__(self, vocab_size: int, width: int = 32, context: int = 128, heads: int = 4, layers: int = 2):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


FACTS = {"n_head": 4, "norm": "rmsnorm", "norm_eps": 1e-5, "activation": "silu", "attention_scale": 8**-0.5}


@pytest.fixture(scope="module")
def custom(tiny, tmp_path_factory) -> SimpleNamespace:
    """Folders `base` and `model` with code of their own, and the author's `module`; `given` converts its checkpoint."""
    work = tmp_path_factory.mktemp("custom")
    torch.manual_seed(0)
    module = LearnedPositionsWithRMSNorm(len(AutoTokenizer.from_pretrained(tiny.base))).eval()
    torch.save(module.state_dict(), work / "model.pt")
    (work / "facts.yaml").write_text("".join(f"{name}: {value}\n" for name, value in FACTS.items()))
    given = ["--checkpoint", work / "model.pt", "--tokenizer", tiny.tokenizer_file, "--mapping", work / "facts.yaml"]
    converted = call_script(
        "convert_checkpoint.py", *given, "--allow_custom_code", "--accept_assumptions", "--output_dir", work / "base"
    )  # fmt: skip
    call_script(
        "train_sft.py", "--model_name_or_path", work / "base", "--dataset", tiny.data, "--output_dir", work / "model",
        "--num_train_epochs", 2, "--learning_rate", 0.01, "--per_device_train_batch_size", 8, "--use_cpu",
    )  # fmt: skip
    return SimpleNamespace(
        base=work / "base", model=work / "model", module=module, given=given, converted=converted.stdout, work=work
    )


def test_without_the_flag_the_refusal_names_it_and_nothing_is_written(custom, tmp_path):
    done = call_script(
        "convert_checkpoint.py", *custom.given, "--accept_assumptions", "--output_dir", tmp_path / "base", check=False
    )
    assert done.returncode == 2
    assert "--allow_custom_code" in done.stderr
    assert not (tmp_path / "base").exists()


def test_the_record_says_whose_code_it_is_and_why(custom):
    record = json.loads((custom.base / "conversion.json").read_text())
    assert record["target"] == "FledgeGPTForCausalLM"
    assert sorted(record["custom_code"]) == [file.name for file in FILES]
    assert any("code of its own" in fold for fold in record["folds"])
    assert "trust_remote_code=True" in custom.converted


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, pipeline
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("it opened without being trusted")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
answers = writer(["Once upon", "The dog was lazy and"], batch_size=2, max_new_tokens=4, do_sample=False)
alone = writer("Once upon", max_new_tokens=4, do_sample=False)
assert answers[0][0]["generated_text"] == alone[0]["generated_text"]
assert "fledge" not in sys.modules
"""


def test_a_stranger_opens_it_by_transformers_alone(custom, tmp_path):
    fork_script("-c", STRANGER, custom.base, tmp_path / "logits.pt", folder=tmp_path)
    with torch.no_grad():
        expected = custom.module(torch.arange(24).reshape(2, 12))
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_training_saves_the_files_with_the_model_and_improves_it(custom):
    assert check_custom_code(custom.model)
    losses = [json.loads(line) for line in (custom.model / "training_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]


def test_it_answers_is_measured_and_is_published_with_its_code(custom, tiny, tmp_path):
    answered = call_script(
        "generate.py", "--model", custom.model, "--prompt", "Tell me a story.", "--max_new_tokens", 5
    )
    assert answered.stdout.strip()
    call_script(
        "evaluate_model.py", "--model", custom.model, "--base", custom.base, "--dataset", tiny.data,
        "--output_dir", tmp_path / "evaluation", "--max_new_tokens", 10, "--num_prompts", 8, "--batch_size", 4,
    )  # fmt: skip
    call_script(
        "publish.py", "--model", custom.model, "--evaluation", tmp_path / "evaluation", "--repo_id", "someone/tales",
        "--space_repo_id", "someone/demo", "--dry_run", "--output_dir", tmp_path / "repository",
    )  # fmt: skip
    published = tmp_path / "repository" / "model"
    assert all((published / file.name).read_bytes() == file.read_bytes() for file in FILES)
    card = (published / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    assert body.index("trust_remote_code=True") < body.index("## Use")
    assert body.count("trust_remote_code=True") == 3
    assert "custom_code" in card.split("---\n", 2)[1]
    settings = json.loads((tmp_path / "repository" / "space" / "settings.json").read_text())
    assert settings["trust_remote_code"] is True


def test_other_code_in_a_folder_is_never_run(custom, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(custom.base).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with (folder / FILES[1].name).open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="is not the file"):
        check_custom_code(folder)
    done = call_script("generate.py", "--model", folder, "--prompt", "Hello", "--max_new_tokens", 2, check=False)
    assert done.returncode == 2
    assert FILES[1].name in done.stderr
    assert not (tmp_path / "ran").exists()
