"""Fits of the loss surface: exact on exact data, the same in any order and unit, refused when they did not fit."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from experiments.scaling.parametric import (
    FitRefused,
    Surface,
    bootstrap,
    fit_huber,
    fit_projection,
    hoffmann_starts,
    huber_objective,
)

TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
FITS = [fit_huber, fit_projection]


def runs(noise=0.0, seed=0, points=15):
    flops = np.repeat(np.logspace(17, 21, 5), points)
    n = np.array([TRUE.optimum(c)[0] for c in flops]) * np.tile(np.geomspace(1 / 16, 16, points), 5)
    d = flops / 6 / n
    return n, d, TRUE.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))


def values(surface):
    return [surface.E, surface.A, surface.B, surface.alpha, surface.beta]


@pytest.mark.thorough
@pytest.mark.parametrize(("fit", "tolerance"), [(fit_projection, 1e-6), (fit_huber, 1e-4)])
def test_a_noise_free_surface_is_recovered(fit, tolerance):
    assert values(fit(*runs())) == pytest.approx(values(TRUE), rel=tolerance)


def test_the_analytic_gradient_is_that_of_the_objective():
    n, d, loss = runs(0.01)
    data, rng = (np.log(n), np.log(d), np.log(loss)), np.random.default_rng(0)
    weights = rng.integers(0, 3, len(n)).astype(float)
    for _ in range(5):
        p = np.array([6.0, 6.0, 0.5, 0.34, 0.28]) + rng.normal(0, [0.3, 0.3, 0.1, 0.02, 0.02])
        numeric = approx_fprime(p, lambda p: huber_objective(p, *data, weights)[0], 1e-8)
        assert huber_objective(p, *data, weights)[1] == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_the_objective_is_the_sum_over_runs_not_their_mean():
    data = [np.log(x) for x in runs(0.01)]
    p = np.array([6.0, 6.0, 0.5, 0.34, 0.28])
    once, _ = huber_objective(p, *data)
    assert huber_objective(p, *(np.tile(x, 3) for x in data))[0] == pytest.approx(3 * once)


@pytest.mark.thorough
@pytest.mark.parametrize("fit", FITS)
def test_order_and_units_do_not_change_a_fit(fit):
    n, d, loss = runs(0.01)
    base, order = fit(n, d, loss), np.random.default_rng(1).permutation(len(n))
    other = fit(n[order] / 1e6, d[order] / 1e9, loss[order])
    assert [other.E, other.alpha, other.beta] == pytest.approx([base.E, base.alpha, base.beta], rel=2e-4)
    assert other.A * 1e6**other.alpha == pytest.approx(base.A, rel=2e-3)
    assert fit(n, d, loss / np.log(2)).a == pytest.approx(base.a, abs=2e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("fit", FITS)
def test_a_weight_of_two_is_a_run_that_stands_twice(fit):
    n, d, loss = runs(0.01, points=6)
    weights = np.random.default_rng(0).integers(0, 3, len(n)).astype(float)
    doubled = [np.repeat(x, weights.astype(int)) for x in (n, d, loss)]
    assert fit(n, d, loss, weights=weights).a == pytest.approx(fit(*doubled).a, abs=5e-4)


def test_there_are_hoffmanns_4500_starts():
    starts = hoffmann_starts()
    assert len(np.unique(starts, axis=0)) == 4500
    assert starts.min(0).tolist() == [0, 0, -1, 0, 0] and starts.max(0).tolist() == [25, 25, 1, 2, 2]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([x[:7] for x in runs()], "too_few_points"),
        ([np.tile([1e6, 2e6], 10), np.geomspace(1e8, 1e10, 20), np.linspace(4, 3, 20)], "too_few_points"),
        # A loss that falls with D alone: nothing pins A and alpha.
        ([runs()[0], runs()[1], 2.0 + 500 * runs()[1] ** -0.3], "bound"),
    ],
)
def test_a_fit_that_the_data_cannot_pin_down_is_refused(fit, data, kind):
    with pytest.raises(FitRefused) as refused:
        fit(*data)
    assert refused.value.kind == kind


def test_parameters_that_never_left_their_start_are_refused():
    n, d, loss = runs()
    start = np.array([[np.log(TRUE.A), np.log(TRUE.B), np.log(TRUE.E), TRUE.alpha, TRUE.beta]])
    with pytest.raises(FitRefused, match="equal a start") as refused:
        fit_huber(n, d, loss, starts=start)
    assert refused.value.kind == "start"


def coverage(fit, warm, repeats, draws):
    hits = 0
    for seed in range(repeats):
        n, d, loss = runs(0.01, seed)
        point = fit(n, d, loss)
        drawn = bootstrap(point, lambda w: warm(n, d, loss, point, w), len(n), draws, seed)  # noqa: B023
        hits += TRUE.a in drawn.estimates.a
    return hits / repeats


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("repeats", "draws", "least"), [(10, 30, 0.7), pytest.param(200, 200, 0.88, marks=pytest.mark.slow)]
)
def test_bootstrap_intervals_cover_the_true_exponent(repeats, draws, least):
    def warm(n, d, loss, s, w):
        return fit_projection(n, d, loss, (s.alpha, s.beta), w)

    assert coverage(fit_projection, warm, repeats, draws) >= least
