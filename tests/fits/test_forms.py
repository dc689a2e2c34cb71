"""Every form of the law: its derivatives are right, its constants are found in any unit, and it is Hoffmann's where it
should be."""

import numpy as np
import pandas as pd
import pytest

from experiments.fits.forms import FORMS
from experiments.fits.parametric import FitRefused, Problem, fit_law

CONSTANTS = {
    "chinchilla": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "tied": {"A": 406.4, "B": 1410.7, "E": 1.69, "alpha": 0.34},
    "repeated": {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.33, "R_N": 5.31, "R_D": 15.39},
    "experts": {
        **{"A": 35.91, "B": 35.98, "E": 1.3637, "alpha": 0.1889, "beta": 0.1775},
        **{"gamma": 0.0098, "delta": 0.2285, "zeta": -0.0259, "omega": -0.5529},
    },
}


def loss(form, constants, n, d, total, unique):
    """The formulas of the papers, written out."""
    c = constants
    if form == "chinchilla":
        return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]
    if form == "tied":
        return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["alpha"]
    if form == "experts":
        x = total / n
        size = c["A"] * x ** c["delta"] / n ** (c["alpha"] + c["gamma"] * np.log(x))
        return c["E"] + size + c["B"] * x ** c["omega"] / d ** (c["beta"] + c["zeta"] * np.log(x))
    repeats = d / unique - 1
    data = unique + unique * c["R_D"] * (1 - np.exp(-repeats / c["R_D"]))
    optimal = (c["alpha"] * c["A"] / (c["beta"] * c["B"]) * unique ** c["beta"]) ** (1 / c["alpha"])
    base = np.minimum(n, optimal)
    size = base + base * c["R_N"] * (1 - np.exp(-(n / base - 1) / c["R_N"]))
    return c["E"] + c["A"] / size ** c["alpha"] + c["B"] / data ** c["beta"]


def runs(form, noise=0.0, count=120, unit=1.0):
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(1e7), np.log(1e10), count))
    d = n * np.exp(rng.uniform(np.log(2), np.log(300), count))
    total, unique = n * np.exp(rng.uniform(0, 3, count)), d * np.exp(-np.maximum(rng.uniform(-1, 4, count), 0))
    noisy = loss(form, CONSTANTS[form], n, d, total, unique) * np.exp(rng.normal(0, noise, count))
    columns = {"params": n, "total_params": total, "tokens": d / unit, "unique_tokens": unique / unit}
    return pd.DataFrame({**columns, "loss": noisy})


@pytest.mark.parametrize("form", FORMS)
def test_the_derivatives_are_those_of_the_loss(form):
    problem = Problem(FORMS[form], runs(form), "huber")
    rng, count = np.random.default_rng(1), len(FORMS[form].parameters)
    for start in FORMS[form].starts(np.log(problem.loss))[::8] + rng.normal(0, 0.03, count):
        _, jacobian = problem.form(start[None], problem.logs)
        steps = 1e-6 * np.eye(count)
        above, below = (problem.form(start + sign * steps, problem.logs)[0] for sign in (1, -1))
        assert jacobian[0] == pytest.approx((above - below).T / 2e-6, abs=1e-7)


@pytest.mark.parametrize("method", ["huber", "squares"])
@pytest.mark.parametrize("form", FORMS)
def test_planted_constants_are_found(form, method):
    found = fit_law(Problem(FORMS[form], runs(form), method))
    assert found.constants == pytest.approx(CONSTANTS[form], rel=1e-4) and found.at_bound == ()


@pytest.mark.parametrize("form", FORMS)
def test_the_unit_of_the_data_changes_coefficients_alone(form):
    one, other = (fit_law(Problem(FORMS[form], runs(form, 0.003, unit=unit), "squares")) for unit in (1.0, 1e9))
    same = {"alpha", "beta", "gamma", "zeta", "E", "R_N", "R_D"} & one.constants.keys()
    assert [other.constants[k] for k in same] == pytest.approx([one.constants[k] for k in same], rel=1e-3)
    assert other.surface.a == pytest.approx(one.surface.a, abs=1e-4)


def test_tied_exponents_give_size_and_data_the_same_share_of_compute():
    assert fit_law(Problem(FORMS["tied"], runs("chinchilla", 0.003), "huber")).surface.a == 0.5


def test_of_data_seen_once_and_sizes_up_to_the_optimal_one_the_repeated_form_is_hoffmanns():
    table = runs("chinchilla").assign(tokens=lambda t: 100 * t.params, unique_tokens=lambda t: t.tokens)
    form, constants = FORMS["repeated"], CONSTANTS["repeated"]
    problem = Problem(form, table, "huber")
    theta = [np.log(value) if name in form.logged else value for name, value in constants.items()]
    theta = np.array([theta])
    for coefficient, exponent, column in form.units:
        theta[0, form.parameters.index(coefficient)] -= constants[exponent] * problem.units[column]
    surface = form.surface(constants, problem.logs)
    assert np.exp(form(theta, problem.logs)[0][0]) == pytest.approx(surface.loss(table.params, table.tokens))


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("repeated", {"unique_tokens": lambda t: t.tokens}, "no run sees a token twice"),
        ("experts", {"total_params": lambda t: 8 * t.params}, "all runs have one ratio"),
        ("chinchilla", {"tokens": 1e9}, "1 different token counts"),
    ],
)
def test_runs_that_cannot_tell_what_a_form_asks_are_refused(form, change, reason):
    with pytest.raises(FitRefused, match=reason) as refused:
        fit_law(Problem(FORMS[form], runs(form).assign(**change), "huber"))
    assert refused.value.kind == "too_few_points"
