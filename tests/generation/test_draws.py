import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fledge.generation.draws import BLOCK, choose, draw, find, largest, likeliest, likely
from fledge.sampling import Sampling

SIZES = [5, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17]


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 5, 300, 10**6])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_what_a_draw_may_give_is_what_transformers_allows(top_p, top_k, spread):
    logits = spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(top_k or 5000), TopPLogitsWarper(top_p)]
    )
    expected = warpers(None, logits.clone()).softmax(-1)
    probabilities, ids = likely(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p))
    shares = (probabilities / probabilities.sum(-1, keepdim=True)).float()
    found = torch.zeros_like(logits).scatter(-1, ids, shares)
    # One token at the edge of the nucleus may fall to either side by rounding.
    assert ((found > 0) != (expected > 0)).sum(-1).max() <= 1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_draws_follow_the_softmax(size, limits):
    """Chi-square over 20,000 draws, with the tokens that are expected less than ten times taken together."""
    sampling = Sampling(temperature=0.7, **{"top_p": 1.0, **limits})
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    probabilities, ids = likely(logits, sampling)
    expected = torch.zeros(size, dtype=torch.float64).scatter(0, ids[0], probabilities[0])
    expected = 20_000 * expected / expected.sum()
    generators = [np.random.default_rng([7, size, i]) for i in range(200)]
    drawn = [
        token for _ in range(100) for token in choose(logits.expand(200, -1).clone(), [[]] * 200, generators, sampling)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=size).double()
    rare = expected < 10
    assert not counts[expected == 0].any()
    together = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    observed, wanted = (x if rare.any() and expected[rare].sum() > 0 else x[:-1] for x in together)
    assert len(wanted) > 1
    assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_the_inverse_of_the_cumulative_probabilities(size):
    probabilities = torch.rand(1, size, generator=torch.Generator().manual_seed(size)).softmax(-1)
    probabilities[:, 1:3] = 0
    drawn = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    found = draw(probabilities.expand(len(drawn), -1), drawn)
    sums = probabilities[0].double().cumsum(-1)
    exact = torch.searchsorted(sums, drawn * sums[-1], right=True)
    assert (found != exact).double().mean() < 0.002  # sums of blocks are rounded to float32
    assert (found - exact).abs().max() <= 3
    assert not ((found == 1) | (found == 2)).any()


def test_nothing_without_weight_is_found():
    weights = torch.tensor([[0.0, 0.0, 3.0, 0.0, 1.0, 0.0]], dtype=torch.float64).expand(4, -1)
    places, into = find(weights, torch.tensor([0.0, 0.375, 0.875, 1.0], dtype=torch.float64))
    assert places.tolist() == [2, 2, 4, 4]
    torch.testing.assert_close(into, torch.tensor([0, 0.5, 0.5, 1], dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 6, 40])
def test_the_largest_are_those_of_topk(size, n):
    values = torch.randn(4, size, generator=torch.Generator().manual_seed(n))
    top, places = largest(values, n)
    torch.testing.assert_close(top, values.topk(min(n, size)).values)
    torch.testing.assert_close(values.gather(-1, places), top)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_several_likeliest_is_taken(size):
    logits = torch.randint(0, 4, (50, size), generator=torch.Generator().manual_seed(size)).float()
    assert torch.equal(likeliest(logits), logits.argmax(-1))
