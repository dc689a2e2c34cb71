"""The comparison finds what was put into synthetic sweeps, and does not find what was not."""

import numpy as np
import pytest

from experiments.scaling import compare

HALF = {"level": 3.0 * 0.5**0.08}  # the reference's law at twice the compute


def against_reference(sweep):
    return sweep.analyse().comparisons[0]


@pytest.mark.parametrize(
    ("law", "outcome", "multiplier"),
    [
        (HALF, "better", 2.0),
        ({"level": 3.0 * 2**0.08}, "worse", 0.5),
        ({}, "no difference at this scale", 1.0),
        ({"level": 3.2, "slope": 0.16}, "crosses over", None),
    ],
)
def test_the_verdict_is_the_truth(make_sweep, law, outcome, multiplier):
    found = against_reference(make_sweep({"reference": {}, "new": law}, noise=0.001))
    assert found.verdict.outcome == outcome and outcome in found.verdict.sentence
    assert found.verdict.effect == found.multipliers[-1].estimate and found.verdict.rule == compare.RULE
    if multiplier:
        for m in found.multipliers:
            assert multiplier in m.estimate
            assert m.estimate.value == pytest.approx(multiplier, rel=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize("repeats", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_intervals_cover_the_true_slope_and_multiplier_about_as_often_as_they_say(make_sweep, repeats):
    slope = multiplier = inside = 0
    for seed in range(repeats):
        got = make_sweep({"reference": {}, "new": HALF}, noise=0.005, seed=seed).analyse(predict=True)
        found = got.comparisons[0]
        slope += 0 in found.slope_difference
        multiplier += 2 in found.multipliers[1].estimate
        inside += got.arms["new"].holdout.inside
    # Binomial: at a true 0.95 fewer than 0.85 of 40 is a chance of 1 in 70; too wide is no error but a cost.
    assert slope / repeats >= 0.85 and multiplier / repeats >= 0.85 and inside / repeats >= 0.8


def test_a_bound_is_named_in_the_verdict(make_sweep):
    got = make_sweep({"reference": {}, "new": {"level": 4.0, "kind": "bound"}}, noise=0.001).analyse()
    assert got.arms["new"].bound and not got.arms["reference"].bound
    assert got.comparisons[0].bounds == ("new",)
    assert "new is an upper bound" in got.comparisons[0].verdict.sentence


def test_the_paired_difference_is_that_of_the_same_held_out_sequences(make_sweep, tmp_path):
    sweep = make_sweep({"reference": {}, "new": HALF})
    folder = sweep.write(tmp_path / "sweep")
    found = compare.paired_difference(sweep.rows, sweep.design, "new", "reference", folder)
    rows, best = sweep.rows, []
    for arm in ("new", "reference"):
        mine = rows[(rows.arm == arm) & (rows.kind == "fit") & (rows.budget_flops == 8e12)]
        best.append(sweep.nats[mine.loc[mine.bits_per_byte.idxmin()].id])
    assert found.bits_per_byte == pytest.approx((best[0] - best[1]).sum() / np.log(2) / 8192)
    assert compare.paired_difference(sweep.rows, sweep.design, "new", "reference", tmp_path / "elsewhere") is None


def test_without_three_common_budgets_the_verdict_is_cannot_tell(make_sweep):
    sweep = make_sweep({"reference": {}, "new": {}}, noise=0.001)
    sweep.rows = sweep.rows[(sweep.rows.arm == "reference") | ~sweep.rows.budget_flops.isin([2e12, 4e12])]
    found = against_reference(sweep)
    assert found.budgets == (1e12, 8e12) and found.multipliers == () and found.slope_difference is None
    assert found.verdict.outcome == "cannot tell" and "only 2 budgets" in found.verdict.sentence
    assert found.verdict.effect is None


def test_too_much_noise_is_cannot_tell_and_not_no_difference(make_sweep):
    found = against_reference(make_sweep({"reference": {}, "new": {}}, noise=0.03, seed=3))
    widest = max(m.estimate.high / m.estimate.low for m in found.multipliers)
    assert widest > compare.MARGIN**2 and found.verdict.outcome == "cannot tell"


@pytest.mark.thorough
def test_equal_arms_are_hardly_ever_told_apart(make_sweep):
    found = [against_reference(make_sweep({"a": {}, "b": {}}, 0.005, seed)).verdict.outcome for seed in range(20)]
    assert sum(outcome in ("better", "worse", "crosses over") for outcome in found) <= 3


@pytest.mark.parametrize(("level", "far"), [(3.0 * 0.5**0.08, False), (4.5, True)])
def test_a_multiplier_far_outside_the_references_budgets_is_said_to_be_extrapolated(make_sweep, level, far):
    found = against_reference(make_sweep({"reference": {}, "new": {"level": level}}, noise=0.001))
    assert all(m.extrapolated == far for m in found.multipliers)
    assert ("read its sign" in found.verdict.sentence) == far
