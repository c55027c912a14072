"""Folders as the authors of well-known code bases leave them: weights, a config of their own, a tokenizer."""

import json
import pickle

import nanochat_2026
import pytest
import tiktoken
import torch
import yaml
from families import CONTEXT, FAMILIES, HEAD, HEADS, KEY_HEADS, LAYERS, VOCAB, WIDTH

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.loading import load_checkpoint
from fledge.checkpoints.loading.configs import origins
from fledge.checkpoints.recognition import recognise
from fledge.tokenizers import load_tokenizer
from fledge.tokenizers.beside import find_beside

IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
LITGPT_CONFIG = {
    **{"name": "", "block_size": CONTEXT, "n_layer": LAYERS, "n_head": HEADS, "n_query_groups": KEY_HEADS},
    **{"n_embd": WIDTH, "head_size": HEAD, "rotary_percentage": 1.0, "rope_base": 10000, "rope_adjustments": None},
    **{"parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "norm_eps": 1e-5, "norm_qk": False},
    **{"mlp_class_name": "LLaMAMLP", "gelu_approximate": "none", "scale_embeddings": False},
    **{"sliding_window_size": None, "attention_logit_softcapping": None, "final_logit_softcapping": None},
}


def interleaved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """litgpt's until 2025: the queries of each group of heads, its key, its value, then those of the next group."""
    shared, found = HEADS // KEY_HEADS, {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            query, key, value = tensor.split([HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD])
            rows = []
            for group in range(KEY_HEADS):
                rows.append(query[group * shared * HEAD : (group + 1) * shared * HEAD])
                rows += [part[group * HEAD : (group + 1) * HEAD] for part in (key, value)]
            name, tensor = name.replace(".attn.qkv.", ".attn.attn."), torch.cat(rows)
        found[name] = tensor
    return found


@pytest.mark.parametrize("old", [False, True])
def test_litgpts_folder_leaves_no_question(old, tmp_path):
    family = FAMILIES["litgpt"]
    weights = family.weights()
    torch.save({"model": interleaved(weights) if old else weights}, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(LITGPT_CONFIG))
    gpt, facts = recognise(load_checkpoint(str(tmp_path)))
    assert not [str(fact) for fact in facts if fact.assumed]
    assert (canonical_logits(gpt, IDS) - family.logits(weights, IDS)).abs().max() < 1e-9
    eps = next(fact for fact in facts if fact.name == "norm_eps")
    assert eps.detail == "norm_eps, model_config.yaml"


@pytest.mark.parametrize(
    ("changed", "fact", "value"),
    [
        ({"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh"}, "activation", "gelu_tanh"),
        ({"rotary_percentage": 0.25}, "rope_width", 2),
        ({"scale_embeddings": True}, "embedding_scale", WIDTH**0.5),
        ({"attention_logit_softcapping": 50.0}, "attention_cap", 50.0),
        ({"final_logit_softcapping": 30.0}, "logit_cap", 30.0),
        ({"attention_scores_scalar": 4}, "attention_scale", 0.5),
        ({"name": "Gemma-2b"}, "norm_offset", 1.0),
        ({"norm_eps": 1e-6}, "norm_eps", 1e-6),
    ],
)
def test_what_litgpts_config_says_is_read(changed, fact, value, tmp_path):
    torch.save(FAMILIES["litgpt"].weights(), tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(LITGPT_CONFIG | changed))
    gpt, _ = recognise(load_checkpoint(str(tmp_path / "lit_model.pth")))
    assert getattr(gpt, fact) == value


def test_linguas_folder_leaves_no_question(tmp_path):
    family = FAMILIES["lingua"]
    torch.save({"model": family.weights()}, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps({"name": "mine", "model": dict(family.config)}))
    gpt, facts = recognise(load_checkpoint(str(tmp_path)))
    assert not [str(fact) for fact in facts if fact.assumed]
    assert (canonical_logits(gpt, IDS) - family.logits(family.weights(), IDS)).abs().max() < 1e-9


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("name", ["minimind", "minimind of experts"])
def test_minimind_is_known_with_and_without_its_prefix(name, prefix, tmp_path):
    family = FAMILIES[name]
    weights = {key.replace("model.", prefix): tensor for key, tensor in family.weights().items()}
    torch.save(weights, tmp_path / "pretrain_512.pth")
    (tmp_path / "config.json").write_text(json.dumps(dict(family.config)))
    gpt, facts = recognise(load_checkpoint(str(tmp_path)))
    assert facts[0].value == "minimind"
    assert (canonical_logits(gpt, IDS) - family.logits(family.weights(), IDS)).abs().max() < 1e-9


def test_nanochats_folder_leaves_no_question_and_has_its_tokenizer(tmp_path):
    module = nanochat_2026.random_gpt().float()
    torch.save({f"_orig_mod.{name}": x for name, x in module.state_dict().items()}, tmp_path / "model_000200.pt")
    torch.save([{"state": {}}], tmp_path / "optim_000200_rank0.pt")
    torch.save(torch.ones(nanochat_2026.VOCAB), tmp_path / "token_bytes.pt")
    meta = {"step": 200, "val_bpb": 1.0, "model_config": nanochat_2026.CONFIG}
    (tmp_path / "meta_000200.json").write_text(json.dumps(meta))
    letters = [bytes([65 + i]) for i in range(40)]
    ranks = {token: i for i, token in enumerate([*letters, b"AB", b"ABC"])}
    special = {"<|bos|>": 42, "<|user_start|>": 43}
    encoding = tiktoken.Encoding("rustbpe", pat_str=r"[A-Z]+", mergeable_ranks=ranks, special_tokens=special)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    checkpoint = load_checkpoint(str(tmp_path))
    gpt, facts = recognise(checkpoint)
    assert (facts[0].value, gpt.n_layer) == ("nanochat_2026", 4)
    assert not [str(fact) for fact in facts if fact.assumed]
    assert next(fact for fact in facts if fact.name == "n_head").source == "tensors"  # the gates of values show it
    found, is_guess = find_beside(str(tmp_path / "model_000200.pt"), gpt.vocab_size)
    assert (found, is_guess) == (str(tmp_path / "tokenizer.pkl"), False)
    tokenizer = load_tokenizer(found, 16)
    assert tokenizer("ABCBA<|bos|>")["input_ids"] == encoding.encode("ABCBA<|bos|>", allowed_special="all")
    assert tokenizer.eos_token == "<|bos|>"


def test_a_value_of_a_pickled_module_is_not_called_its_config():
    levels = [{"config": {"n_head": 4}, "state_dict": {}}]
    assert origins(levels, ("config",), pickled=True)["n_head"] == "attribute of the pickled module"
    assert origins(levels, ("config",), pickled=False)["n_head"] == "config in the file"
