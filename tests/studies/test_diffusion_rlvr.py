"""Estimators of a diffusion policy's gradient: the verdict at equal FLOPs, and what is said of equal steps."""

import pandas as pd
import pytest

from experiments.studies.diffusion_rlvr import DiffusionRLVR
from experiments.studies.tuned import BASE

ARMS = {"trajectory": [], "bound": [], "one_step": []}
STUDY = DiffusionRLVR("c", "s", "r", models={}, tuning=[], arms=ARMS, seeds=[0, 1, 2], unbiased="trajectory")


def table(seeds=(0.0, 0.01, -0.01), **ends):
    """Runs whose pass@1 rises on a straight line from 0.1 to its end; the trajectory takes half as many steps."""
    found = [{"arm": BASE, "seed": 0, "id": "base", "step": 9, "pass@1": 0.1}]
    for arm, end in ends.items():
        last = 30 if arm == "trajectory" else 60
        for seed, more in enumerate(seeds):
            for part in (1 / 3, 2 / 3, 1):
                run = {"arm": arm, "seed": seed, "id": f"{arm} {seed}", "step": round(last * part)}
                found.append(run | {"pass@1": 0.1 + (end + more - 0.1) * part})
    return pd.DataFrame(found).assign(model="policy", length=6.0, **{"pass@16": 0.5})


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (table(trajectory=0.4, bound=0.3, one_step=0.2), "holds"),
        (table(trajectory=0.3, bound=0.2, one_step=0.4), "does not hold"),
        (table(trajectory=0.4, bound=0.4, one_step=0.2), "cannot tell"),
        (table(trajectory=0.4, bound=0.3), "cannot tell"),
        (table(seeds=[0.0], trajectory=0.4, bound=0.3, one_step=0.2), "cannot tell"),
    ],
    ids=["above", "below", "equal", "an arm missing", "one seed"],
)
def test_the_unbiased_estimator_is_compared_with_the_best_of_the_others(made, outcome):
    assert STUDY.verdict(made).outcome == outcome


def test_what_stands_at_equal_steps_is_read_off_between_two_evaluations():
    verdict = STUDY.verdict(table(trajectory=0.4, bound=0.3, one_step=0.2))
    assert "less by bound, the best of the others: 0.1 [" in verdict.sentence
    assert "trajectory 30, bound 60, one step 60" in verdict.sentence
    assert "after 30: trajectory 0.400, bound 0.200, one step 0.150" in verdict.sentence
