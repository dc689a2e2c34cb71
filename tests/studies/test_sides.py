"""Variants on the sides of a threshold: all there, one on the other side, or not to be told and what it would take."""

import math
import re

import pandas as pd
import pytest
from scipy.special import stdtrit

from experiments.findings import Estimate
from experiments.studies.sides import on_their_sides, seeds_to_tell

HIGH, LOW, AT = [1.9, 2.0, 2.1], [-0.1, 0.0, 0.1], [0.8, 1.0, 1.2]


@pytest.mark.parametrize(
    ("runs", "outcome", "read_from"),
    [
        ({"a": HIGH, "b": [1.7, 1.7, 1.8], "c": LOW}, "holds", "b"),
        ({"a": HIGH, "b": LOW, "c": LOW}, "does not hold", "b"),
        ({"a": HIGH, "b": HIGH, "c": HIGH}, "does not hold", "c"),
        ({"a": AT, "b": HIGH, "c": [2.4, 2.5, 2.6]}, "does not hold", "c"),
        ({"a": HIGH, "b": AT, "c": LOW}, "cannot tell", "b"),
        ({"a": HIGH, "b": HIGH, "c": [0.0, 0.0, 1.2]}, "cannot tell", "c"),
        ({"a": HIGH, "b": [2.0, None, None], "c": LOW}, "cannot tell", "b"),
        ({"a": HIGH, "c": LOW}, "cannot tell", "b"),
    ],
)
def test_all_variants_must_lie_on_their_sides(runs, outcome, read_from):
    found, name, effect = on_their_sides(pd.DataFrame(runs, dtype=float), above=["a", "b"], below=["c"], threshold=1.0)
    assert (found, name) == (outcome, read_from)
    few = len(pd.Series(runs.get(name, []), dtype=float).dropna()) < 2
    assert effect is None if few else effect.value == pytest.approx(sum(runs[name]) / 3)


def test_the_interval_is_that_of_the_mean_of_three_seeds():
    _, _, effect = on_their_sides(pd.DataFrame({"a": [1.0, 2.0, 3.0]}), above=["a"], below=[], threshold=0.0)
    assert effect.high - effect.value == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("distance", [0.3, -0.5])
def test_with_as_many_seeds_as_are_named_and_no_fewer_the_interval_leaves_the_threshold_out(distance, groups):
    def half(seeds):
        return stdtrit(groups * (seeds - 1), 0.975) / math.sqrt(seeds)

    effect = Estimate(1 + distance, 1 + distance - half(3), 1 + distance + half(3))
    said = seeds_to_tell("cannot tell", effect, 1.0, seeds=3, groups=groups)
    needed = int(re.fullmatch(r" To tell would take about (\d+) seeds\.", said)[1])
    assert half(needed) < abs(distance) <= half(needed - 1)


def test_nothing_is_asked_for_what_is_told_and_no_number_named_for_no_difference():
    assert seeds_to_tell("holds", Estimate(2.0, 1.5, 2.5), 1.0, seeds=3) == ""
    assert seeds_to_tell("cannot tell", Estimate(1.0, 0.5, 1.5), 1.0, seeds=3) == " Not even 1000 seeds would tell."
