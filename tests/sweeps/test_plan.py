"""The planner asks for models near a given size, meets budgets, and says what is impossible."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.findings import jsonable
from experiments.harness.identity import run_of
from experiments.scaling.design import Addition, Cell, Design
from experiments.sweeps.plan import Arm, difference, make_cells, make_plan, nearest_width

SWEEP = {
    "name": "test",
    "arms": [
        {"arch": "transformer", "objective": "next_token"},
        {"arch": "gated_delta_hybrid", "objective": "masked_diffusion"},
    ],
    "budgets": [4e9, 1e9, 2e9],
    "sizes": 4,
    "span": 3,
    "tokens_per_parameter": 2,
    "holdout": {"budget": 8e9, "sizes": 2, "span": 2},
    "seeds": [0, 1],
    "tuning": {"budgets": [1e9], "learning_rates": [0.01, 0.02], "seeds": [1000]},
    "noise": 0.01,
    "recentre": False,
    "widen": 0,
}


@pytest.fixture
def sweep():
    return lambda **changes: OmegaConf.create(SWEEP | changes)


@pytest.fixture
def arms(make_config, data):
    def make(sweep):
        return [Arm(spec, sweep.tokens_per_parameter, lambda o: make_config(*o), data) for spec in sweep.arms]

    return make


def planned(sweep, arms, data):
    return make_plan(sweep, arms(sweep), data, "python -m experiments.sweep")


@pytest.mark.thorough
def test_a_plan_has_every_arm_budget_size_and_seed_once(sweep, arms, data):
    plan = planned(sweep(), arms, data)
    assert plan.budgets == [1e9, 2e9, 4e9] and plan.holdout_budget == 8e9
    for arm in plan.arms:
        mine = [cell for cell in plan.cells if cell.arm == arm]
        assert sum(cell.kind == "tune" for cell in mine) == 2
        for budget in plan.budgets:
            group = [cell for cell in mine if cell.kind == "fit" and cell.budget == budget]
            assert len(group) == 8 and len({cell.width for cell in group}) == 4
            assert {cell.seed % 1000 for cell in group} == {0, 1}
        assert [cell.seed % 1000 for cell in mine if cell.kind == "holdout"] == [0, 1] * 2
    held_out = planned(sweep(holdout=SWEEP["holdout"] | {"seeds": [7]}), arms, data).select("holdout", plan.arms[0])
    assert [cell.seed % 1000 for cell in held_out] == [7, 7]
    assert json.loads(json.dumps(jsonable(plan))) == jsonable(plan)
    assert [Cell(**cell) for cell in jsonable(plan)["cells"]] == plan.cells
    assert plan.design.cells == len(plan.cells) and plan.design.corpus.digest == data.digest


@pytest.mark.thorough
def test_no_two_sizes_of_an_arm_share_a_seed_and_equal_places_of_two_arms_do(sweep, arms, data):
    plan = planned(sweep(), arms, data)
    seeds = [[cell.seed for cell in plan.cells if cell.arm == arm and cell.kind != "tune"] for arm in plan.arms]
    assert len(set(seeds[0])) == len(seeds[0]) and all(others == seeds[0] for others in seeds)


@pytest.mark.thorough
def test_a_plan_is_the_same_whenever_it_is_made(sweep, arms, data):
    assert planned(sweep(), arms, data) == planned(sweep(), arms, data)


@pytest.mark.thorough
def test_sizes_that_smaller_budgets_decide_on_are_not_planned_at_the_beginning(sweep, arms, data):
    settings = sweep(recentre=True, tuning=SWEEP["tuning"] | {"budgets": [4e9, 1e9]})
    plan = planned(settings, arms, data)
    assert {(cell.kind, cell.budget) for cell in plan.cells} == {("tune", 1e9), ("fit", 1e9), ("fit", 2e9)}
    expected = [cell for arm in arms(settings) for cell in make_cells(arm, settings)]
    assert {(cell.kind, cell.budget) for cell in expected} >= {("tune", 4e9), ("fit", 4e9), ("holdout", 8e9)}
    assert set(plan.cells) < set(expected)


@pytest.mark.thorough
def test_additions_are_read_back_and_are_no_difference_between_plans(sweep, arms, data):
    plan = planned(sweep(), arms, data)
    cell = plan.cells[-1]
    added = Addition("2026-01-01", "sizes", "why", [cell], {cell.arm: 0.01})
    written = jsonable(plan) | {"additions": jsonable([added])}
    again = plan.with_additions(json.loads(json.dumps(written)))
    assert again.additions == [added] and again.rates == {cell.arm: 0.01}
    assert again.select("holdout", cell.arm).count(cell) == 2 and again.groups[1] == [cell]
    assert difference(written, jsonable(plan)) == []
    assert again.design.cells == plan.design.cells + 1
    assert again.design.holdout_cells[cell.arm][-1] == (cell.flops, cell.tokens)


def test_a_budget_that_was_added_is_analysed_and_does_not_move_the_centre():
    corpus = {"name": "", "digest": "", "train_tokens": 1, "heldout_bytes": 1}
    plan = {
        "name": "", "arms": ["a"], "budgets": [1e9, 4e9], "holdout_budget": None, "cells": [], "commands": [],
        "corpus": corpus, "additions": [{"cells": [{"kind": "fit", "arm": "a", "budget": 1.6e10}]}],
    }  # fmt: skip
    design = Design.from_plan(plan)
    assert design.budgets == (1e9, 4e9, 1.6e10) and design.centre == pytest.approx(math.log(2e9))
    assert design.holdout_cells == {"a": ()} and design.cells == 1


@pytest.mark.thorough
def test_a_width_beyond_another_has_so_many_times_its_parameters_and_is_never_the_same(sweep, arms):
    arm = arms(sweep())[0]
    wide, narrow = arm.width_beyond(256, 2), arm.width_beyond(256, 0.5)
    assert arm.params(wide) == pytest.approx(2 * arm.params(256), rel=0.1)
    assert arm.params(narrow) == pytest.approx(arm.params(256) / 2, rel=0.1)
    step = arm.config.arch.width_multiple
    assert arm.width_beyond(2 * step, 1.001) == 3 * step
    assert arm.width_beyond(2 * step, 0.999) == step and arm.width_beyond(step, 0.999) is None


@pytest.mark.thorough
def test_every_cell_meets_its_budget_to_within_a_sequence(sweep, arms, data):
    for cell in planned(sweep(), arms, data).cells:
        assert 0.9 * cell.budget < cell.flops <= cell.budget * (1 + 1e-9)


@pytest.mark.thorough
def test_sizes_lie_around_the_planned_optimum(sweep, arms):
    arm = arms(sweep())[0]
    budget = 1e13
    widths = arm.widths(arm.optimum(budget), 7, 4)
    ratios = [arm.params(width) / arm.optimum(budget) for width in widths]
    assert ratios[0] == pytest.approx(0.25, rel=0.1) and ratios[-1] == pytest.approx(4, rel=0.1)
    assert ratios[3] == pytest.approx(1, rel=0.1) and widths == sorted(set(widths))


@settings(max_examples=100, deadline=None)
@given(target=st.floats(1, 1e12), step=st.integers(1, 64), depth=st.integers(1, 30))
def test_the_nearest_width_is_the_best_of_its_neighbours(target, step, depth):
    def params(width):
        return 12 * depth * width**2 + 257 * width

    width = nearest_width(params, target, step)
    error = abs(params(width) / target - 1) if params(width) > target else abs(target / params(width) - 1)
    for other in (width - step, width + step):
        if other > 0:
            assert error <= max(params(other) / target, target / params(other)) - 1 + 1e-9


def test_what_is_launched_for_a_cell_is_the_run_that_was_planned(sweep, arms, make_run):
    arm = arms(sweep())[1]
    cell = arm.cell("fit", 2e9, 24, 3, 0.005)
    run = run_of(arm.configure(cell))
    by_hand = make_run(
        "arch=gated_delta_hybrid", "objective=masked_diffusion", "budget.flops=2e9", "arch.width=24", "seed=3",
        "optim.learning_rate=0.005",
    )  # fmt: skip
    assert run.id == arm.cell_id(cell) == by_hand.id
    assert (run.session.kind, run.session.arm) == ("fit", arm.name)
    waiting = arm.cell("fit", 2e9, 24, 3, None)
    assert waiting.with_rate(0.005) == cell and cell.with_rate(0.1) == cell


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": [1e9, 1e9]}, r"sweep.budgets=\[1000000000.0, 1000000000.0\] must be different"),
        ({"holdout": {"budget": 4e9, "sizes": 1, "span": 2}}, "must lie above the largest fitted budget"),
        ({"holdout": SWEEP["holdout"] | {"seeds": [2, 2]}}, r"sweep.holdout.seeds=\[2, 2\] must be different"),
        ({"arms": [SWEEP["arms"][0]] * 2}, "must have different names"),
        ({"tuning": SWEEP["tuning"] | {"seeds": [1, 1]}}, r"sweep.tuning.seeds=\[1, 1\] must be different"),
        ({"budgets": [1e5]}, r"budget 1e\+05, width \d+.*costs this model \S+ FLOPs"),
        ({"holdout": {"budget": 1e15, "sizes": 1, "span": 2}}, "data.allow_repeats=true"),
    ],
)
def test_impossible_plans_say_what_is_wrong(sweep, arms, data, changes, words):
    with pytest.raises(ValueError, match=words):
        planned(sweep(**changes), arms, data)


@pytest.mark.thorough
def test_a_difference_between_plans_is_shown_where_it_is(sweep, arms, data):
    old, new = planned(sweep(), arms, data), planned(sweep(budgets=[1e9, 2e9, 3e9]), arms, data)
    lines = difference(jsonable(old), jsonable(new))
    assert (
        "budgets: [1000000000.0, 2000000000.0, 4000000000.0] on disk, [1000000000.0, 2000000000.0, 3000000000.0]"
        in lines[0]
    )
    assert any(line.startswith("cells: 16 only on disk, 16 only in the new plan") for line in lines)
    assert difference(jsonable(old), jsonable(old)) == []
