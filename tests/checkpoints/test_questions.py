"""Which readings of a model evidence tries."""

from itertools import chain

import pytest
import torch
from hand_written import build, checkpoint_of, stated

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.questions import Questions, settle_what_cannot_matter
from fledge.checkpoints.recognition import recognise


@pytest.mark.parametrize("variant", ["story_chat", "student"])
def test_every_reading_that_is_tried_can_be_run(variant):
    """Narrow heads among them, which RoPE of a part of a wide head would not fit."""
    module, _ = build(variant, width=64, heads=4)
    checkpoint = checkpoint_of(module, {"max_seq_len": 20})
    # Without a layout that is known, everything is open.
    names = {name: name.replace("ln_", "norm_").replace("mlp.", "feed.") for name in checkpoint.tensors}
    checkpoint.tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    questions = Questions(*recognise(checkpoint))
    ids = torch.arange(6)[None]
    for changes in chain(questions.singles(questions.now), questions.pairs(questions.now)):
        assert canonical_logits(questions.reading(questions.now | changes), ids).isfinite().all(), changes


def asked_of(variant: str, **told: object) -> Questions:
    return Questions(*recognise(checkpoint_of(*build(variant)), told=stated(**told)))


def test_changes_that_cannot_be_or_change_nothing_are_not_tried():
    questions = asked_of("student", n_head=24)  # heads of width 1, whose usual scale is 1
    changes = questions.singles(questions.now) + questions.pairs(questions.now)
    tried = [questions.now | change for change in changes]
    assert not any(values["parallel"] and values["norm_placement"] != "pre" for values in tried)
    scales = [change["attention_scale"] for change in changes if change.keys() == {"attention_scale"}]
    assert scales == ["width"]


def test_only_assumed_facts_change_in_pairs():
    questions = asked_of("nanogpt", activation="gelu")
    assert "activation" not in questions.choices
    assert not questions.open
    assert questions.singles(questions.now)
    assert not questions.pairs(questions.now)


def test_assumed_facts_name_their_rivals_one_by_one():
    gpt, facts = recognise(checkpoint_of(*build("student")))
    rivals = settle_what_cannot_matter(gpt, facts)
    assert rivals.keys() == {fact.name for fact in facts if fact.assumed}
    assert set(rivals["norm_placement"]) == {"post", "sublayer", "replace"}
    assert set(rivals["parallel"]) == {True}
