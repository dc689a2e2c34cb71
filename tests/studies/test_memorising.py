"""Memorising: the two steps of a run, and the verdict from made curves."""

import numpy as np
import pandas as pd
import pytest

from experiments.studies.memorising import Memorising, steps_of

STUDY = Memorising("c", "s", "r", data={}, arms={"a": {}, "b": {}}, epochs=100, least=0.1, seeds=[0, 1, 2])
STEPS = np.arange(10, 1001, 10)


def table(**arms):
    """Runs that know what they read from one step on and the rest from another, in three seeds a step or two later."""
    rows = []
    for arm, (read, heldout) in arms.items():
        for seed in range(3):
            for step in STEPS:
                curve = {"train": float(step >= read + 20 * seed), "heldout": float(step >= heldout + 10 * seed)}
                rows.append({"arm": arm, "seed": seed, "status": "done", "step": step} | curve)
    return pd.DataFrame(rows)


NEVER = 2000


@pytest.mark.parametrize(
    ("a", "b", "outcome"),
    [
        ((100, 400), (200, 900), "holds"),
        ((100, 400), (900, 900), "does not hold"),  # no lead: what is read is never known before the rest
        ((100, 400), (380, 400), "cannot tell"),  # by one seed it does not
        ((100, NEVER), (200, 900), "cannot tell"),  # nothing generalises
    ],
)
def test_the_verdict_holds_only_where_every_arm_memorises_first(a, b, outcome):
    verdict = STUDY.verdict(table(a=a, b=b))
    assert verdict.outcome == outcome and verdict.rule == "r"


def test_a_run_memorises_at_half_of_its_largest_lead_and_generalises_at_half_of_its_best():
    train, heldout = np.minimum(STEPS / 500, 1), 0.5 * np.minimum(STEPS / 100, 1)
    run = pd.DataFrame({"arm": "a", "seed": 0, "status": "done", "step": STEPS, "train": train, "heldout": heldout})
    (found,) = steps_of(run, 0.1).itertuples()
    assert (found.memorised, found.generalised) == (380, 50)  # the lead ends at 0.5
    assert (found.lead, found.best) == pytest.approx((0.5, 0.5))
    (found,) = steps_of(run, 0.7).itertuples()
    assert found.memorised == 1000


@pytest.mark.parametrize("arms", [{"a": (100, 400)}, {"a": (100, NEVER), "b": (100, NEVER)}])
def test_arms_without_runs_that_generalise_are_too_few_and_the_figure_is_drawn_of_what_is_there(arms):
    rows = table(**arms)
    assert STUDY.verdict(rows).outcome == "cannot tell"
    assert [len(axes.lines) for axes in STUDY.figure(rows).axes] == [6 * (name in arms) for name in ("a", "b")]


def test_an_arm_with_unknown_data_is_refused():
    study = Memorising("c", "s", "r", data={}, arms={"a": {"data": "sums"}}, epochs=1, least=0.1, seeds=[0])
    with pytest.raises(ValueError, match="has an arm with the data 'sums'"):
        list(study.cells(None))
