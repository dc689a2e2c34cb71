"""The best of n, by enumeration on a language of 27 sequences some of which have the same proxy reward."""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments.enumeration import SEQUENCES, generator, rewards
from experiments.studies.best_of_n import divergence, expected_best

P = torch.randn(len(SEQUENCES), generator=generator(), dtype=torch.float64).softmax(0).numpy()
GOLD = rewards().numpy()
APART = rewards(seed=2).numpy()
TIED = np.round(APART)  # on five levels


def best_of(n, proxy):
    """The probability of each sequence to be the best of n, exactly: the first among those drawn of the highest level
    is as good as any."""
    found = np.zeros_like(P)
    for level in np.unique(proxy):
        here, upto = proxy == level, P[proxy <= level].sum()
        found[here] = P[here] / P[here].sum() * (upto**n - (upto - P[here].sum()) ** n)
    return found


def kl(p, q):
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("proxy", [APART, TIED], ids=["apart", "tied"])
def test_the_best_of_two_is_what_all_pairs_of_draws_say(proxy):
    found = np.zeros_like(P)
    for i, j in itertools.product(range(len(P)), repeat=2):
        for k, share in ((i, 1.0), (j, 0.0)) if proxy[i] > proxy[j] else ((i, 0.0), (j, 1.0)):
            found[k] += P[i] * P[j] * (0.5 if proxy[i] == proxy[j] else share)
    assert found == pytest.approx(best_of(2, proxy), abs=1e-15)


@pytest.mark.parametrize("proxy", [APART, TIED], ids=["apart", "tied"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_estimate_is_right_in_the_mean_over_all_pools(n, proxy):
    mean = {"gold": 0.0, "proxy": 0.0}
    for pool in itertools.combinations_with_replacement(range(len(P)), 3):
        index = list(pool)
        orders = math.factorial(3) // math.prod(math.factorial(pool.count(i)) for i in set(pool))
        for name, values in (("gold", GOLD), ("proxy", proxy)):
            mean[name] += orders * P[index].prod() * expected_best(n, proxy[index], values[index])
    assert mean["gold"] == pytest.approx(best_of(n, proxy) @ GOLD, abs=1e-12)
    assert mean["proxy"] == pytest.approx(best_of(n, proxy) @ proxy, abs=1e-12)


def test_the_best_of_one_is_the_mean_and_that_of_all_the_highest():
    assert expected_best(1, APART, GOLD) == pytest.approx(GOLD.mean())
    assert expected_best(len(P), APART, GOLD) == pytest.approx(GOLD[APART.argmax()])
    with pytest.raises(ValueError, match="n=28 must be from 1 to the 27 answers"):
        expected_best(28, APART, GOLD)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 1024])
def test_the_divergence_is_an_upper_bound_which_ties_make_looser(n):
    bound, exact, tied = divergence(n), *(kl(best_of(n, proxy) + 1e-300, P) for proxy in (APART, TIED))
    assert tied <= exact + 1e-12 and exact <= bound + 1e-12
    if n > 1:
        assert tied < 0.97 * exact < 0.97 * bound


@pytest.mark.parametrize("n", [2, 16, 64])
def test_it_is_the_divergence_itself_where_no_answer_has_a_share_of_its_own(n):
    M = 100_000
    upto = np.arange(M + 1) / M
    p = np.diff(upto**n)
    assert kl(p + 1e-300, 1 / M) == pytest.approx(divergence(n), rel=1e-4)
