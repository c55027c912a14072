"""Which readings of a model evidence tries."""

from itertools import chain

import pytest
import torch
from hand_written import build, checkpoint_of

from fledge.checkpoints.canonical import canonical_logits
from fledge.checkpoints.questions import Questions
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
