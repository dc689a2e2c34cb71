"""The joint surface: its frontier, what it recovers, and the error that it states."""

import math

import numpy as np
import pytest

from experiments.scaling.calibration import Grid, PlantedLaw, plant
from experiments.scaling.joint import runs_of, sharing
from experiments.scaling.surface import Form, Parametrisation, Surface, fit

ARMS = ("reference", "new")
CENTRE = float(np.log(Grid().budgets).mean())


def planted(new, noise=0.0, seed=0, grid=Grid()):
    """Runs of a new arm and of a reference that shares its gamma."""
    return runs_of(plant((PlantedLaw(gamma=new.gamma), new), grid, noise, np.random.default_rng(seed)), ARMS)


def surface_of(law):
    """A law as a surface of one arm."""
    gain = law.multiplier ** -(law.alpha * law.beta / (law.alpha + law.beta))
    constants = law.E, math.log(law.A * gain), math.log(law.B * gain), law.alpha, law.beta, law.gamma
    return Surface((math.log(1e5), math.log(1e7)), *(np.array([[x]]) for x in constants))


@pytest.mark.parametrize(
    "law",
    [
        PlantedLaw(),
        PlantedLaw(alpha=0.6, E=0.7, multiplier=3.0),
        PlantedLaw(beta=0.25),
        PlantedLaw(gamma=0.46),
        PlantedLaw(alpha=0.6, multiplier=3.0, gamma=0.3),
        PlantedLaw(beta=0.25, gamma=1.4),
    ],
)
def test_the_frontier_is_the_lowest_loss_at_a_budget_and_comes_back_as_its_flops(law):
    surface = surface_of(law)
    for flops in (1e11, 1e13):
        assert surface.frontier(0, math.log(flops))[0] == pytest.approx(law.frontier(flops), rel=1e-6)
        size, data = (math.exp(x[0]) for x in surface.optimum(0, math.log(flops)))
        assert 6 * size * data == pytest.approx(flops)
        assert surface.loss(0, np.log(size), np.log(data))[0] == pytest.approx(law.frontier(flops), rel=1e-6)
        assert surface.flops_for(0, np.array([law.frontier(flops)]))[0] == pytest.approx(math.log(flops), abs=1e-4)


def test_with_gamma_1_the_surface_is_that_of_hoffmann_et_al():
    """At their published constants (arXiv 2203.15556, eq. 10)."""
    size, data = np.log([7e7, 1e9, 7e10]), np.log([3e9, 4e11, 1.4e12])
    constants = 1.69, math.log(406.4), math.log(410.7), 0.34, 0.28, 1.0
    got = Surface((0.0, 0.0), *(np.array([[x]]) for x in constants)).loss(0, size, data)[0]
    want = 1.69 + 406.4 / np.exp(size) ** 0.34 + 410.7 / np.exp(data) ** 0.28
    assert got == pytest.approx(want, rel=1e-12)


def test_the_exponents_are_gamma_times_those_inside_of_the_power():
    """As Busbridge et al. (arXiv 2502.08606) and Kaplan et al. (arXiv 2001.08361, eq. 1.5) write them."""
    size, data = np.log([7e4, 1e5, 7e6]), np.log([3e6, 4e7, 1.4e8])
    constants = 1.2, 0.5 * math.log(90), 0.5 * math.log(300), 0.5 * 0.7, 0.5 * 0.6, 0.5
    got = Surface((0.0, 0.0), *(np.array([[x]]) for x in constants)).loss(0, size, data)[0]
    assert got == pytest.approx(1.2 + (90 / np.exp(size) ** 0.7 + 300 / np.exp(data) ** 0.6) ** 0.5, rel=1e-12)


def test_losses_that_are_shifted_are_multiplied_everywhere():
    surface = surface_of(PlantedLaw(gamma=0.46))
    size, data = np.log([3e4, 3e5]), np.log([3e7, 3e6])
    shifted = surface.shifted(np.array([[0.1]]))
    assert shifted.loss(0, size, data) == pytest.approx(math.exp(0.1) * surface.loss(0, size, data))
    assert shifted.optimum(0, CENTRE)[0] == pytest.approx(surface.optimum(0, CENTRE)[0])


@pytest.mark.parametrize(
    "form",
    [
        Form((0, 0), (0, 1)),
        Form((0, 0), (0, 1), (0, 0)),
        Form((0, 1), (0, 0), (0, 1)),
        Form((0, 0), (0, 1), (0, 1), tied=True),
    ],
    ids=["gamma 1", "one gamma", "two gammas", "tied exponents"],
)
def test_the_jacobian_is_that_of_finite_differences(form):
    model, step = Parametrisation(form, planted(PlantedLaw(alpha=0.5, gamma=0.46))), 1e-6
    starts = model.starts()[::7]
    somewhere = starts + 0.1 * np.random.default_rng(0).standard_normal(starts.shape)
    jacobian = model(somewhere)[1]
    for i, change in enumerate(step * np.eye(model.count)):
        want = (model(somewhere + change)[0] - model(somewhere - change)[0]) / (2 * step)
        assert jacobian[..., i] == pytest.approx(want, abs=1e-8)


def test_a_loss_below_the_floor_takes_infinite_compute():
    assert surface_of(PlantedLaw()).flops_for(0, np.array([1.2, 1.1])).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("form", "new"),
    [
        (Form((0, 0), (0, 0)), PlantedLaw(multiplier=1.5)),
        (Form((0, 0), (0, 1)), PlantedLaw(alpha=0.5, beta=0.3)),
        (Form((0, 1), (0, 1)), PlantedLaw(E=0.9, alpha=0.5)),
        (Form((0, 0), (0, 1), tied=True), PlantedLaw(alpha=0.3, beta=0.3)),
        (Form((0, 0), (0, 1), (0, 0)), PlantedLaw(alpha=0.5, beta=0.3)),
        (Form((0, 0), (0, 1), (0, 0)), PlantedLaw(alpha=0.5, beta=0.3, gamma=0.46)),
        (Form((0, 1), (0, 1), (0, 0)), PlantedLaw(E=0.9, alpha=0.5, gamma=0.3)),
    ],
    ids=["pure factor", "own exponents", "own floors", "tied exponents", "gamma 1", "gamma", "gamma and own floors"],
)
def test_a_noise_free_law_of_the_form_is_recovered(form, new):
    got = fit(planted(new), form).surface
    for constant, name in ((got.E, "E"), (got.alpha, "alpha"), (got.beta, "beta"), (got.gamma, "gamma")):
        assert constant[0, 1] == pytest.approx(getattr(new, name), rel=1e-4)
    want = math.log(PlantedLaw(gamma=new.gamma).flops_for(new.frontier(math.exp(CENTRE)))) - CENTRE
    assert got.log_multiplier(1, 0, CENTRE)[0] == pytest.approx(want, abs=1e-4)


def test_the_spread_is_that_of_the_runs_and_runs_far_off_hardly_change_it():
    runs = planted(PlantedLaw(), noise=0.01, grid=Grid(seeds=4))
    assert fit(runs, sharing([False, False])).spread == pytest.approx(0.01, rel=0.2)
    runs.loss[[3, 70]] += 0.3
    assert fit(runs, sharing([False, False])).spread == pytest.approx(0.01, rel=0.25)


def test_spreads_that_differ_by_chance_are_drawn_together_and_others_are_not():
    ratios = {}
    for apart in (1, 4):
        ratios[apart] = np.zeros(20)
        for seed in range(20):
            runs = planted(PlantedLaw(), noise=0.01, seed=seed)
            runs.loss[runs.arm == 1] += (apart - 1) * (runs.loss - planted(PlantedLaw()).loss)[runs.arm == 1]
            first, second = fit(runs, sharing([False, False])).spread
            ratios[apart][seed] = second / first
    assert (np.abs(ratios[1] - 1) < 1e-3).sum() > 10
    assert np.exp(np.log(ratios[4]).mean()) == pytest.approx(4, rel=0.15) and ratios[4].min() > 2


def test_units_of_size_data_and_loss_do_not_matter():
    runs, form = planted(PlantedLaw(multiplier=1.3), noise=0.01), sharing([False, False])
    other = type(runs)(runs.arm, runs.size + 3, runs.data - 3, runs.loss + 1, runs.cell)
    got = (fit(each, form).surface.log_multiplier(1, 0, CENTRE)[0] for each in (runs, other))
    assert next(got) == pytest.approx(next(got), abs=1e-6)


def test_arms_may_come_in_any_order():
    runs, form = planted(PlantedLaw(multiplier=1.3), noise=0.01), sharing([False, False])
    swapped = type(runs)(1 - runs.arm, runs.size, runs.data, runs.loss, runs.cell)
    there, back = fit(runs, form).surface, fit(swapped, form).surface
    loss = there.frontier(1, CENTRE)
    assert there.flops_for(0, loss)[0] == pytest.approx(back.flops_for(1, loss)[0], abs=1e-5)


def test_too_few_runs_are_refused_with_the_numbers():
    runs = planted(PlantedLaw())
    with pytest.raises(ValueError, match=r"27 runs \(24, 3 of each arm\) for a surface of 10 constants"):
        fit(runs.where(np.arange(len(runs)) < 27), sharing([False, False]))


@pytest.mark.parametrize(
    ("bounds", "floors"),
    [([False, False], (0, 0)), ([False, True], (0, 1)), ([True, False, False], (1, 0, 0)), ([True, True], (0, 1))],
)
def test_exact_likelihoods_share_floor_and_gamma_and_each_bound_has_its_own(bounds, floors):
    form = sharing(bounds)
    same = [[form.floors[i] == form.floors[j] for j in range(len(bounds))] for i in range(len(bounds))]
    assert same == [[floors[i] == floors[j] for j in range(len(bounds))] for i in range(len(bounds))]
    assert form.exponents == tuple(range(len(bounds))) and form.bends == form.floors
    assert sharing(bounds, own_floors=True) == Form(form.exponents, form.exponents, form.bends)


def test_what_the_surface_misses_of_a_size_is_not_made_smaller_by_seeds():
    """Runs of one size and length share a distance from the surface, which seeds drawn alone would average out."""
    rng, widths, seeds = np.random.default_rng(0), [], 6
    for missed, noise in ((0.0, 0.01), (0.01, 0.001)):
        runs = planted(PlantedLaw(), noise=noise, grid=Grid(seeds=seeds))
        runs.loss[:] += np.concatenate([np.tile(missed * rng.standard_normal(24), seeds) for _ in ARMS])
        got = fit(runs, sharing([False, False]))
        assert got.misfit > 0.6 if missed else got.misfit < 0.2
        widths.append(float(got.draws(300, 0).log_multiplier(1, 0, CENTRE).std()))
    assert widths[1] > 1.5 * widths[0]
