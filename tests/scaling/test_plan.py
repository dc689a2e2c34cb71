"""The planner asks for models near a given size, meets budgets, and says what is impossible."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.findings import jsonable
from experiments.harness.identity import run_of
from experiments.scaling.plan import Arm, Cell, difference, make_plan, nearest_width

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
    "tuning": {"budget": 1e9, "learning_rates": [0.01, 0.02], "seed": 1000},
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
            assert (
                len(group) == 8 and len({cell.width for cell in group}) == 4 and {cell.seed for cell in group} == {0, 1}
            )
        assert len([cell for cell in mine if cell.kind == "holdout"]) == 4
    assert json.loads(json.dumps(jsonable(plan))) == jsonable(plan)
    assert [Cell(**cell) for cell in jsonable(plan)["cells"]] == plan.cells
    assert plan.design.cells == len(plan.cells) and plan.design.corpus.digest == data.digest


@pytest.mark.thorough
def test_a_plan_is_the_same_whenever_it_is_made(sweep, arms, data):
    assert planned(sweep(), arms, data) == planned(sweep(), arms, data)


@pytest.mark.thorough
def test_every_cell_meets_its_budget_to_within_a_sequence(sweep, arms, data):
    for cell in planned(sweep(), arms, data).cells:
        assert 0.9 * cell.budget < cell.flops <= cell.budget * (1 + 1e-9)


@pytest.mark.thorough
def test_sizes_lie_around_the_planned_optimum(sweep, arms):
    arm = arms(sweep())[0]
    budget = 1e13
    widths = arm.widths(budget, 7, 4)
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
        ({"budgets": [1e9, 1e9]}, "must be positive and different"),
        ({"budgets": []}, "must be positive and different"),
        ({"holdout": {"budget": 4e9, "sizes": 1, "span": 2}}, "must lie above the largest fitted budget"),
        ({"arms": [SWEEP["arms"][0]] * 2}, "must have different names"),
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
