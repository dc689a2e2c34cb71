"""A dry run says what the design would tell apart, from the ledger's noise where there is one."""

import pytest

from experiments.scaling.results import Power, Remedy
from experiments.sweeps.adaptive import further_sizes
from experiments.sweeps.dry_run import describe, describe_power, power_sentence
from tests.sweeps.untrained import Untrained


def said(sweep, noise=0.01):
    return list(describe_power(sweep.plan, sweep.arms, sweep.plan.select("fit"), sweep.rows, noise))


def told_apart(lines):
    return [float(line.split("a multiplier of ")[1].split()[0]) for line in lines[1:]]


def test_the_power_follows_from_the_assumed_noise_until_a_ledger_knows_better():
    sweep = Untrained(tuning=None, noise=0.005, recentre=False, widen=0)
    before = said(sweep)
    assert before[0].startswith("For runs whose ln(loss) has a standard deviation of 0.01 (sweep.noise, assumed)")
    assert before[1].startswith("arm1 against arm0: a multiplier of 1.")
    assert told_apart(said(sweep, 0.005))[0] < told_apart(before)[0]
    sweep.carry_out("fit", further_sizes)
    after = said(sweep)
    assert after[0].startswith("For runs that scatter as those in the ledger do (0.00")
    assert told_apart(after) == pytest.approx(told_apart(said(sweep, 0.1))), "the assumption is of no matter then"
    assert told_apart(after)[0] == pytest.approx(told_apart(before)[0] ** 0.5, rel=0.02)


def test_an_arm_of_another_objective_is_taken_to_have_a_floor_of_its_own():
    same, other = Untrained(tuning=None), Untrained(tuning=None)
    other.arms["arm1"].config.objective.name = "masked_diffusion"
    assert told_apart(said(other))[0] > told_apart(said(same))[0]


def test_the_sentence_says_what_smaller_multipliers_would_take():
    power = Power(1.2, (Remedy(1.05, None, 0.123, 1e12), Remedy(1.1, 3, 0.456, 1e12)))
    assert power_sentence(power) == (
        "a multiplier of 1.200 is told from 1 in 80 % of repetitions; 1.05 would take no number of seeds, or is told "
        "in 12% of them with one more budget, 1e+12 FLOPs for both arms; 1.1 would take 3 seeds of every size, or is "
        "told in 46% of them with one more budget, 1e+12 FLOPs for both arms"
    )


def test_sizes_that_are_a_guess_are_said_to_be():
    sweep = Untrained(tuning=None)
    sweep.carry_out("fit", further_sizes)  # for the seconds
    lines = [line for line in describe(sweep.plan, sweep.arms, sweep.plan.select("fit"), sweep.rows, 0.01)]
    assert any("Sizes from the third budget on are a guess" in str(line) for line in lines)
