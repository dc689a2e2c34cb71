"""Recall: the best learning rate of a point counts, and the verdict follows from ranks."""

import pandas as pd
import pytest

from experiments.studies.recall import Recall, best, rank_correlation

STUDY = Recall("c", "s", "r", steps=1, learning_rates=[0.1], full_attention="attention", curves={})


def table(recurrent, attention=(1.0, 0.99)):
    """Points of a recurrent curve at doubling bytes, and of attention."""
    rows = [("recurrent", True, 100.0 * 2**i, x) for i, x in enumerate(recurrent)]
    rows += [("attention", False, 5000.0 * 2**i, x) for i, x in enumerate(attention)]
    frame = pd.DataFrame(rows, columns=["curve", "recurrent", "state_bytes", "accuracy@2"])
    return frame.assign(status="done", learning_rate=0.1, **{"accuracy@16": frame["accuracy@2"]})


def test_the_best_learning_rate_of_each_point_counts():
    slow, fast = table([0.1, 0.2, 0.3, 0.4]), table([0.2, 0.1, 0.5, 0.9])
    shown = best(pd.concat([slow, fast.assign(learning_rate=0.2), fast.assign(learning_rate=9, status="diverged")]))
    recurrent = shown[shown.recurrent].sort_values("state_bytes")
    assert recurrent["accuracy@16"].tolist() == [0.2, 0.2, 0.5, 0.9]
    assert recurrent.learning_rate.tolist() == [0.2, 0.1, 0.2, 0.2]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recurrent", "attention", "outcome"),
    [
        ([0.1, 0.2, 0.4, 0.5, 0.7, 0.9, 0.95, 1.0], (1.0, 0.99), "holds"),
        ([0.1, 0.2, 0.4, 0.5, 0.7, 0.9, 0.95, 1.0], (1.0, 0.8), "cannot tell"),
        ([0.1, 0.2, 0.4, 0.5, 0.7, 0.9, 0.95, 1.0], (1.0, 0.4), "does not hold"),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], (1.0, 1.0), "does not hold"),
        ([0.1, 0.9, 0.2, 0.5, 0.4, 0.6, 0.95, 0.7], (1.0, 1.0), "cannot tell"),
        ([0.1, 0.9], (1.0, 1.0), "cannot tell"),
    ],
)
def test_the_verdict_is_the_rule_applied_to_the_hardest_task(recurrent, attention, outcome):
    verdict = STUDY.verdict(table(recurrent, attention))
    assert verdict.outcome == outcome and verdict.rule == "r"


@pytest.mark.thorough
def test_the_interval_of_a_rank_correlation_holds_its_value():
    x = pd.Series(range(10))
    for y in (x, -x, x % 3):
        estimate = rank_correlation(x, y)
        assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
