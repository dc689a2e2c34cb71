"""Fits of the loss surface: exact on exact data, the same in any order and unit, refused where the data do not
determine it, with intervals that hold what they say."""

import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from experiments.fits.forms import FORMS, Surface
from experiments.fits.parametric import FitRefused, Problem, bootstrap, fit_law, project

TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
METHODS = ["huber", "squares"]


def runs(noise=0.0, seed=0, points=15, span=16.0, true=TRUE):
    flops = np.repeat(np.logspace(17, 21, 5), points)
    n = np.array([true.optimum(c)[0] for c in flops]) * np.tile(np.geomspace(1 / span, span, points), 5)
    d = flops / 6 / n
    loss = true.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss})


def fit(table, method="huber"):
    return fit_law(Problem(FORMS["chinchilla"], table, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("true", [TRUE, Surface(1.0, 2e5, 30.0, 0.8, 0.15), Surface(0.3, 20.0, 1e4, 0.15, 0.5)])
def test_a_planted_surface_is_recovered(true, method):
    assert asdict(fit(runs(true=true), method).surface) == pytest.approx(asdict(true), rel=1e-5)


def test_variable_projection_ends_at_the_least_squares_optimum():
    table = runs(0.01)
    problem = Problem(FORMS["chinchilla"], table, "squares")
    assert project(problem) == pytest.approx(fit(table, "squares").parameters, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimum_that_is_reached_from_itself_is_not_refused(method):
    found = fit(runs(0.01), method)
    again = found.problem.solve(found.parameters)
    assert again.converged.all() and again.parameters[0] == pytest.approx(found.parameters, abs=1e-6)


def test_the_objective_is_the_sum_over_runs_not_their_mean():
    table = runs(0.01)
    assert fit(pd.concat([table] * 3)).objective == pytest.approx(3 * fit(table).objective)


@pytest.mark.parametrize("method", METHODS)
def test_order_and_units_do_not_change_a_fit(method):
    table = runs(0.01)
    base = fit(table, method).surface
    mixed = table.sample(frac=1, random_state=1).assign(
        params=lambda t: t.params / 1e6, tokens=lambda t: t.tokens / 1e9
    )
    other = fit(mixed, method).surface
    assert [other.E, other.alpha, other.beta] == pytest.approx([base.E, base.alpha, base.beta], rel=2e-4)
    assert other.A * 1e6**other.alpha == pytest.approx(base.A, rel=2e-3)
    assert fit(table.assign(loss=table.loss / np.log(2)), method).surface.a == pytest.approx(base.a, abs=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_two_is_a_run_that_stands_twice(method):
    table = runs(0.01, points=6)
    found = fit(table, method)
    counts = np.random.default_rng(0).integers(0, 3, len(table))
    weighted = found.problem.solve(found.parameters, counts.astype(float)[None]).parameters[0]
    doubled = Problem(FORMS["chinchilla"], table.loc[table.index.repeat(counts)], method)
    exponents = fit_law(doubled).parameters[3:]
    assert weighted[3:] == pytest.approx(exponents, abs=1e-4)


def test_wild_runs_move_the_robust_fit_little():
    table = runs(0.002)
    wild = table.assign(loss=table.loss * np.where(np.arange(len(table)) % 15 == 7, 1.2, 1.0))
    assert fit(wild).surface.a == pytest.approx(fit(table).surface.a, abs=0.005)


@pytest.mark.parametrize("method", METHODS)
def test_a_law_without_a_floor_says_that_e_is_at_its_bound(method):
    table = runs(0.001, true=Surface(0.0, 406.4, 410.7, 0.34, 0.28))
    # Losses that fall ever faster would want a floor below zero.
    found = fit(table.assign(loss=table.loss - 0.2), method)
    assert found.at_bound == ("E",) and found.constants["E"] == 0
    drawn = bootstrap(found, 40, seed=0)
    assert drawn.draws_refused == 0 and drawn.estimates["E"].low == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (runs()[:7], "too_few_points"),
        (runs().assign(params=np.tile([1e6, 2e6, 2e6], 25)), "too_few_points"),
        (runs(0.001).assign(tokens=lambda t: 20 * t.params), "too_few_points"),
        (runs(0.001).iloc[:15], "too_few_points"),  # one budget
        # A loss that falls with D alone: nothing pins A and alpha.
        (runs().assign(loss=lambda t: 2.0 + 500 * t.tokens**-0.3), "bound"),
    ],
)
def test_a_fit_that_the_data_cannot_pin_down_is_refused(method, table, kind):
    with pytest.raises(FitRefused) as refused:
        fit(table, method)
    assert refused.value.kind == kind


@pytest.mark.parametrize("draws", [1, 19])
def test_too_few_draws_give_no_interval(draws):
    drawn = bootstrap(fit(runs(0.01)), draws, seed=0)
    assert drawn.estimates is None and drawn.draws == draws


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("points", "span", "noise"), [(15, 16.0, 0.01), pytest.param(9, 4.0, 0.003, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("repeats", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_bootstrap_intervals_cover_the_true_exponent(method, points, span, noise, repeats):
    """Nominal 95 %; allowed is 93 to 97 % and three binomial standard deviations of the repetitions; Huber's, whose
    draws scatter more than its estimate, may cover more."""
    hits = 0
    for seed in range(repeats):
        drawn = bootstrap(fit(runs(noise, seed, points, span), method), 200, seed)
        hits += TRUE.a in drawn.estimates["a"]
    spare = 3 * np.sqrt(0.95 * 0.05 / repeats)
    assert hits / repeats >= 0.93 - spare
    assert hits / repeats <= (0.97 if method == "squares" else 1.0) + spare


@pytest.mark.slow
def test_a_thousand_draws_of_240_runs_take_seconds_of_processor_time():
    found = fit(runs(0.01, points=48))
    before = time.process_time()
    assert bootstrap(found, 1000, seed=0).draws_refused == 0
    assert time.process_time() - before < 3
