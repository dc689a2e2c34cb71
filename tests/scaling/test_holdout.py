"""A prediction uses the fitted budgets alone, allows for what they cannot know, and is scored by what comes."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.findings import Refused, write_json
from experiments.scaling import holdout
from experiments.scaling.results import Forecast, PredictionRecord, read_prediction


def test_a_prediction_is_made_from_fitted_budgets_alone(make_sweep):
    sweep = make_sweep({"reference": {}}, noise=0.002)
    before = holdout.predict(sweep.rows[sweep.rows.kind == "fit"], sweep.design, sweep.predict().written)
    assert isinstance(before.arms["reference"], Forecast) and before == sweep.predict()


@pytest.mark.thorough
@pytest.mark.parametrize("repeats", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_intervals_of_predictions_hold_as_often_as_they_say_and_say_something(make_sweep, repeats):
    inside, widths, gain = 0, [], []
    for seed in range(repeats):
        held = make_sweep({"reference": {}}, noise=0.01, seed=seed).analyse(predict=True).arms["reference"].holdout
        inside += held.inside
        widths.append(held.predicted.high - held.predicted.low)
    truth = make_sweep({"reference": {}}).rows
    best = truth[truth.kind != "tune"].groupby("budget_flops").bits_per_byte.min()
    gain = best[8e12] - best[3.2e13]
    # Binomial: at a true 0.95 fewer than 0.85 of 20 is a chance of 1 in 13, of 200 fewer than 0.92 one of 1 in 20.
    assert inside / repeats >= (0.92 if repeats > 100 else 0.8)
    assert np.mean(widths) < 0.75 * gain


def test_an_arm_with_too_few_runs_is_not_predicted_and_its_outcome_is_still_given(make_sweep):
    sweep = make_sweep({"reference": {}, "new": {}})
    sweep.rows = sweep.rows[(sweep.rows.arm != "new") | (sweep.rows.kind == "holdout")]
    said = sweep.predict().arms["new"]
    assert said == Refused("new has too few finished runs for a surface")
    held = sweep.analyse(predict=True).arms["new"].holdout
    assert held.how == "the best of 3 runs" and held.predicted is None and held.inside is None


def test_a_sweep_without_a_held_out_budget_cannot_be_predicted(make_sweep):
    sweep = make_sweep({"reference": {}})
    with pytest.raises(ValueError, match="has no held-out budget: set sweep.holdout"):
        holdout.predict(sweep.rows, replace(sweep.design, holdout_budget=None), "")


def test_a_prediction_is_read_back_as_it_was_written(make_sweep, tmp_path):
    sweep = make_sweep({"reference": {}, "empty": {}}, noise=0.001)
    sweep.rows = sweep.rows[(sweep.rows.arm != "empty")]
    write_json(tmp_path / "prediction.json", sweep.predict())
    got = read_prediction(tmp_path / "prediction.json")
    assert got == sweep.predict() and isinstance(got.arms["empty"], Refused)


def test_predictions_of_all_sweeps_are_scored_when_their_runs_are_in(make_sweep, tmp_path):
    make_sweep({"a": {}, "b": {}}, noise=0.002).write(tmp_path / "first")
    make_sweep({"a": {}}, noise=0.002, kinds=("tune", "fit")).write(tmp_path / "unfinished")
    wrong = make_sweep({"a": {}}, noise=0.002)
    wrong.rows.loc[wrong.rows.kind == "holdout", "bits_per_byte"] += 1.0
    wrong.write(tmp_path / "wrong")
    table = holdout.scores(tmp_path)
    assert len(table) == 3 and list(table.inside) == [True, True, False]
    assert holdout.record(tmp_path) == PredictionRecord(3, 2)


@pytest.mark.parametrize("name", ["plan.json", "prediction.json"])
def test_a_sweep_that_cannot_be_scored_is_named_and_keeps_no_other_from_its_report(make_sweep, tmp_path, name):
    make_sweep({"a": {}}, noise=0.002).write(tmp_path / "torn")
    (tmp_path / "torn" / name).unlink()
    (tmp_path / "torn" / "prediction.json").touch()
    with pytest.raises(ValueError, match=r"torn.prediction\.json (lies there without the plan|holds no prediction)"):
        holdout.scores(tmp_path)
    assert holdout.record(tmp_path) == PredictionRecord(0, 0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"written": "", "budget": 1, "arms": {"a": {"interval": []}}}'])
def test_a_file_that_is_no_prediction_is_named(tmp_path, content):
    (tmp_path / "prediction.json").write_text(content)
    with pytest.raises(ValueError, match=r"prediction\.json holds no prediction .*put back"):
        read_prediction(tmp_path / "prediction.json")
