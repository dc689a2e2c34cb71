"""Tuning curves: the optimum that was planted, and what the error of the chosen rate may cost."""

import math

import numpy as np
import pandas as pd
import pytest

from experiments.scaling.tuning import describe, find_optimum, rate_curves, tuned_rate

RATES = (0.0025, 0.005, 0.01, 0.02)


def runs(optima, curvature=0.05, noise=0.0, rates=RATES, seed=0):
    """Tuning runs: budget -> optimum, each curve a parabola in the log of the rate."""
    rng, rows = np.random.default_rng(seed), []
    for budget, optimum in optima.items():
        for rate in rates:
            loss = 3.0 * math.exp(curvature * math.log(rate / optimum) ** 2 + rng.normal(0, noise) * (noise > 0))
            rows.append({
                "status": "done", "budget_flops": budget, "width": 16, "params_total": 1000, "flops": budget,
                "learning_rate": rate, "bits_per_byte": loss,
            })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("optimum", [0.004, 0.007, 0.012])
def test_the_rate_is_the_vertex_of_the_curves_and_not_one_of_those_tried(optimum):
    rows = runs({1e11: optimum, 4e11: optimum})
    assert tuned_rate(rows) == pytest.approx(optimum, rel=0.01)
    found, warnings = describe(rows, (1e11, 4e11), 0.01)
    assert found.curvature == pytest.approx(0.05) and warnings == []
    assert all(optimum in curve.optimum for curve in found.curves)


def test_a_curve_at_the_edge_has_no_optimum_and_says_what_follows():
    found, warnings = describe(runs({1e11: 0.05, 4e11: 0.007}), (1e11, 4e11), 0.01)
    assert found.curves[0].optimum is None and found.curves[1].optimum is not None
    assert any("0.02, is the highest tried: a better one may lie beyond" in text for text in warnings)
    assert found.learning_rate == pytest.approx(0.007, rel=0.01)


def test_where_every_curve_ends_at_an_edge_the_best_rate_tried_is_taken():
    rows = runs({1e11: 0.1})
    assert find_optimum(rate_curves(rows)) is None and tuned_rate(rows) == 0.02
    assert describe(rows, (1e11,), 0.01)[0].excess is None


def test_a_rate_that_diverged_bounds_the_curve():
    rows = runs({1e11: 0.02}, rates=(0.005, 0.01, 0.02, 0.04))
    rows.loc[rows.learning_rate == 0.04, ["status", "bits_per_byte"]] = "diverged", None
    assert rate_curves(rows)[0].at_edge is None and 0.01 < tuned_rate(rows) < 0.04


def test_without_finished_runs_there_is_no_rate():
    rows = runs({1e11: 0.01}).assign(status="failed")
    assert tuned_rate(rows) is None and describe(rows, (1e11,), None) == (None, [])


def test_optima_that_differ_between_budgets_cost_both_and_one_budget_says_that_it_cannot_know():
    agree, differ = (describe(runs({1e11: 0.007, 4e11: second}), (1e11, 4e11), 0.002)[0] for second in (0.007, 0.014))
    assert agree.excess < 0.001 < 0.004 < differ.excess  # 0.05 (ln 2 / 2)^2 = 0.006
    assert any("tuned at one budget" in text for text in describe(runs({1e11: 0.007}), (1e11, 4e11), 0.01)[1])


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_what_the_error_of_the_rate_costs_is_seldom_more_than_is_said(noise):
    budgets, inside = (1e11, 4e11), []
    for seed in range(100):
        rows = runs(dict.fromkeys(budgets, 0.007), curvature=0.03, noise=noise, seed=seed)
        optimum = find_optimum(rate_curves(rows), noise)
        if optimum is not None:
            said = np.quantile(optimum.excess(np.log(budgets), np.random.default_rng(0), 1000), 0.975, axis=0)
            inside.append(0.03 * (optimum.chosen - math.log(0.007)) ** 2 <= said.max())
    assert np.mean(inside) >= 0.87


def test_two_seeds_of_every_rate_know_the_optimum_better():
    one = runs({1e11: 0.007})
    two = pd.concat([one, one])
    single, double = (find_optimum(rate_curves(rows), 0.01) for rows in (one, two))
    assert double.x == pytest.approx(single.x)
    assert double.covariance == pytest.approx(single.covariance / 2)
    assert double.curvature_error == pytest.approx(single.curvature_error / math.sqrt(2))


@pytest.mark.parametrize("repeats", [100])
def test_the_interval_of_an_optimum_covers_it(repeats):
    noise, inside = 0.003, 0
    for seed in range(repeats):
        rows = runs({1e11: 0.007, 4e11: 0.007}, noise=noise, seed=seed)
        optimum = find_optimum(rate_curves(rows), noise)
        error = 1.96 * math.sqrt(optimum.covariance[0, 0])
        inside += abs(optimum.x[0] - math.log(0.007)) <= error
    assert inside >= 0.87 * repeats  # at a true 0.95 fewer is a chance of 1 in 1000
