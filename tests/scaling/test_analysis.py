"""What is said of one arm: the law that was put in, and a warning where a number is not to be trusted."""

import math

import pytest

from experiments.findings import Refused
from experiments.scaling.results import RefusedMinimum


def test_a_noise_free_surface_is_recovered(make_sweep):
    laws = {"a": {}, "b": {"alpha": 0.5, "A": 1.1, "multiplier": 1.4}}
    got = make_sweep(laws).analyse(predict=True)
    for name, alpha in (("a", 0.4), ("b", 0.5)):
        law, held = got.arms[name].law, got.arms[name].holdout
        assert law.alpha.value == pytest.approx(alpha, rel=1e-3) and law.floor.value == pytest.approx(1.2, rel=1e-3)
        assert law.size_exponent.value == pytest.approx(0.4 / (0.4 + alpha), rel=1e-3)
        assert held.predicted.value == pytest.approx(held.bits_per_byte, rel=1e-3)


def test_the_two_exponents_of_the_optimal_size_differ_where_6nd_is_not_what_was_counted(make_sweep):
    sweep = make_sweep({"reference": {}})
    rows = sweep.rows
    rows["params_total"] = (rows.params_total / 1e5) ** 1.2 * 1e5  # FLOPs per token grow slower than parameters
    law = sweep.analyse().arms["reference"].law
    assert law.size_exponent.value == pytest.approx(0.6, rel=1e-2)
    assert law.size_exponent_6nd == pytest.approx(0.4 / (0.4 + 0.4 / 1.2), rel=1e-2)


def test_above_a_known_entropy_the_surface_has_no_floor_and_the_multiplier_is_the_same(make_sweep):
    sweep = make_sweep({"reference": {}, "new": {"multiplier": 1.4}})
    sweep.rows["entropy_bits_per_byte"] = 1.2
    sweep.plan["settings"] = {"above_entropy": True}
    got = sweep.analyse(predict=True)
    assert got.loss == "bits per byte above the entropy"
    for arm in got.arms.values():
        assert arm.law.floor.value < 2e-3 and not arm.warnings and arm.law.alpha.value == pytest.approx(0.4, rel=1e-2)
        assert arm.holdout.predicted.value == pytest.approx(arm.holdout.bits_per_byte, rel=1e-2)
    assert got.comparisons[0].centre.estimate.value == pytest.approx(1.4, rel=1e-2)


@pytest.mark.parametrize("entropy", [None, 5.0])
def test_runs_that_lie_above_no_known_entropy_are_refused(make_sweep, entropy):
    sweep = make_sweep({"reference": {}, "new": {}})
    sweep.rows["entropy_bits_per_byte"] = entropy
    sweep.plan["settings"] = {"above_entropy": True}
    with pytest.raises(ValueError, match="has no loss above the entropy"):
        sweep.analyse()


@pytest.mark.parametrize(
    ("codes", "commits", "warned"),
    [(("a", "b"), ("1", "1"), False), (("a", "b"), ("1", "2"), True), ((None, None), (None, None), False)],
)
def test_arms_of_several_versions_of_the_code_are_said(make_sweep, codes, commits, warned):
    sweep = make_sweep({"reference": {}, "new": {}})
    for column, (reference, new) in {"code": codes, "commit": commits}.items():
        sweep.rows[column] = sweep.rows.arm.map({"reference": reference, "new": new})
    assert bool(sweep.analyse().warnings) == warned


def test_an_arm_of_runs_of_two_versions_is_said_with_their_commits(make_sweep):
    sweep = make_sweep({"reference": {}, "new": {}})
    sweep.rows["code"] = ["a", "b"] * (len(sweep.rows) // 2)
    sweep.rows["commit"] = ["1f", None] * (len(sweep.rows) // 2)
    (warning,) = sweep.analyse().warnings
    assert "several versions of the code (commit 1f, no known commit)" in warning


@pytest.mark.parametrize("group", [["kind"], ["kind", "budget_flops"]])
def test_sizes_or_budgets_that_share_a_seed_are_said(make_sweep, group):
    sweep = make_sweep({"reference": {}, "new": {}})
    column = "params_total" if "budget_flops" in group else "budget_flops"
    sweep.rows["seed"] = sweep.rows.groupby(["arm", *group])[column].rank(method="dense").astype(int)
    (warning,) = sweep.analyse().warnings
    assert "sizes share their seeds" in warning and "may be too narrow" in warning


def test_edge_minima_are_said_with_their_consequence(make_sweep):
    new = make_sweep({"reference": {}, "new": {}}, shift=1.5).analyse().arms["new"]
    assert all(isinstance(m, RefusedMinimum) and "edge minimum" in m.refused for m in new.minima)
    assert any("edge minimum" in text and "the surface's form alone" in text for text in new.warnings)


def test_an_arm_with_too_few_runs_has_no_law_and_the_others_keep_theirs(make_sweep):
    sweep = make_sweep({"reference": {}, "new": {}, "third": {}}, noise=0.002)
    sweep.rows = sweep.rows[(sweep.rows.arm != "new") | (sweep.rows.kind != "fit") | (sweep.rows.budget_flops < 1e11)]
    got = sweep.analyse()
    assert got.arms["new"].law == Refused("too few finished runs for a surface")
    first, second = got.comparisons
    assert first.verdict.outcome == "cannot tell" and "new has too few runs" in first.verdict.sentence
    assert second.centre is not None


@pytest.mark.parametrize(
    ("change", "edge"),
    [({"bits_per_byte": 1.0}, True), ({"status": "diverged", "bits_per_byte": None}, False)],
)
def test_a_learning_rate_at_the_edge_of_its_grid_is_said_unless_the_next_one_diverged(make_sweep, change, edge):
    sweep = make_sweep({"reference": {}})
    highest = (sweep.rows.kind == "tune") & (sweep.rows.learning_rate == 0.02)
    sweep.rows.loc[highest, list(change)] = list(change.values())
    got = sweep.analyse().arms["reference"]
    assert any("the best learning rate, 0.02, is the highest tried" in text for text in got.warnings) == edge
    assert got.tuning.learning_rate == pytest.approx(0.02 if edge else 0.01, rel=0.5)


def test_a_surface_that_misses_more_than_seeds_explain_is_said(make_sweep):
    sweep = make_sweep({"reference": {}}, noise=0.002, seeds=2)
    assert sweep.analyse().arms["reference"].warnings == ()
    size = sweep.rows.params_total.astype(float)
    sweep.rows["bits_per_byte"] *= 1 + 0.02 * (size.map(math.log) * 7).map(math.sin)  # a matter of shape, not of seeds
    got = sweep.analyse().arms["reference"]
    assert any("the surface misses something" in text for text in got.warnings)
    assert got.law.seed_spread == pytest.approx(0.002, rel=0.4)


def test_cells_are_counted_by_how_they_ended(make_sweep):
    sweep = make_sweep({"reference": {}}, kinds=("tune", "fit"))
    sweep.rows.loc[[0, 1, 2], "status"] = ["failed", "failed", "diverged"]
    cells = sweep.analyse().cells
    assert (cells.planned, cells.done, cells.diverged, cells.failed, cells.missing) == (33, 27, 1, 2, 3)
