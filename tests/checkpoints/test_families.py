import pytest
import torch
from families import CONTEXT, FAMILIES, VOCAB
from random_gpts import empty

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.loading import load_checkpoint
from fledge.checkpoints.proof import prove_exact
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.targets import to_target

IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


def opened(file, family, **config):
    torch.save({"model": family.weights(), "config": dict(family.config) | config}, file)
    return load_checkpoint(str(file))


@pytest.mark.parametrize("name", FAMILIES)
def test_known_family_is_recognised_and_held_exactly(name, tmp_path):
    family = FAMILIES[name]
    expected = family.logits(family.weights(), IDS)
    gpt, facts = recognise(opened(tmp_path / "model.pt", family))
    assert facts[0].value == family.layout
    assert {fact.name: fact.value for fact in facts if fact.assumed} == family.asked
    assert (canonical_logits(gpt, IDS) - expected).abs().max() <= 1e-9
    config, weights, folds = to_target(gpt, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    assert config.model_type == family.target
    assert prove_exact([(IDS, expected)], empty(config), weights, folds) <= 1e-6


def test_shares_of_experts_are_renormalised_as_the_config_says(tmp_path):
    gpt, _ = recognise(opened(tmp_path / "model.pt", FAMILIES["minimind of experts"], norm_topk_prob=False))
    assert not gpt.renormalise_experts


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("minimind", {"rope_scaling": {"type": "yarn", "factor": 16}}),
        ("nanochat", {"window_pattern": "SSSL"}),
        ("litgpt", {"sliding_window_size": 8}),
    ],
)
def test_config_that_says_more_than_the_layout_settles_nothing_by_name(name, entry, tmp_path):
    facts = recognise(opened(tmp_path / "model.pt", FAMILIES[name], **entry))[1]
    assert {"causal", "attention_scale"} <= {fact.name for fact in facts if fact.assumed}
