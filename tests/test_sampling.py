import pytest
from transformers import GenerationConfig

from fledge.errors import UserError
from fledge.sampling import Sampling


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("max_new_tokens", (1, 10**6), (0, -1)),
        ("temperature", (0, 0.01, 50), (-0.01, float("nan"), float("inf"))),
        ("top_k", (0, 10**6), (-1,)),
        ("top_p", (0.001, 1), (0, 1.001)),
        ("repetition_penalty", (0.01, 50), (0, -1)),
        ("seed", (0, 2**32 - 1), (-1, 2**32)),
    ],
)
def test_each_key_takes_its_range_and_no_more(key, right, wrong):
    for value in right:
        Sampling(**{key: value}).check()
    for value in wrong:
        with pytest.raises(UserError, match=f"--{key} {value} is "):
            Sampling(**{key: value}).check()


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_transformers_is_told_the_same_draw(temperature):
    sampling = Sampling(temperature=temperature, top_k=7, top_p=0.9, repetition_penalty=1.3)
    config = GenerationConfig(**sampling.decoding())
    assert (config.do_sample, config.repetition_penalty) == (temperature > 0, 1.3)
    if temperature:
        assert (config.temperature, config.top_k, config.top_p) == (0.7, 7, 0.9)
