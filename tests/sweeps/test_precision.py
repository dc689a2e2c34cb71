"""Runs are added until the multiplier is known as well as was asked, and no longer."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments.scaling.analysis import analyse
from experiments.sweeps import precision
from experiments.sweeps.adaptive import further_sizes
from experiments.sweeps.precision import Wish, further_precision, read_wish
from tests.sweeps.untrained import Untrained

SECONDS = 1e-10  # per FLOP


def price(cell):
    return SECONDS * cell.flops


FIVE_PERCENT = Wish(math.log(1.05), math.inf, math.inf)


def half_width(comparison):
    return math.log(comparison.centre.estimate.high / comparison.centre.estimate.low) / 2


def compare(sweep):
    return analyse(sweep.rows, sweep.plan.design).comparisons


def decide(sweep, wish, comparisons):
    return further_precision(sweep.plan, sweep.arms, sweep.rows, wish, comparisons, price)


def finish(sweep, wish):
    """The planned budgets, then additions until there are none; returns the last comparisons and the last reason."""
    sweep.carry_out("fit", further_sizes)
    while True:
        comparisons = compare(sweep)
        addition = decide(sweep, wish, comparisons)
        if not addition.cells:
            return comparisons, addition.reason
        sweep.add(addition)
        sweep.run(addition.cells)


@pytest.fixture(scope="module")
def fitted():
    """A sweep whose planned budgets are run, to be read only, and its comparisons."""
    sweep = Untrained(tuning=None, noise=0.01)
    sweep.carry_out("fit", further_sizes)
    return sweep, compare(sweep)


@pytest.mark.thorough
def test_runs_are_added_in_pairs_until_every_interval_is_as_narrow_as_asked():
    sweep = Untrained(tuning=None, noise=0.01, multipliers=(1.0, 1.2, 0.9))
    comparisons, reason = finish(sweep, FIVE_PERCENT)
    assert all(half_width(comparison) <= math.log(1.05) for comparison in comparisons)
    assert reason.count("is known within") == 2
    cells = [cell for group in sweep.plan.groups for cell in group]
    assert len(set(cells)) == len(cells)
    added = [cell for addition in sweep.plan.additions if addition.stage == "precision" for cell in addition.cells]
    reference = {(cell.budget, cell.seed) for cell in cells if cell.arm == "arm0"}
    assert added and all((cell.budget, cell.seed) in reference for cell in added)


@pytest.mark.thorough
def test_what_an_addition_promises_comes_out(fitted):
    sweep, comparisons = Untrained(tuning=None, noise=0.01), fitted[1]
    sweep.carry_out("fit", further_sizes)
    addition = decide(sweep, FIVE_PERCENT, comparisons)
    assert 4 < float(re.search(r"should bring it to ([\d.]+) %", addition.reason)[1]) <= 5
    sweep.add(addition)
    sweep.run(addition.cells)
    assert half_width(compare(sweep)[0]) == pytest.approx(math.log(1.05), rel=0.25)


def test_nothing_is_added_where_the_interval_is_narrow_enough(fitted):
    sweep, comparisons = fitted
    addition = decide(sweep, Wish(0.5, math.inf, math.inf), comparisons)
    assert not addition.cells and "is known within" in addition.reason


@pytest.mark.parametrize("limit", [Wish(0.01, 3e12, math.inf), Wish(0.01, math.inf, 3e12 * SECONDS)])
def test_what_is_added_keeps_the_limit(fitted, limit):
    sweep, comparisons = fitted
    addition = decide(sweep, limit, comparisons)
    assert 2e12 < sum(cell.flops for cell in addition.cells) <= 3e12
    after = replace(sweep.plan, additions=[*sweep.plan.additions, addition])
    rest = further_precision(after, sweep.arms, sweep.rows, limit, comparisons, price)
    assert "have no result" in rest.reason, "it waits for the runs before it decides again"
    tight = replace(limit, flops=min(limit.flops, 1e9), seconds=min(limit.seconds, 1e9 * SECONDS))
    assert "the limit is reached" in decide(sweep, tight, comparisons).reason


def test_nothing_is_added_against_errors_that_all_runs_share(fitted):
    sweep, (comparison,) = fitted
    shared = replace(comparison, shares=replace(comparison.shares, learning_rate=0.03, evaluation=0.02))
    addition = decide(sweep, FIVE_PERCENT, [shared])
    assert not addition.cells
    assert "no run helps: what the learning rate and the held-out text leave open is 7.32 % alone" in addition.reason


def test_one_more_budget_lies_above_the_planned_and_below_the_held_out(fitted, monkeypatch):
    monkeypatch.setattr(precision, "MOST_SEEDS", 1)
    sweep, comparisons = fitted
    wish = Wish(0.01, math.inf, math.inf)
    addition = decide(sweep, wish, comparisons)
    assert {cell.budget for cell in addition.cells} == {4.8e11} and len(addition.cells) == 12
    monkeypatch.setattr(precision, "GROWTH", 10.0)
    above = replace(sweep.plan, holdout_budget=None)
    addition = further_precision(above, sweep.arms, sweep.rows, wish, comparisons, price)
    assert len({cell.budget for cell in addition.cells}) == 1, "one, though two would be affordable"
    beneath = replace(sweep.plan, holdout_budget=4e11)
    addition = further_precision(beneath, sweep.arms, sweep.rows, wish, comparisons, price)
    assert "all sizes have 1 seeds and no larger budget can be run" in addition.reason


def test_failed_runs_are_waited_for(fitted):
    sweep, comparisons = fitted
    rows = sweep.rows.assign(status=np.where(np.arange(len(sweep.rows)) == 0, "failed", sweep.rows.status))
    addition = further_precision(sweep.plan, sweep.arms, rows, FIVE_PERCENT, comparisons, price)
    assert addition.reason == "1 runs have no result: start the same command again"


def test_a_wish_is_read_from_words():
    assert read_wish(None, None) is None
    assert read_wish("multiplier within 5 %", None) == FIVE_PERCENT
    assert read_wish("multiplier within 2.5%", {"flops": 1e15, "seconds": None}) == Wish(
        math.log(1.025), 1e15, math.inf
    )


@pytest.mark.parametrize(
    ("until", "limit", "words"),
    [
        ("loss below 2", None, "until='loss below 2' is not understood: write until='multiplier within 5 %'"),
        ("multiplier within 0 %", None, "is not understood"),
        ("multiplier within 5 %", {"flops": -1}, "limit.flops=-1 must be above 0"),
        (None, {"seconds": 60}, "limit.seconds=60 must be above 0 and limits what `until` adds"),
    ],
)
def test_wishes_that_are_not_understood_say_what_to_write(until, limit, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read_wish(until, limit)
