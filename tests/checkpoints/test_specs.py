"""What is drawn for the tests of layouts that nobody listed; test_structure.py compares what they compute."""

import pytest
from architectures import NAMINGS, specs
from hypothesis import find, settings


def test_naming_schemes_differ_in_more_than_one_word():
    assert len(NAMINGS) >= 12
    for one in NAMINGS:
        for other in NAMINGS:
            assert one is other or sum(a != b for a, b in zip(one, other, strict=True)) >= 5


@pytest.mark.parametrize(
    "alike",
    [
        lambda spec: spec.vocab_size == spec.context_length,
        lambda spec: spec.vocab_size == spec.width,
        lambda spec: spec.context_length == spec.width,
        lambda spec: spec.mlp_width == spec.width,
        lambda spec: spec.mlp_width == 3 * spec.width,
        lambda spec: spec.heads == 1 and spec.qkv == "per_head",
    ],
)
def test_sizes_that_make_tensors_look_alike_are_drawn(alike):
    assert alike(find(specs(), alike, settings=settings(derandomize=True, database=None)))
