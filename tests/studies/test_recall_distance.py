"""Recall by distance: the worst range and the slope, and the verdicts that follow."""

from dataclasses import replace

import pandas as pd
import pytest

from experiments import study as command
from experiments.studies import recall_distance
from experiments.studies.recall_distance import RecallDistance
from experiments.studies.study import Cell

WORST = RecallDistance(
    "c", "s", "r", {"full": [], "delta": [], "linear": []}, better=["full"], than=["delta", "linear"], margin=0.95,
    shares={}, begins={}, learning_rates=[0.01], widen=0, tuning_seed=1000, seeds=[0, 1, 2], judged="worst",
)  # fmt: skip
SLOPE = replace(WORST, better=["delta"], than=["linear"], margin=0.0, judged="slope")


def table(**values):
    """Runs by variant, one value per seed in both columns that are judged."""
    rows = [
        {"variant": name, "stage": "compare", "seed": seed, "learning_rate": 0.01, "status": "done", "all": 0.5,
         "state_bytes": 2048, "worst": x, "slope": x}
        for name, xs in values.items()
        for seed, x in enumerate(xs)
    ]  # fmt: skip
    return pd.DataFrame([*rows, {"variant": "full", "stage": "tune", "seed": 1000, "status": "done", "worst": 0.0}])


@pytest.mark.parametrize(
    ("full", "delta", "outcome", "read_from"),
    [
        ([1.0, 0.99, 1.0], [0.6, 0.7, 0.8], "holds", "full"),
        ([1.0, 0.99, 1.0], [1.0, 0.99, 0.99], "does not hold", "delta"),
        ([0.7, 0.72, 0.71], [0.1, 0.2, 0.3], "does not hold", "full"),
        ([1.0, 0.8, 1.0], [0.1, 0.2, 0.3], "cannot tell", "full"),
        ([1.0], [0.1], "cannot tell", "full"),
    ],
)
def test_full_attention_must_miss_nowhere_and_the_others_somewhere(full, delta, outcome, read_from):
    verdict = WORST.verdict(table(full=full, delta=delta, linear=[0.1, 0.1, 0.12][: len(full)]))
    assert verdict.outcome == outcome and read_from in verdict.sentence and verdict.rule == "r"


@pytest.mark.parametrize(
    ("delta", "linear", "outcome", "read_from"),
    [
        ([0.0, -0.01, 0.0], [-0.1, -0.11, -0.1], "holds", "linear"),
        ([-0.2, -0.21, -0.2], [-0.1, -0.11, -0.1], "does not hold", "delta less linear"),
        ([0.2, 0.21, 0.2], [0.1, 0.11, 0.1], "does not hold", "linear"),
        ([-0.1, -0.12, -0.09], [-0.1, -0.11, -0.1], "cannot tell", "delta less linear"),
    ],
)
def test_the_fixed_state_must_forget_with_distance_and_the_selective_one_less(delta, linear, outcome, read_from):
    verdict = SLOPE.verdict(table(full=[0.0, 0.0, 0.0], delta=delta, linear=linear))
    assert verdict.outcome == outcome and f"Read from {read_from}" in verdict.sentence
    assert "(0.500; 2,048)" in verdict.sentence


def test_slopes_are_compared_seed_by_seed():
    verdict = SLOPE.verdict(table(delta=[-0.01, -0.11, -0.21], linear=[-0.1, -0.2, -0.3]))
    assert verdict.outcome == "cannot tell" and "Read from linear" in verdict.sentence  # their difference is the same


def test_what_was_not_run_is_too_little(monkeypatch):
    assert SLOPE.verdict(table(linear=[-0.1, -0.1])).effect is None


def test_the_slope_is_per_doubling_and_the_worst_range_of_all_distances(monkeypatch):
    report = pd.DataFrame({"first": [1, 2, 4, 8], "accuracy": [1.0, 0.9, 0.8, 0.7], "answers": [10, 30, 30, 10]})
    monkeypatch.setattr(recall_distance, "recall_by_distance", lambda finished: report)
    (found,) = WORST.measure(Cell({"stage": "compare"}, None), None)
    assert found["slope"] == pytest.approx(-0.1) and found["worst"] == 0.7 and found["all"] == pytest.approx(0.85)
    assert found["@8"] == 0.7 and WORST.measure(Cell({"stage": "tune"}, None), None) == [{}]


def test_nothing_else_is_judged():
    with pytest.raises(ValueError, match="study.judged=mean must be one of worst, slope"):
        replace(WORST, judged="mean")


@pytest.mark.thorough
def test_all_variants_have_the_same_flops_and_a_fraction_for_every_distance(tmp_path):
    command.run_study("recall_distance", [f"session.root={tmp_path}"], True, tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    assert rows.flops.max() < 1.1 * rows.flops.min() and len(rows) == 2 * 6
    assert rows[[column for column in rows if column.startswith("@")]].notna().all(axis=None)
