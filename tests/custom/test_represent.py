"""A canonical GPT becomes a class of transformers where one holds it, and gets code of its own where none does."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from any_gpts import any_gpts
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM

from fledge.checkpoints.custom import represent
from fledge.checkpoints.proof import probes_of, prove_exact, prove_greedy
from fledge.custom import FledgeGPTConfig
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # architectures are drawn at random

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
few = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@few
@given(any_gpts())
def test_every_architecture_is_held_and_proven(gpt):
    config, weights, folds = represent(gpt, TOKEN_IDS, "auto", True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prove_exact(probes_of(gpt), model, weights, folds)
    model.load_state_dict({name: x.float().contiguous() for name, x in weights.items()}, assign=True, strict=False)
    model.tie_weights()
    prove_greedy(gpt, model, new_tokens=3)


@few
@given(any_gpts())
def test_the_refusal_names_the_flag_and_a_class_comes_first(gpt):
    config = represent(gpt, TOKEN_IDS, "auto", True)[0]
    if not isinstance(config, FledgeGPTConfig):
        assert type(represent(gpt, TOKEN_IDS, "auto", False)[0]) is type(config)
        return
    with pytest.raises(UserError, match=r"No class .* has no .*--allow_custom_code writes it exactly"):
        represent(gpt, TOKEN_IDS, "auto", False)
    with pytest.raises(UserError, match="--target gpt2 cannot hold"):
        represent(gpt, TOKEN_IDS, "gpt2", True)


@settings(few, max_examples=5)
@given(any_gpts())
def test_what_looks_ahead_or_has_uneven_blocks_is_refused_with_the_reason(gpt):
    with pytest.raises(UserError, match="causal mask"):
        represent(replace(gpt, causal=False), TOKEN_IDS, "auto", True)
    tensors = dict(gpt.tensors)
    tensors["blocks.1.query.bias"] = torch.zeros(len(tensors["blocks.1.query.weight"]))
    tensors.pop("blocks.0.query.bias", None)
    uneven = replace(gpt, tensors=tensors, norm="rmsnorm", embedding_norm=True, attention_cap=2.0, alibi=True)
    with pytest.raises(UserError, match=r"Block 1 has another query.bias"):
        represent(uneven, TOKEN_IDS, "auto", True)
