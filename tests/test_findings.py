"""A number is printed and written with its interval, and a verdict is one of the words that were agreed on."""

import json
import math

import numpy as np
import pytest

from experiments.findings import OUTCOMES, Estimate, Refused, Verdict, jsonable, write_json


@pytest.mark.parametrize(
    ("specification", "text"), [("", "1.33 [0.963, 1.7]"), (".2f", "1.33 [0.96, 1.70]"), ("+.1f", "+1.3 [+1.0, +1.7]")]
)
def test_an_estimate_is_printed_with_its_interval(specification, text):
    assert format(Estimate(1.333, 0.963, 1.7), specification) == text


def test_an_estimate_contains_the_numbers_of_its_interval():
    estimate = Estimate(1.5, 1.0, 2.0)
    assert 1.0 in estimate and 2.0 in estimate and 0.999 not in estimate and 2.001 not in estimate


def test_an_increasing_function_moves_an_estimate_with_its_interval():
    assert Estimate(0.0, -1.0, 2.0).map(math.exp) == Estimate(1.0, math.exp(-1), math.exp(2))


def test_an_interval_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="from 2 to 1 is the wrong way round"):
        Estimate(1.5, 2, 1)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_verdict_says_its_outcome_sentence_effect_and_rule(outcome):
    got = jsonable(Verdict(outcome, "It does.", Estimate(1.0, 0.5, 2.0), "If above 0."))
    effect = {"value": 1.0, "low": 0.5, "high": 2.0}
    assert got == {"outcome": outcome, "sentence": "It does.", "effect": effect, "rule": "If above 0."}


def test_a_verdict_of_another_outcome_is_refused():
    with pytest.raises(ValueError, match="outcome 'maybe' is none of 'holds', 'does not hold', 'cannot tell'"):
        Verdict("maybe", "", None, "")


def test_what_is_not_finite_becomes_null_in_the_json(tmp_path):
    content = {"x": np.float64("nan"), "y": (np.int64(3), np.inf), "z": np.bool_(True), 1: [Refused("no runs")]}
    write_json(tmp_path / "sub" / "a.json", content)
    expected = {"x": None, "y": [3, None], "z": True, "1": [{"refused": "no runs"}]}
    assert json.loads((tmp_path / "sub" / "a.json").read_text()) == expected
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.json"]
