"""What a sweep adds to its plan on the way, from runs that follow planted laws and are not trained."""

import math
from itertools import pairwise

import pytest

from experiments.fits.isoflop import Located
from experiments.scaling.arm_runs import budget_curves, finished
from experiments.sweeps.adaptive import chosen_rates, further_rates, further_sizes, held_out_sizes
from tests.sweeps.untrained import SWEEP, Untrained


def rates_tried(sweep, budget, arm="arm0"):
    return sorted(cell.learning_rate for cell in sweep.plan.select("tune", arm, budget))


def minima(sweep, arm="arm0"):
    curves = budget_curves(finished(sweep.rows, arm, "fit"), sweep.plan.budgets)
    return [curve for curve in curves if isinstance(curve, Located)]


@pytest.mark.parametrize("rate", [0.0005, 0.008, 0.1])
def test_learning_rates_are_tried_beyond_the_grid_until_the_best_lies_inside(rate):
    sweep = Untrained(rate=rate, noise=0.0005)
    sweep.carry_out("tune", further_rates)
    for arm in sweep.arms:
        small, large = (rates_tried(sweep, budget, arm) for budget in SWEEP["tuning"]["budgets"])
        assert small[0] < rate < small[-1] and large[0] < rate < large[-1]
        assert all(b / a == pytest.approx(2, rel=0.01) for a, b in pairwise(small))
        assert len(large) == 3, "a later budget starts with three around the optimum of the first"
    sweep.add(chosen_rates(sweep.plan, sweep.arms, sweep.rows))
    assert all(sweep.plan.rates[arm] == pytest.approx(rate, rel=0.1) for arm in sweep.arms)
    assert further_rates(sweep.plan, sweep.arms, sweep.rows) is None
    assert chosen_rates(sweep.plan, sweep.arms, sweep.rows) is None, "chosen once"


def test_the_rates_stop_after_as_many_steps_as_are_allowed_and_the_reason_is_written():
    tuning = SWEEP["tuning"] | {"widen": 2, "budgets": [3e10]}
    sweep = Untrained(rate=1.0, noise=0.0, tuning=tuning)
    first, second = sweep.carry_out("tune", further_rates)
    assert rates_tried(sweep, 3e10) == [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]
    assert "arm0 at 3e+10 FLOPs: 0.04, since 0.02, the highest tried, is best; arm1 at" in first.reason
    assert {cell.learning_rate for cell in second.cells} == {0.08}


def test_every_rate_is_tried_with_every_seed_and_counts_as_one_step():
    sweep = Untrained(rate=0.03, noise=0.0005, tuning=SWEEP["tuning"] | {"seeds": [1000, 1001]})
    sweep.carry_out("tune", further_rates)
    for budget in SWEEP["tuning"]["budgets"]:
        cells = sweep.plan.select("tune", "arm0", budget)
        rates = {cell.learning_rate for cell in cells}
        assert {(cell.learning_rate, cell.seed) for cell in cells} == {(r, s) for r in rates for s in (1000, 1001)}
    assert len({cell.learning_rate for cell in sweep.plan.select("tune", "arm0", 3e10)}) == 6, (
        "0.04 and 0.08 were added"
    )


def test_a_sweep_without_tuning_adds_no_rates():
    sweep = Untrained(tuning=None)
    assert further_rates(sweep.plan, sweep.arms, sweep.rows) is None
    assert chosen_rates(sweep.plan, sweep.arms, sweep.rows) is None


@pytest.mark.thorough
@pytest.mark.parametrize("off", [1 / 3, 3.0])
def test_a_grid_three_times_off_centre_finds_its_minima(off):
    found = []
    for seed in range(10):
        sweep = Untrained(off=off, seed=seed, tuning=None, holdout=None)
        sweep.carry_out("fit", further_sizes)
        found += [minima(sweep, arm) for arm in sweep.arms]
    assert sum(len(group) >= 3 for group in found) >= 0.9 * len(found)
    blind = Untrained(off=off, tuning=None, holdout=None, recentre=False, widen=0)
    blind.carry_out("fit", further_sizes)
    assert len(minima(blind)) < 3


@pytest.mark.parametrize("sizes", [3, 6])
def test_later_budgets_are_laid_around_what_smaller_ones_found(sizes):
    sweep = Untrained(off=2.0, noise=0.0, tuning=None, sizes=sizes)
    assert {cell.budget for cell in sweep.plan.select("fit")} == {3e10, 6e10}
    sweep.carry_out("fit", further_sizes)
    sweep.add(held_out_sizes(sweep.plan, sweep.arms, sweep.rows))
    for kind, budget in (("fit", 1.2e11), ("fit", 2.4e11), ("holdout", 9.6e11)):
        laid = [math.log(cell.params) for cell in sweep.plan.select(kind, "arm0", budget)]
        assert (laid[0] + laid[-1]) / 2 == pytest.approx(math.log(2 * math.sqrt(budget / 300)), abs=0.2)
    assert held_out_sizes(sweep.plan, sweep.arms, sweep.rows) is None
    assert sweep.plan.additions[-1].stage == "held-out sizes"


@pytest.mark.parametrize("seeds", [[0], None])
def test_the_held_out_budget_may_have_seeds_of_its_own(seeds):
    holdout = {"budget": 9.6e11, "sizes": 1, "span": 1} | ({"seeds": seeds} if seeds else {})
    sweep = Untrained(noise=0.0, tuning=None, seeds=[0, 1], holdout=holdout)
    sweep.carry_out("fit", further_sizes)
    addition = held_out_sizes(sweep.plan, sweep.arms, sweep.rows)
    assert [cell.seed % 1000 for cell in addition.cells if cell.arm == "arm0"] == (seeds or [0, 1])
    assert {cell.seed % 1000 for cell in sweep.plan.select("fit")} == {0, 1}


def test_an_arm_may_have_its_own_number_of_sizes():
    sweep = Untrained(noise=0.0, tuning=None, holdout=None, fewer={"arm1": 3})
    sweep.carry_out("fit", further_sizes)
    counts = {arm: [len(sweep.plan.select("fit", arm, budget)) for budget in sweep.plan.budgets] for arm in sweep.arms}
    assert counts == {"arm0": [6] * 4, "arm1": [3] * 4}


def test_without_recentring_and_widening_all_is_planned_at_the_beginning():
    sweep = Untrained(off=3.0, tuning=None, recentre=False, widen=0)
    assert sweep.carry_out("fit", further_sizes) == []
    assert held_out_sizes(sweep.plan, sweep.arms, sweep.rows) is None
    assert len(sweep.plan.cells) == 2 * (4 * 6 + 3)


@pytest.mark.parametrize(("off", "side"), [(1 / 30, "smallest"), (30, "largest")])
def test_a_budget_is_widened_on_the_side_of_its_best_by_no_more_sizes_than_allowed(off, side):
    sweep = Untrained(off=off, noise=0.0, tuning=None, holdout=None, budgets=[1e12], widen=2)
    planned = {cell.width for cell in sweep.plan.cells}
    additions = sweep.carry_out("fit", further_sizes)
    assert len(additions) == 2 and f"since the {side}," in additions[0].reason
    added = {cell.width for addition in additions for cell in addition.cells}
    assert len(added) == 2
    assert max(added) < min(planned) if side == "smallest" else min(added) > max(planned)


def test_sizes_that_cannot_be_trained_are_not_added():
    sweep = Untrained(off=1 / 30, noise=0.0, tuning=None, holdout=None, budgets=[1e12])
    for arm in sweep.arms.values():
        arm.corpus = 1 + max(cell.tokens for cell in sweep.plan.cells)
    assert sweep.carry_out("fit", further_sizes) == []


def test_a_curve_with_failed_runs_waits_for_them_and_the_others_go_on():
    sweep = Untrained(
        off=3.0, noise=0.0, tuning=None, failing=lambda cell: cell.arm == "arm0" and cell.seed % 1000 == 0
    )
    sweep.carry_out("fit", further_sizes)
    widths = {arm: len(sweep.plan.select("fit", arm, 3e10)) for arm in sweep.arms}
    assert widths["arm0"] == 6 < widths["arm1"]
    sweep.failing = lambda cell: False
    sweep.carry_out("fit", further_sizes)
    assert len(sweep.plan.select("fit", "arm0", 3e10)) == widths["arm1"]


def test_a_sweep_that_is_started_again_decides_nothing_twice():
    sweep = Untrained(off=3.0)
    for kind, further in (("tune", further_rates), ("fit", further_sizes)):
        assert sweep.carry_out(kind, further) and not sweep.carry_out(kind, further)
    cells = [cell for group in sweep.plan.groups for cell in group]
    assert len(set(cells)) == len(cells)
