"""Repeated data: the verdict follows from runs of equal seeds."""

import pandas as pd
import pytest

from experiments.data.token_data import beginning
from experiments.studies.repeated_data import RepeatedData, leads, summary

STUDY = RepeatedData("c", "s", "r", train_tokens=1, epochs=[1, 8], objectives=["b", "a"], seeds=[0, 1, 2])


def rows(losses):
    return pd.DataFrame(
        {"objective": o, "epochs": e, "seed": s, "bits_per_byte": x, "status": "done", "bits_per_byte_kind": "exact"}
        for (o, e), xs in losses.items()
        for s, x in enumerate(xs)
    )


def test_who_is_ahead_is_said_where_the_interval_of_paired_differences_leaves_zero_out():
    table = rows(
        {
            ("a", 1): [3.0, 3.2, 3.4], ("b", 1): [3.1, 3.31, 3.49],  # seeds differ more than objectives do
            ("a", 8): [3.0, 3.2, 3.4], ("b", 8): [2.5, 3.9, 3.1],
            ("a", 64): [4.0, 4.2, 4.1], ("b", 64): [3.0, 3.2, 3.1],
        }
    )  # fmt: skip
    assert leads(table, "b", "a") == {"a": [1], "b": [64]}
    means = summary(table).set_index(["objective", "epochs"])
    assert means.loc[("a", 1), "mean"] == pytest.approx(3.2)
    assert means.loc[("a", 1), "reach"] == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("challenger", "outcome"),
    [
        ([2.8, 3.0, 3.2], "holds"),
        ([3.2, 3.4, 3.6], "does not hold"),
        ([2.5, 3.9, 3.1], "cannot tell"),
        ([2.0], "cannot tell"),
    ],
)
def test_the_best_epochs_of_each_are_compared_seed_by_seed(challenger, outcome):
    first = {("a", 8): [3.0, 3.2, 3.41][: len(challenger)], ("a", 1): [5.0, 5.0, 5.0][: len(challenger)]}
    verdict = STUDY.verdict(rows(first | {("b", 1): [9.0] * len(challenger), ("b", 8): challenger}))
    assert verdict.outcome == outcome
    assert (verdict.effect is None) == (len(challenger) == 1)


def test_the_beginning_of_data_is_data_of_its_own(data):
    short = beginning(data, 100)
    assert len(short.train) == 100 and short.digest != data.digest and short.heldout is data.heldout
    with pytest.raises(ValueError, match="train_tokens=400001 must be from 1 to the 400000"):
        beginning(data, 400_001)
