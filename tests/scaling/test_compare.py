"""The comparison finds what was put into synthetic sweeps, and does not find what was not."""

import json

import numpy as np
import pytest

from experiments.harness import ledger
from experiments.scaling import compare

HALF = {"level": 3.0 * 0.5**0.08}  # the reference's law at twice the compute


def analyse(folder, predict=False):
    rows, plan = ledger.read(folder / "ledger.jsonl"), json.loads((folder / "plan.json").read_text())
    prediction = compare.predict(rows, plan) if predict else None
    return compare.analyse(rows, plan, prediction, folder)


def test_noise_free_laws_are_recovered(make_sweep):
    got = analyse(make_sweep({"a": {}, "b": {"slope": 0.1, "level": 3.1}}), predict=True)
    for name, slope in (("a", -0.08), ("b", -0.1)):
        law = got["arms"][name]["law"]
        assert law["slope"] == pytest.approx(slope, rel=1e-2)
        assert law["size_exponent"] == pytest.approx(0.5, rel=1e-3)
        assert got["arms"][name]["holdout"]["predicted"] == pytest.approx(
            got["arms"][name]["holdout"]["bits_per_byte"], rel=1e-2
        )
    assert got["comparisons"][0]["slope_difference"] == pytest.approx(-0.02, rel=2e-2)


@pytest.mark.parametrize(
    ("law", "word", "multiplier"),
    [
        (HALF, "better", 2.0),
        ({"level": 3.0 * 2**0.08}, "worse", 0.5),
        ({}, "no difference at this scale", 1.0),
        ({"level": 3.2, "slope": 0.16}, "crosses over", None),
    ],
)
def test_the_verdict_is_the_truth(make_sweep, law, word, multiplier):
    found = analyse(make_sweep({"reference": {}, "new": law}, noise=0.001))["comparisons"][0]
    assert found["verdict"] == word and word in found["sentence"]
    if multiplier:
        for m in found["multipliers"]:
            assert m["interval"][0] <= multiplier <= m["interval"][1]
            assert m["value"] == pytest.approx(multiplier, rel=0.1)


@pytest.mark.parametrize("repeats", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_intervals_cover_the_true_slope_and_multiplier_about_as_often_as_they_say(make_sweep, repeats):
    slope = multiplier = inside = 0
    for seed in range(repeats):
        got = analyse(make_sweep({"reference": {}, "new": HALF}, noise=0.005, seed=seed), predict=True)
        found = got["comparisons"][0]
        slope += found["slope_interval"][0] <= 0 <= found["slope_interval"][1]
        multiplier += found["multipliers"][1]["interval"][0] <= 2 <= found["multipliers"][1]["interval"][1]
        inside += got["arms"]["new"]["holdout"]["inside"]
    # Binomial: at a true 0.95 fewer than 0.85 of 40 is a chance of 1 in 70; too wide is no error but a cost.
    assert slope / repeats >= 0.85 and multiplier / repeats >= 0.85 and inside / repeats >= 0.8


def test_a_bound_is_named_in_the_verdict(make_sweep):
    got = analyse(make_sweep({"reference": {}, "new": {"level": 4.0, "kind": "bound"}}, noise=0.001))
    assert got["arms"]["new"]["bound"] and not got["arms"]["reference"]["bound"]
    assert "new is an upper bound" in got["comparisons"][0]["sentence"]


def test_edge_minima_are_refused_and_said(make_sweep):
    got = analyse(make_sweep({"reference": {}, "new": {}}, shift=1.5))
    assert all("edge minimum" in m["refused"] for m in got["arms"]["new"]["minima"])
    assert "refused" in got["arms"]["new"]["law"] and any("edge minimum" in w for w in got["arms"]["new"]["warnings"])
    assert got["comparisons"][0]["verdict"] == "cannot tell"


def test_a_learning_rate_at_the_edge_of_its_grid_is_said(make_sweep):
    folder = make_sweep({"reference": {}})
    rows, plan = ledger.read(folder / "ledger.jsonl"), json.loads((folder / "plan.json").read_text())
    rows.loc[(rows.kind == "tune") & (rows.learning_rate == 0.02), "bits_per_byte"] = 1.0
    warnings = compare.analyse(rows, plan)["arms"]["reference"]["warnings"]
    assert any("learning rate 0.02 is at the edge" in w for w in warnings)


def test_a_flat_curve_gives_its_loss_but_not_its_size(make_sweep):
    got = analyse(make_sweep({"reference": {"curvature": 0.0}}, noise=0.01, seed=5))
    minima = [m for m in got["arms"]["reference"]["minima"] if not m["refused"]]
    flat = [m for m in minima if m["params"] is None]
    assert flat and all(m["bits_per_byte"] and "its size is not" in m["flags"][0] for m in flat)


def test_the_paired_difference_is_that_of_the_same_held_out_sequences(make_sweep):
    folder = make_sweep({"reference": {}, "new": HALF})
    found = analyse(folder)["comparisons"][0]["paired"]
    rows = ledger.read(folder / "ledger.jsonl")
    best = []
    for arm in ("new", "reference"):
        mine = rows[(rows.arm == arm) & (rows.kind == "fit") & (rows.budget_flops == 8e12)]
        best.append(np.load(folder / "cells" / mine.loc[mine.bits_per_byte.idxmin()].id / "heldout_nats.npy"))
    assert found["bits_per_byte"] == pytest.approx((best[0] - best[1]).sum() / np.log(2) / 8192)


def test_a_prediction_is_made_from_fitted_budgets_alone(make_sweep):
    folder = make_sweep({"reference": {}}, noise=0.002)
    rows, plan = ledger.read(folder / "ledger.jsonl"), json.loads((folder / "plan.json").read_text())
    assert compare.predict(rows, plan) == compare.predict(rows[rows.kind == "fit"], plan)


def test_a_learning_rate_below_one_that_diverged_is_not_at_the_edge(make_sweep):
    folder = make_sweep({"reference": {}})
    rows, plan = ledger.read(folder / "ledger.jsonl"), json.loads((folder / "plan.json").read_text())
    rows.loc[(rows.kind == "tune") & (rows.learning_rate == 0.02), ["status", "bits_per_byte"]] = ["diverged", None]
    assert compare.analyse(rows, plan)["arms"]["reference"]["warnings"] == []


def test_too_much_noise_is_cannot_tell_and_not_no_difference(make_sweep):
    found = analyse(make_sweep({"reference": {}, "new": {}}, noise=0.03, seed=3))["comparisons"][0]
    widest = max(m["interval"][1] / m["interval"][0] for m in found["multipliers"])
    assert widest > compare.MARGIN**2 and found["verdict"] == "cannot tell"


def test_equal_arms_are_hardly_ever_told_apart(make_sweep):
    words = [analyse(make_sweep({"a": {}, "b": {}}, 0.005, seed))["comparisons"][0]["verdict"] for seed in range(20)]
    assert sum(word in ("better", "worse", "crosses over") for word in words) <= 3


def test_a_prediction_allows_for_losses_that_level_off(make_sweep):
    folder = make_sweep({"reference": {}}, noise=0.001)
    rows, plan = ledger.read(folder / "ledger.jsonl"), json.loads((folder / "plan.json").read_text())
    said = compare.predict(rows, plan)["arms"]["reference"]
    good = [m for m in compare.minima_of(compare.finished(rows, "fit"), plan["budgets"]) if not m.refused]
    floor = 0.75 * min(m.loss for m in good)
    law = compare.loss_law(good, compare.centre_of(plan), floor)
    levelled = floor + np.exp(law.at(np.log(plan["holdout_budget"])))
    assert said["bits_per_byte"] < levelled < said["interval"][1]


@pytest.mark.parametrize(("level", "far"), [(3.0 * 0.5**0.08, False), (4.5, True)])
def test_a_multiplier_far_outside_the_references_budgets_is_said_to_be_extrapolated(make_sweep, level, far):
    found = analyse(make_sweep({"reference": {}, "new": {"level": level}}, noise=0.001))["comparisons"][0]
    assert all(m["extrapolated"] == far for m in found["multipliers"])
    assert ("read its sign" in found["sentence"]) == far
