"""What is said of one arm: the laws that were put in, and a warning where a number is not to be trusted."""

import pytest

from experiments.findings import Refused
from experiments.scaling.results import Minimum, RefusedMinimum


def test_noise_free_laws_are_recovered(make_sweep):
    got = make_sweep({"a": {}, "b": {"slope": 0.1, "level": 3.1}}).analyse(predict=True)
    for name, slope in (("a", -0.08), ("b", -0.1)):
        law, held = got.arms[name].law, got.arms[name].holdout
        assert law.slope.value == pytest.approx(slope, rel=1e-2)
        assert law.size_exponent.value == pytest.approx(0.5, rel=1e-3)
        assert held.predicted.value == pytest.approx(held.bits_per_byte, rel=1e-2)
    assert got.comparisons[0].slope_difference.value == pytest.approx(-0.02, rel=2e-2)


def test_edge_minima_are_refused_and_said(make_sweep):
    got = make_sweep({"reference": {}, "new": {}}, shift=1.5).analyse()
    new = got.arms["new"]
    assert all(isinstance(m, RefusedMinimum) and "edge minimum" in m.refused for m in new.minima)
    assert isinstance(new.law, Refused) and any("edge minimum" in warning for warning in new.warnings)
    assert got.comparisons[0].verdict.outcome == "cannot tell"


def test_a_flat_curve_gives_its_loss_but_not_its_size(make_sweep):
    got = make_sweep({"reference": {"curvature": 0.0}}, noise=0.01, seed=5).analyse().arms["reference"]
    flat = [m for m in got.minima if isinstance(m, Minimum) and m.params is None]
    assert flat and all(m.bits_per_byte and "its size is not" in m.flags[0] for m in flat)


@pytest.mark.parametrize(
    ("change", "warned"),
    [({"bits_per_byte": 1.0}, True), ({"status": "diverged", "bits_per_byte": None}, False)],
)
def test_a_learning_rate_at_the_edge_of_its_grid_is_said_unless_the_next_one_diverged(make_sweep, change, warned):
    sweep = make_sweep({"reference": {}})
    highest = (sweep.rows.kind == "tune") & (sweep.rows.learning_rate == 0.02)
    sweep.rows.loc[highest, list(change)] = list(change.values())
    got = sweep.analyse().arms["reference"]
    expected = ("learning rate 0.02 is at the edge of the rates tried, 0.005 to 0.02",) if warned else ()
    assert got.warnings == expected and got.tuning.learning_rate == (0.02 if warned else 0.01)


def test_cells_are_counted_by_how_they_ended(make_sweep):
    sweep = make_sweep({"reference": {}}, kinds=("tune", "fit"))
    sweep.rows.loc[[0, 1, 2], "status"] = ["failed", "failed", "diverged"]
    cells = sweep.analyse().cells
    assert (cells.planned, cells.done, cells.diverged, cells.failed, cells.missing) == (30, 24, 1, 2, 3)
