"""Numbers are written as a reader wants them, and each question has its sentence."""

from dataclasses import replace

import pytest

from experiments import findings
from experiments.findings import Estimate, Refused
from experiments.report import wording
from tests.report import planted


@pytest.mark.parametrize(
    "x, text",
    [
        (1.2, "1.20"), (0.0441, "0.0441"), (123.4, "123"), (12345, "12,345"), (2.4e11, "2.4e11"), (-0.09, "−0.0900"),
        (1e-5, "1e-5"), (0, "0"), (None, "–"), (float("nan"), "–"), (float("-inf"), "−∞"),
    ],
)  # fmt: skip
def test_a_number_has_three_digits_and_no_plus_in_its_exponent(x, text):
    assert findings.number(x) == text


@pytest.mark.parametrize(
    "ends, text",
    [
        ((1.22, 0.93, 1.61), "1.22 [0.93, 1.61]"),
        ((-0.092, -0.103, -0.081), "−0.092 [−0.103, −0.081]"),
        ((0.031, 0.019, 0.048), "0.031 [0.019, 0.048]"),
        ((0.02, 0.001, 50.0), "0.020 [0.0010, 50]"),
        ((1.5, 1.1, float("inf")), "1.5 [1.1, ∞]"),
        ((2.0, 2.0, 2.0), "2.0 [2.0, 2.0]"),
    ],
)
def test_an_estimate_has_the_digits_that_its_interval_tells(ends, text):
    assert findings.number(Estimate(*ends)) == text


@pytest.mark.parametrize("x, text", [(12, "12"), (999, "999"), (66911, "66.9k"), (999_999, "1M"), (1.2e9, "1.2B")])
def test_a_count_is_short(x, text):
    assert findings.count(x) == text


def test_the_verdicts_come_first_and_the_warnings_last():
    lines = wording.sentences(planted.analysis())
    assert ["better" in line or "cannot tell" in line or "worse" in line for line in lines[:2]] == [True, True]
    assert lines[2].startswith(planted.REFERENCE) and "inside the interval" in lines[2] and "OUTSIDE" in lines[4]
    assert [line.startswith("warning") for line in lines] == [False] * 8 + [True] * 2


def test_predictions_are_counted_here_and_in_all_sweeps_of_the_folder():
    analysis = planted.analysis()
    assert wording.prediction_sentence(analysis).startswith("2 of 3 outcomes at 9.6e11 FLOPs")
    assert wording.prediction_sentence(analysis).endswith("8 of 9.")
    assert "beside" not in wording.prediction_sentence(replace(analysis, record=None))
    assert wording.prediction_sentence(replace(analysis, arms={})) is None


def test_the_largest_source_of_error_is_named_with_its_share_of_the_variance():
    said = wording.error_sentence(planted.analysis())
    assert f"86 % for {planted.HYBRID}" in said and "chance in the runs" in said


def test_more_seeds_are_not_offered_where_no_number_of_them_is_enough():
    none, three = wording.remedies(planted.analysis().comparisons[0])
    assert none.startswith("to tell 1.10: no number of seeds") and "power 31 %" in none
    assert three.startswith("to tell 1.25: 3 seeds per cell")


def test_an_arm_without_a_law_says_why():
    arm = replace(planted.analysis().arms[planted.HYBRID], law=Refused("2 budgets, 3 are needed"))
    assert wording.arm_sentence(arm, "bits per byte") == f"{planted.HYBRID}: no scaling law, 2 budgets, 3 are needed"
