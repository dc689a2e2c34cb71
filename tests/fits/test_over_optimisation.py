"""The laws of over-optimisation: planted curves are found again, peaks are where the curves are highest, and intervals
hold the truth as often as they say."""

import math

import numpy as np
import pytest

from experiments.fits.over_optimisation import coefficients, explained, fit_law, peak, reward_at

LAWS = ["best_of_n", "rl"]
D = np.linspace(0, 5, 11)
TRUTH = {"best_of_n": (0.3, 0.05), "rl": (0.3, 0.2)}


def planted(law, random, curves):
    """Curves of proxies whose coefficients lie around the truth, at distances of their own."""
    found = []
    for _ in range(curves):
        alpha, beta = np.array(TRUTH[law]) * random.normal(1, 0.15, 2)
        d = D * random.uniform(0.8, 1.2)
        found.append((d, reward_at(law, d, alpha, beta) + random.normal(0, 0.02, len(d)) * (d > 0)))
    return found


@pytest.mark.parametrize("law", LAWS)
def test_a_planted_curve_is_found_again(law):
    curve = D, reward_at(law, D, *TRUTH[law])
    assert curve[1][0] == 0
    assert coefficients(law, [curve]) == pytest.approx(TRUTH[law], rel=1e-10)
    assert explained(law, curve) == pytest.approx(1)
    other = LAWS[1 - LAWS.index(law)]
    assert explained(other, curve) < 0.999


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_the_peak_is_where_the_curve_is_highest(law, alpha):
    d = np.linspace(0, 20, 200_001)
    highest = d[reward_at(law, d, alpha, 0.2).argmax()]
    assert float(peak(law, alpha, 0.2)) == pytest.approx(highest, abs=2e-4)


@pytest.mark.parametrize("law", LAWS)
def test_a_curve_that_only_rises_has_no_peak_and_one_that_only_falls_has_it_at_the_start(law):
    assert math.isinf(peak(law, 0.3, 0.0)) and math.isinf(peak(law, 0.3, -0.1))
    assert float(peak(law, -3.0, 0.2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("curves", [9, 12])
@pytest.mark.parametrize("law", LAWS)
def test_intervals_over_curves_hold_the_truth_as_often_as_they_say(law, curves):
    truth = {"alpha": TRUTH[law][0], "beta": TRUTH[law][1], "peak": float(peak(law, *TRUTH[law]))}
    held = dict.fromkeys(truth, 0)
    for seed in range(400):
        fit = fit_law(law, planted(law, np.random.default_rng(seed), curves), resamples=300, seed=seed)
        for name, value in truth.items():
            held[name] += value in getattr(fit, name)
    assert all(0.91 <= number / 400 <= 0.985 for number in held.values()), held


@pytest.mark.parametrize("law", LAWS)
def test_too_little_to_fit_is_refused(law):
    with pytest.raises(ValueError, match="1 curves are too few for an interval over curves"):
        fit_law(law, [(D, D)])
    with pytest.raises(ValueError, match="do not tell alpha from beta"):
        coefficients(law, [(np.array([0.0, 2.0]), np.array([0.0, 1.0]))])
