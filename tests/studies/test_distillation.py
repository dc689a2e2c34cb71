"""Distillation: FLOPs are counted in three ways, and the verdict follows from what they make of the same runs."""

import math

import pandas as pd
import pytest

from experiments.studies.distillation import SCRATCH, Distilled, accounted, advantage

STUDENTS = {"small": {"distilled": {"forward": []}}}
STUDY = Distilled("c", "s", "r", teachers={}, students=STUDENTS, seeds=[0, 1, 2])
ENTROPY = 2.0


def table(distilled, seeds=3):
    """From scratch the distance to the entropy is 1 / FLOPs, by 1 % another for each seed; a distilled student has 8
    FLOPs, half of them its teacher's passes, whose training has cost 24."""
    rows = []
    for seed in range(seeds):
        factor = 1.01**seed
        for flops in (1.0, 4.0, 16.0, 64.0):
            rows.append({"method": SCRATCH, "flops": flops, "budget": flops, "seed": seed, "teaching": 0.0})
            rows[-1]["bits_per_byte"] = ENTROPY + factor / flops
        rows.append({"method": "forward", "flops": 8.0, "budget": 8.0, "seed": seed, "teaching": 0.5})
        rows[-1] |= {"flops_others": 24.0, "bits_per_byte": ENTROPY + distilled * factor**2}
    return pd.DataFrame(rows).assign(student="small", entropy=ENTROPY, status="done")


def test_a_distilled_student_is_compared_at_equal_flops_by_each_account():
    runs = accounted(table(0.1))
    found = {name: advantage(runs, "small", "forward", name).value for name in ("own_flops", "flops", "all_flops")}
    for name, flops in (("own_flops", 4.0), ("flops", 8.0), ("all_flops", 32.0)):
        assert found[name] == pytest.approx(1 / flops / 0.1 / 1.01)


def test_beyond_the_largest_budget_from_scratch_its_run_stands():
    rows = table(0.1)
    rows = rows[(rows.method != SCRATCH) | (rows.flops <= 16)]
    assert advantage(accounted(rows), "small", "forward", "all_flops").value == pytest.approx(1 / 16 / 0.1 / 1.01)


def test_the_interval_is_that_of_the_logarithm_over_seeds():
    found = advantage(accounted(table(0.1)), "small", "forward", "flops")
    reach = 4.303 * math.log(1.01) / 3**0.5
    assert math.log(found.high / found.value) == pytest.approx(reach, rel=1e-3)
    assert advantage(accounted(table(0.1, seeds=1)), "small", "forward", "flops") is None


@pytest.mark.parametrize(
    ("distilled", "outcome"),
    [
        (0.06, "holds"),
        (0.2, "does not hold"),  # worse though the teacher is there
        (0.02, "does not hold"),  # better though the teacher had to be trained
        (1 / 8 / 1.01, "cannot tell"),
    ],
)
def test_the_verdict_is_the_rule_applied_with_and_without_the_teachers_training(distilled, outcome):
    assert STUDY.verdict(table(distilled)).outcome == outcome


def test_without_seeds_nothing_can_be_told():
    assert STUDY.verdict(table(0.06, seeds=1)).outcome == "cannot tell"
