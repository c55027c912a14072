"""nanochat as it is since March 2026: known by its names, recovered from a module, and each of its facts matters."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import nanochat_2026
import pytest
import torch
from accelerate import init_empty_weights
from hand_written import checkpoint_of
from transformers import AutoModelForCausalLM

from fledge.checkpoints.author.reference import load_reference
from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.custom import represent
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.facts import Status
from fledge.checkpoints.proof import probes_of, prove_exact
from fledge.checkpoints.recognition import fit_vocabulary, recognise
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each flipped fact is searched for

IDS = torch.randint(nanochat_2026.VOCAB, (2, nanochat_2026.CONTEXT), generator=torch.Generator().manual_seed(1))
FLIPPED = {
    "attention_scale": 12**-0.5, "window": None, "window_pattern": None, "backout_layer": 1, "value_gate_factor": 2.0,
    "rope_direction": 1, "rope_theta": 10_000.0, "logit_cap": 20.0, "qk_norm_after_rope": False, "activation": "gelu",
    "embedding_norm": False, "norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def own():
    model = nanochat_2026.random_gpt()
    with torch.no_grad():
        logits = model.double()(IDS)
    return model, logits, checkpoint_of(model.float(), nanochat_2026.CONFIG)


def test_its_names_and_config_say_all_that_it_computes(own):
    _, logits, checkpoint = own
    gpt, facts = recognise(checkpoint)
    assert not [str(fact) for fact in facts if fact.assumed]
    assert (canonical_logits(gpt, IDS) - logits).abs().max() < 1e-9
    assert (gpt.window, gpt.window_pattern, gpt.backout_layer) == (129, "SSSL", 2)


def test_without_its_config_everything_that_no_tensor_shows_is_assumed(own):
    module, _, _ = own
    _, facts = recognise(checkpoint_of(module, {"n_head": 4, "sequence_len": nanochat_2026.CONTEXT}))
    assert {"attention_scale", "window", "rope_theta", "logit_cap"} <= {fact.name for fact in facts if fact.assumed}


@pytest.mark.parametrize("name", FLIPPED)
def test_the_authors_module_recovers_each_fact_that_was_read_otherwise(own, name):
    _, logits, checkpoint = own
    gpt, facts = recognise(checkpoint)
    wrong = replace(gpt, **{name: FLIPPED[name]})
    assert canonical_logits(wrong, IDS).ne(logits).any()
    for fact in facts:
        if fact.name == name:
            fact.value, fact.status = FLIPPED[name], Status.ASSUMED
    found, _ = settle_by_reference(wrong, facts, functools.partial(canonical_logits, gpt))
    assert getattr(found, name) == getattr(gpt, name)


def test_reference_proves_it_from_the_code_in_a_folder(own, tmp_path):
    checkpoint = own[2]
    (tmp_path / "gpt.py").write_text(Path(nanochat_2026.__file__).read_text())
    gpt, facts = recognise(checkpoint)
    author = load_reference(str(tmp_path), None, checkpoint)
    assert settle_by_reference(gpt, facts, author, author.avoid, author.tolerance)[1] < 1e-9
    assert json.dumps([fact.source for fact in facts]).count("--reference") > 10


def test_custom_code_holds_it_and_padding_is_cut_in_value_embeddings(own):
    gpt = recognise(own[2])[0]
    gpt, _ = fit_vocabulary(gpt, 60, "tokenizer")
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with pytest.raises(UserError, match=r"no value embeddings.*--allow_custom_code"):
        represent(gpt, token_ids, "auto", False)
    config, weights, folds = represent(gpt, token_ids, "auto", True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prove_exact(probes_of(gpt), model, weights, folds)


def test_value_embeddings_that_several_layers_share_are_refused(own):
    """modded-nanogpt numbers the embeddings, and not the layers."""
    checkpoint = own[2]
    tensors = {name: x for name, x in checkpoint.tensors.items() if "ve_gate" not in name}
    with pytest.raises(UserError, match="known by nanochat's names alone"):
        recognise(replace(checkpoint, tensors=tensors))
