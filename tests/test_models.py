"""A damaged model is refused in one sentence, whichever script opens it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_for_gpus
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small import MODELS, small_gpt2, small_tokenizer

from fledge.cli import read_json
from fledge.errors import UserError
from fledge.models import context_of, load_model, open_model
from fledge.scripts import evaluate_model, export, generate, train_sft, trim_vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    small_gpt2().save_pretrained(folder)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def change_weights(folder: Path, change) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fill_a_bias(folder: Path, value: float) -> None:
    change_weights(folder, lambda held: held | {"transformer.ln_f.bias": torch.full((24,), value)})


def change_config(folder: Path, **changes) -> None:
    config = read_json(folder / "config.json", "nothing") | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def become_an_adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    get_peft_model(small_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(folder)


DAMAGES = {
    "a block removed": (
        lambda folder: change_weights(folder, lambda held: {k: v for k, v in held.items() if ".h.1." not in k}),
        r"lacks transformer\.h\.1\.attn\.c_attn\.bias, .* and 8 more",
    ),
    "more layers": (lambda folder: change_config(folder, n_layer=3), r"lacks transformer\.h\.2\."),
    "fewer layers": (lambda folder: change_config(folder, n_layer=1), r"no place for: transformer\.h\.1\."),
    "an untied head": (lambda folder: change_config(folder, tie_word_embeddings=False), r"lacks lm_head\.weight"),
    "another width": (lambda folder: change_config(folder, n_embd=32), r"\(72, not 96\)"),
    "fewer tokens": (lambda folder: change_config(folder, vocab_size=50), r"wte\.weight \(97 x 24, not 50 x 24\)"),
    "heads that do not divide": (lambda folder: change_config(folder, n_head=5), "no causal model that opens"),
    "a number for text": (lambda folder: change_config(folder, n_layer="two"), "no causal model that opens"),
    "no architecture": (lambda folder: change_config(folder, model_type="nothing"), "no causal model that opens"),
    "code of its own": (
        lambda folder: change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}),
        "needs code of its own",
    ),
    "cut weights": (lambda folder: cut_in_half(folder / "model.safetensors"), "no causal model that opens"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no causal model that opens"),
    "a cut config": (lambda folder: cut_in_half(folder / "config.json"), r"config\.json is damaged"),
    "a list for a config": (lambda folder: (folder / "config.json").write_text("[]"), "holds no mapping"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"it has no config\.json"),
    "NaN": (lambda folder: fill_a_bias(folder, torch.nan), r"holds NaN or infinity in transformer\.ln_f\.bias"),
    "an infinity": (lambda folder: fill_a_bias(folder, torch.inf), r"NaN or infinity in transformer\.ln_f\.bias"),
    "a larger tokenizer": (lambda folder: small_tokenizer(120).save_pretrained(folder), "120 tokens, .* rows for 97"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "a cut tokenizer": (lambda folder: cut_in_half(folder / "tokenizer.json"), "cannot be opened"),
    "an adapter": (become_an_adapter, "is a PEFT adapter, not a whole model; merge it into its base first"),
}  # fmt: skip
SCRIPTS = {
    "generate": (generate, ["--model", "{model}", "--prompt", "t5"]),
    "generate, compared": (generate, ["--model", "{sound}", "--compare", "{model}", "--prompt", "t5"]),
    "evaluate": (evaluate_model, ["--model", "{model}", "--capabilities"]),
    "evaluate, base": (evaluate_model, ["--model", "{sound}", "--base", "{model}", "--capabilities"]),
    "export": (export, ["--model", "{model}", "--to", "gguf", "--output_dir", "{out}"]),
    "trim": (trim_vocabulary, ["--model", "{model}", "--data", "{data}", "--output_dir", "{out}"]),
    "train": (
        train_sft,
        ["--model_name_or_path", "{model}", "--dataset", "{data}", "--output_dir", "{out}", "--use_cpu", "--bf16", "0"],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_one_sentence_in_every_script(damage, script, sound, model, tmp_path, monkeypatch):
    spoil, said = DAMAGES[damage]
    spoil(model)
    module, arguments = SCRIPTS[script]
    rows = (f'{{"instruction": "t3 t{number}", "response": "t5 t6"}}\n' for number in range(10, 19))
    (tmp_path / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    places = {"model": model, "sound": sound, "out": tmp_path / "out", "data": tmp_path / "data.jsonl"}
    monkeypatch.setattr(sys, "argv", ["script", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(UserError, match=said) as refused:
        module.main()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_torch_built_for_gpus_uses_the_cpu_of_a_machine_without_one(sound, monkeypatch):
    build_for_gpus(monkeypatch)
    model, _ = load_model(sound)
    assert model.device.type == "cpu"


@pytest.mark.parametrize("kind", MODELS)
def test_a_sound_model_opens_as_it_was_saved_in_one_file_or_many(kind, tmp_path):
    original = MODELS[kind]().eval()
    for folder, size in (("one", "1GB"), ("many", "10KB")):
        original.save_pretrained(tmp_path / folder, max_shard_size=size)
        opened = open_model(tmp_path / folder)
        ids = torch.arange(1, 30)[None]
        assert torch.equal(opened(ids).logits, original(ids).logits)
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(UserError, match="no causal model that opens"):
        open_model(tmp_path / "many")


def test_buffers_of_older_models_are_no_left_over_weights(model):
    old = {"masked_bias": torch.tensor(-1e4), "bias": torch.ones(1, 1, 40, 40)}
    change_weights(model, lambda held: held | {f"transformer.h.0.attn.{name}": mask for name, mask in old.items()})
    assert load_model(model)[0].num_parameters() == small_gpt2().num_parameters()


@pytest.mark.parametrize("content", ["[]", "3", "null", '"a"', '{"task": 3}', "{}"])
def test_a_record_of_another_type_is_one_sentence(content, model, monkeypatch):
    (model / "budget.json").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(model), "--prompt", "t5"])
    with pytest.raises(UserError, match=r"budget\.json is damaged"):
        generate.main()


def test_the_context_is_found_under_every_name_it_has():
    from transformers import BloomConfig, GPTNeoXConfig, MptConfig, OPTConfig

    assert context_of(OPTConfig(max_position_embeddings=12)) == 12
    assert context_of(GPTNeoXConfig(max_position_embeddings=12)) == 12
    assert context_of(MptConfig(max_seq_len=12)) == 12
    assert context_of(small_gpt2().config) == 40
    with pytest.raises(UserError, match="names no context length"):
        context_of(BloomConfig())
