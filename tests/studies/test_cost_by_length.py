"""Costs by length: the rule on made tables, and the length from which on one model is cheaper."""

import itertools

import pandas as pd
import pytest

from experiments.studies.cost_by_length import CostByLength, crossing

LENGTHS = [100, 200, 400, 800]


def study(**changes):
    settings = {"arms": {"full": [], "scan": []}, "quadratic": ["full"], "linear": ["scan"], "lengths": LENGTHS}
    settings |= {"last": 3, "counted": [], "repeats": 3, "between": [1.3, 1.7]}
    return CostByLength("c", "s", "r", **settings | changes)


def table(slopes, wobble=0.0):
    """Seconds T^slope, each repeat's slope a little another one; the scan costs 50 times as much at one token."""
    rows = []
    for (name, slope), T, repeat in itertools.product(slopes.items(), LENGTHS, range(3)):
        seconds = (50 if name == "scan" else 1) * T ** (slope + wobble * (repeat - 1))
        rows.append({"arm": name, "length": T, "repeat": repeat} | dict.fromkeys(("seconds", "next_seconds"), seconds))
    return pd.DataFrame(rows).assign(flops=1.0)


@pytest.mark.parametrize(
    ("full", "scan", "wobble", "outcome"),
    [
        (2.0, 1.0, 0.01, "holds"),
        (1.5, 1.0, 0.01, "does not hold"),
        (2.0, 1.5, 0.01, "does not hold"),
        (1.8, 1.0, 0.2, "cannot tell"),
    ],
)
def test_the_slopes_of_both_kinds_are_asked_for(full, scan, wobble, outcome):
    verdict = study().verdict(table({"full": full, "scan": scan}, wobble))
    assert verdict.outcome == outcome and verdict.effect.value == pytest.approx(full)


@pytest.mark.parametrize(("full", "scan", "length"), [(2.0, 1.0, "100"), (1.7, 1.0, "400"), (1.0, 1.0, "none")])
def test_a_model_is_cheaper_from_the_length_on_after_which_it_never_costs_more(full, scan, length):
    assert crossing(table({"full": full, "scan": scan}), "full", "scan", "seconds") == length


def test_an_arm_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="study judges 'gru': choose from full, scan"):
        list(study(linear=["gru"]).cells(lambda overrides: None))
