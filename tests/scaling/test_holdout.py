"""A prediction uses the fitted budgets alone, allows for what they cannot know, and comes back from its file."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.findings import Refused, write_json
from experiments.scaling import holdout
from experiments.scaling.frontier import budget_curves, finished, loss_law, with_loss
from experiments.scaling.results import Forecast, read_prediction


def test_a_prediction_is_made_from_fitted_budgets_alone(make_sweep):
    sweep = make_sweep({"reference": {}}, noise=0.002)
    before = holdout.predict(sweep.rows[sweep.rows.kind == "fit"], sweep.design, sweep.predict().written)
    assert isinstance(before.arms["reference"], Forecast) and before == sweep.predict()


def test_a_prediction_allows_for_losses_that_level_off(make_sweep):
    sweep = make_sweep({"reference": {}}, noise=0.001)
    design, said = sweep.design, sweep.predict().arms["reference"].bits_per_byte
    minima = with_loss(budget_curves(finished(sweep.rows, "fit", "reference"), design.budgets))
    floor = 0.75 * min(m.loss for m in minima)
    levelled = floor + np.exp(loss_law(minima, design.centre, floor).at(np.log(design.holdout_budget)))
    assert said.value < levelled < said.high


def test_an_arm_without_three_minima_is_not_predicted_and_its_outcome_is_still_given(make_sweep):
    sweep = make_sweep({"reference": {}}, shift=1.5)
    said = sweep.predict().arms["reference"]
    assert said == Refused("0 budgets with a minimum, at least 3 are needed")
    held = sweep.analyse(predict=True).arms["reference"].holdout
    assert held.how == "isoFLOP minimum" and held.predicted is None and held.inside is None


def test_a_held_out_budget_without_a_minimum_has_its_best_run_as_outcome(make_sweep):
    sweep = make_sweep({"reference": {}})
    sweep.rows = sweep.rows[~((sweep.rows.kind == "holdout") & (sweep.rows.params_total < 5e5))]
    held, best = sweep.analyse().arms["reference"].holdout, sweep.rows[sweep.rows.kind == "holdout"].bits_per_byte.min()
    assert held.bits_per_byte == best and held.how.startswith("best run (too few points")


def test_a_sweep_without_a_held_out_budget_cannot_be_predicted(make_sweep):
    sweep = make_sweep({"reference": {}})
    with pytest.raises(ValueError, match="has no held-out budget: set sweep.holdout"):
        holdout.predict(sweep.rows, replace(sweep.design, holdout_budget=None), "")


def test_a_prediction_is_read_back_as_it_was_written(make_sweep, tmp_path):
    sweep = make_sweep({"reference": {}, "hill": {"curvature": -0.05}}, noise=0.001)
    write_json(tmp_path / "prediction.json", sweep.predict())
    got = read_prediction(tmp_path / "prediction.json")
    assert got == sweep.predict() and isinstance(got.arms["hill"], Refused)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"written": "", "budget": 1, "arms": {"a": {"interval": []}}}'])
def test_a_file_that_is_no_prediction_is_named(tmp_path, content):
    (tmp_path / "prediction.json").write_text(content)
    with pytest.raises(ValueError, match=r"prediction\.json holds no prediction .*put back"):
        read_prediction(tmp_path / "prediction.json")
