"""What is said of a design's power comes out when the design is repeated."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from experiments.scaling.design import Cell
from experiments.scaling.power import deviation_of, larger_budget, planned_power, power_of
from experiments.scaling.surface import Fit, Form, Parametrisation, Runs, fit

CLOSE, FAR = (3e10, 6e10, 1.2e11, 2.4e11), (1e12, 4e12, 1.6e13, 6.4e13)


def plant(
    budgets=CLOSE,
    sizes=6,
    off=0.0,
    noise=0.01,
    correlation=0.0,
    seeds=1,
    floor=0.5,
    floors=(0, 0),
    better=0.0,
    gamma=1.0,
):
    """Two arms of one law as if it had been fitted, and the ln C at its centre; the second arm's reducible loss is
    lower by the factor exp(-better)."""
    form, centre = Form(floors, (0, 1), (0, 0)), float(np.log(budgets).mean())
    places = [
        (arm, 0.5 * math.log(budget / 120) + x, budget, (budget, x, seed))
        for budget in budgets
        for x in np.linspace(-1.1, 1.1, sizes) + off
        for seed in range(seeds)
        for arm in (0, 1)
    ]
    names = {name: i for i, name in enumerate(dict.fromkeys(place[3] for place in places))}
    size = np.array([x for _, x, _, _ in places])
    data = np.log([budget / 6 for _, _, budget, _ in places]) - size
    cell = np.array([names[place[3]] for place in places])
    runs = Runs(np.array([place[0] for place in places]), size, data, np.zeros(len(places)), cell)
    model = Parametrisation(form, runs)
    parameters = np.full(model.count, 0.4)
    parameters[model.e], parameters[model.gamma] = math.log(3 * floor), math.log(gamma)
    middle = 0.5 * (centre - math.log(120))
    terms = math.log(3 * (1 - floor)) - gamma * math.log(2) - better * np.arange(2)
    parameters[model.a] = terms + 0.4 * (middle - model.origin[0])
    parameters[model.b] = terms + 0.4 * (centre - math.log(6) - middle - model.origin[1])
    runs = replace(runs, loss=model(parameters[None])[0][0])
    spread = np.full(2, noise)
    return Fit(Parametrisation(form, runs), parameters, 0 * size, spread, correlation, 0.0), centre


def repeated(planted, repetitions):
    """ln loss of the runs in repetitions of the design [repetitions, R]."""
    rng, runs = np.random.default_rng(0), planted.model.runs
    shared = rng.standard_normal((repetitions, runs.cell.max() + 1))[:, runs.cell]
    own = rng.standard_normal((repetitions, len(runs)))
    error = math.sqrt(planted.correlation) * shared + math.sqrt(1 - planted.correlation) * own
    return runs.loss + planted.spread[runs.arm] * error


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"budgets": FAR, "seeds": 2},
        {"correlation": 0.6},
        {"floor": 0.75},
        {"floor": 0.1},
        {"noise": 0.03},
        {"off": 1.0},
        {"floors": (0, 1), "budgets": FAR},
        {"gamma": 0.46},
    ],
)
def test_the_standard_error_of_the_multiplier_is_that_of_repetitions(law):
    planted, centre = plant(**law)
    drawn = planted.refit(repeated(planted, 200)).log_multiplier(1, 0, centre)
    assert deviation_of(planted, planted.model.runs, 1, 0, centre) == pytest.approx(drawn.std(), rel=0.25)


@pytest.mark.thorough
@pytest.mark.parametrize("law", [{}, {"correlation": 0.5}])
def test_a_multiplier_that_is_told_apart_is_found_in_eight_of_ten_repetitions(law):
    told_apart = power_of(*pair(plant(**law)), 0.0, 1).told_apart
    better, step = 0.0, 0.5
    while step > 1e-4:  # the lead in reducible loss that gives this multiplier
        planted, centre = plant(**law, better=better + step)
        found = planted.surface.log_multiplier(1, 0, centre)[0]
        better, step = (better + step, step) if found < math.log(told_apart) else (better, step / 2)
    detected = []
    for loss in repeated(planted, 120):
        again = fit(replace(planted.model.runs, loss=loss), planted.model.form)
        error = deviation_of(again, again.model.runs, 1, 0, centre)
        detected.append(again.surface.log_multiplier(1, 0, centre)[0] > 1.96 * error)
    assert 0.7 <= np.mean(detected) <= 0.9


def pair(planted_and_centre):
    planted, centre = planted_and_centre
    return planted, 1, 0, centre


def test_the_seeds_of_a_remedy_are_enough_and_one_fewer_is_not():
    wanted = power_of(*pair(plant(noise=0.02)), 0.0, 1).remedies[0]
    told_apart = [power_of(*pair(plant(noise=0.02, seeds=wanted.seeds + more)), 0.0, 1).told_apart for more in (-1, 0)]
    assert told_apart[0] > wanted.target >= told_apart[1] * (1 - 1e-9)


def test_a_larger_budget_is_planned_at_the_same_distance_from_the_optimum_and_helps():
    planted, centre = plant(noise=0.02)
    larger = larger_budget(planted, (0, 1))
    flops = np.exp(larger.size + larger.data) * 6
    assert flops == pytest.approx(4 * CLOSE[-1]) and len(larger) == 12
    optimum = planted.surface.optimum(0, math.log(4 * CLOSE[-1]))[0][0]
    assert larger.size.mean() == pytest.approx(optimum, abs=0.05)
    target, wider = power_of(planted, 1, 0, centre, 0.0, 1).remedies[1], plant(noise=0.02, budgets=(*CLOSE, 9.6e11))[0]
    error = deviation_of(wider, wider.model.runs, 1, 0, centre)
    assert target.flops == pytest.approx(12 * 9.6e11)
    # Nearly as if it had been there from the beginning: there the floor is half of the loss at another compute.
    assert target.larger_budget_power == pytest.approx(norm.cdf(math.log(target.target) / error - 1.96), abs=0.05)
    before = deviation_of(planted, planted.model.runs, 1, 0, centre)
    assert target.larger_budget_power > norm.cdf(math.log(target.target) / before - 1.96)


def test_no_number_of_seeds_helps_against_an_error_that_all_runs_share():
    alone, shared = (power_of(*pair(plant()), systematic, 1) for systematic in (0.0, 0.05))
    assert shared.told_apart > alone.told_apart
    assert [remedy.seeds for remedy in shared.remedies] == [None, None] and alone.remedies[0].seeds is not None


def test_only_multipliers_that_are_not_told_apart_yet_have_remedies():
    assert power_of(*pair(plant(noise=0.001)), 0.0, 1).remedies == ()


def cells(seeds=(0,)):
    return [
        Cell("fit", arm, budget, i, seed, None, 0, 1, tokens, 1, budget)
        for arm in ("reference", "new", "masked")
        for budget in CLOSE
        for i, tokens in enumerate(np.geomspace(1e6, 9e6, 6) * math.sqrt(budget / 1e11))
        for seed in seeds
    ]


def test_before_any_run_the_power_grows_with_seeds_and_falls_with_noise():
    arms, bounds = ["reference", "new", "masked"], [False, False, True]
    once, twice = (planned_power(cells(seeds=seeds), arms, bounds, 0.01) for seeds in ((0,), (0, 1)))
    assert len(once) == 2 and twice[0].told_apart < once[0].told_apart
    assert planned_power(cells(), arms, bounds, 0.02)[0].told_apart == pytest.approx(once[0].told_apart ** 2)
    # A floor of its own makes a bound harder to place.
    assert once[1].told_apart > once[0].told_apart
