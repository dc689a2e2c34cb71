"""Any table of runs can be fitted; what was refused, derived and assumed is in the result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.findings import Estimate, Refused
from experiments.fit import main
from experiments.fits import fit
from experiments.fits.fit import budget_curves, disagreements, fit_power_laws, fit_runs
from experiments.fits.fit_results import (
    BudgetMinimum,
    EnvelopeLaws,
    PowerLaw,
    RefusedBudget,
    Settings,
    SurfaceFit,
)
from experiments.fits.forms import Surface
from experiments.fits.runs import Columns

ROOT = Path(__file__).parents[2]
TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
NAMES = {"C": "flops", "N": "params", "D": "tokens", "L": "loss"}
COLUMNS = Columns(flops="C", params="N", tokens="D", loss="L")


BARE = Settings(bootstrap=0, sensitivity=())


def table(noise=0.0, budgets=5, sizes=9, seed=0):
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = np.array([TRUE.optimum(c)[0] for c in flops]) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    d = flops / 6 / n
    return pd.DataFrame({"C": flops, "N": n, "D": d, "L": TRUE.loss(n, d) * np.exp(rng.normal(0, noise, len(n)))})


def fit_one(runs, settings=BARE, columns=COLUMNS):
    (arm,) = fit_runs(runs, columns, settings).arms
    return arm


def test_the_laws_of_a_noise_free_table_are_found_in_every_way():
    got = fit_one(table(), Settings(bootstrap=20, sensitivity=(0, 3)))
    laws = got.power_laws
    assert laws.N.exponent.value == pytest.approx(TRUE.a, abs=1e-6)
    assert laws.N_spline.exponent.value == pytest.approx(TRUE.a, abs=2e-2)
    assert laws.D.exponent.value == pytest.approx(1 - TRUE.a, abs=1e-6)
    for surface in (got.parametric.huber, got.parametric.squares):
        assert isinstance(surface, SurfaceFit) and surface.a == pytest.approx(TRUE.a, abs=1e-5)
    # The parabola's vertex loss is off by what the parabola leaves out, which is little.
    assert laws.L_saturating.E.value == pytest.approx(TRUE.E, rel=0.03)
    assert all(
        isinstance(b, BudgetMinimum) and b.tokens_opt * b.n_opt * 6 == pytest.approx(b.budget) for b in got.budgets
    )
    assert sum(b.weight for b in got.budgets) == pytest.approx(1)
    assert [line.runs for line in got.sensitivity] == [45, 42]
    for line in got.sensitivity:
        assert [line.huber, line.squares] == pytest.approx([TRUE.a] * 2, abs=1e-5)
        assert line.isoflop == pytest.approx(TRUE.a, abs=2e-3)


def test_the_budgets_of_a_sweeps_ledger_are_those_that_it_names():
    few = table(sizes=4)  # below the runs by which a budget is found in the FLOPs
    assert fit_one(few).budgets == ()
    assert len(fit_one(few.assign(budget_flops=few.C)).budgets) == 5


@pytest.mark.thorough
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), unit=st.sampled_from([1e-6, 1e6]))
def test_the_order_of_rows_and_the_unit_of_size_do_not_change_the_exponents(seed, unit):
    base = table(0.002)
    other = base.sample(frac=1, random_state=seed).assign(N=lambda t: t.N * unit, D=lambda t: t.D / unit)
    one, two = (fit_power_laws(budget_curves(t.rename(columns=NAMES).assign(budget=t.C)), 2, 0) for t in (base, other))
    for a, b in ((one.N, two.N), (one.D, two.D), (one.L, two.L)):
        assert b.exponent.value == pytest.approx(a.exponent.value, abs=1e-6)


def test_what_was_read_refused_and_grouped_is_counted():
    spare = table(budgets=2).iloc[:1].assign(C=5e18, D=lambda t: 5e18 / 6 / t.N)
    got = fit_runs(pd.concat([table(budgets=2), spare, spare]), COLUMNS, BARE)
    counts, (arm,) = got.rows, got.arms
    assert (counts.read, counts.fitted, counts.refused, counts.left_out, arm.in_no_budget) == (20, 19, 1, 0, 1)
    assert got.refused[0].row == 20 and "windows of +-0.05 in ln FLOPs" in arm.grouping


def test_refused_budgets_stay_listed_and_two_are_too_few_for_a_law():
    edge, middle = table(budgets=3, sizes=13), np.sqrt(1e18 * 1e21)
    edge = edge[~np.isclose(edge.C, middle) | (edge.N < 0.99 * TRUE.optimum(middle)[0])]
    got = fit_one(edge)
    assert [b.status for b in got.budgets] == ["ok", "refused", "ok"]
    assert isinstance(got.budgets[1], RefusedBudget) and "edge minimum" in got.budgets[1].reason
    assert got.power_laws == Refused("2 of 3 budgets have a minimum, at least 3 are needed")


def test_a_table_without_budgets_says_how_to_give_it_some():
    scattered = table().assign(C=lambda t: t.C * np.geomspace(0.2, 5, 45), D=lambda t: t.C / 6 / t.N)
    assert "name columns.budget or raise budget_tolerance" in fit_one(scattered).power_laws.refused


def test_tokens_at_the_minimum_follow_the_tables_own_flops_per_parameter():
    got = fit_one(table().assign(D=lambda t: t.D / 2))  # C = 12 N D
    assert got.flops_over_6nd.median == pytest.approx(2)
    assert all(b.tokens_opt * b.n_opt * 12 == pytest.approx(b.budget) for b in got.budgets)


def test_a_flat_budget_keeps_its_minimum_with_a_flag_an_error_and_little_weight():
    flat = table(0.0005)
    middle = np.isclose(flat.C, np.sqrt(1e18 * 1e21))
    wobble = np.tile([0.004, -0.004, 0.004], 3)
    flat.loc[middle, "L"] = flat.L[middle].mean() + wobble - 0.002 * (np.arange(9) == 4)
    budget = fit_one(flat).budgets[2]
    assert "flat: curvature" in budget.flags[0] and budget.log_n_error > 0.2
    assert budget.weight < 0.1 and sum(b.weight for b in fit_one(flat).budgets) == pytest.approx(1)


def test_missing_cells_are_left_to_the_rest():
    got = fit_one(table(0.001, sizes=11).drop(index=[2, 14, 15, 27, 40]), Settings(bootstrap=50, sensitivity=()))
    assert TRUE.a in got.power_laws.N.exponent and len(got.budgets) == 5
    assert TRUE.a in got.parametric.squares.bootstrap.estimates["a"]


def test_each_arm_is_fitted_by_itself_and_tuning_runs_are_left_out():
    steeper = Surface(1.2, 406.4, 410.7, 0.34, 0.34)
    other = table().assign(arm="other", L=lambda t: steeper.loss(t.N, t.D))
    tuning = table().iloc[:4].assign(arm="ours", kind="tune", L=9.0)
    ledger = pd.concat([table().assign(arm="ours"), other]).assign(kind="fit")
    got = fit_runs(pd.concat([ledger, tuning]), COLUMNS, BARE)
    assert {arm.arm: arm.runs for arm in got.arms} == {"other": 45, "ours": 45}
    assert {r.reason for r in got.refused} == {"kind is tune"} and len(got.refused) == 4
    assert [arm.parametric.huber.a for arm in got.arms] == pytest.approx([steeper.a, TRUE.a], abs=1e-4)


def test_learning_curves_add_their_envelope():
    rows = []
    for n in np.geomspace(1e7, 1e10, 12):
        d = n * np.geomspace(1, 400, 30)
        rows.append(pd.DataFrame({"name": f"{n:g}", "N": n, "D": d, "L": TRUE.loss(n, d)}))
    got = fit_one(pd.concat(rows), columns=Columns(params="N", tokens="D", loss="L", run="name"))
    assert got.runs == 12 and isinstance(got.envelope, EnvelopeLaws)
    assert TRUE.a in got.envelope.N.exponent and fit_one(table()).envelope is None


@pytest.mark.parametrize("form", ["tied", "chinchilla"])
def test_a_form_is_chosen_by_its_name(form):
    got = fit_one(table(), Settings(form=form, bootstrap=0, sensitivity=()))
    assert got.parametric.form == form and (got.parametric.huber.a == 0.5) == (form == "tied")


def test_a_form_of_more_than_size_and_data_gets_no_isoflop_laws():
    many = table(sizes=12).assign(U=lambda t: t.D / np.tile([1, 2, 5], 20))
    settings = Settings(form="repeated", bootstrap=0, sensitivity=())
    got = fit_one(many, settings, Columns(**COLUMNS.named(), unique_tokens="U"))
    assert "filter them to one value" in got.power_laws.refused and got.budgets == ()


def test_without_draws_there_are_values_and_no_intervals():
    got = fit_runs(table(0.002), COLUMNS, BARE)
    law = got.arms[0].power_laws.N.exponent
    assert got.intervals.startswith("none (bootstrap=0)") and np.isfinite(law.value) and np.isnan(law.low)
    assert got.arms[0].parametric.huber.bootstrap is None


def test_ways_whose_intervals_do_not_meet_are_named():
    got = fit_one(table(0.001), Settings(bootstrap=40, sensitivity=()))
    assert got.disagreements == ()
    elsewhere = PowerLaw("N* = k C^exponent", Estimate(0.9, 0.8, 1.0), Estimate(1, 1, 1), 9)
    found = disagreements(got.power_laws, got.parametric, EnvelopeLaws(elsewhere, elsewhere, 9))
    assert len(found) == 4 and all("by the envelope" in line or "0.9 [0.8, 1]" in line for line in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bootstrap": -1}, "bootstrap=-1: give a whole number that is not negative (0: no intervals)"),
        ({"bootstrap": 1.5}, "bootstrap=1.5: give a whole number"),
        ({"drop_highest": -2}, "drop_highest=-2: give a whole number"),
        ({"sensitivity": (0, -5)}, "sensitivity=-5: give a whole number"),
        ({"budget_tolerance": 0}, "budget_tolerance=0: give a number between 0 and 0.5"),
        ({"form": "kaplan"}, "form='kaplan' is none of chinchilla, tied, repeated, experts"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**wrong)


def test_a_form_whose_columns_are_not_named_is_refused():
    with pytest.raises(ValueError, match="form=experts needs columns.total_params="):
        fit_runs(table(), COLUMNS, Settings(form="experts"))


def test_long_fits_say_how_many_draws_are_done(monkeypatch):
    monkeypatch.setattr(fit, "LONG", 1000)
    lines = []
    fit_runs(table(0.01, sizes=1000), COLUMNS, Settings(bootstrap=40, sensitivity=()), lines.append)
    assert lines[-1] == "squares: 40 of 40 draws of 5000 runs" and len(lines) == 8  # ten draws are solved at once


@pytest.fixture
def arguments(tmp_path):
    """Of a command that fits a small table whose column of the loss has a space in its name."""
    table(0.002, budgets=3).rename(columns={"L": "final loss"}).to_csv(tmp_path / "a b.csv", index=False)
    where = [f"runs='{tmp_path}/a b.csv'", f"out={tmp_path}/out.json"]
    return [*where, "columns.flops=C", "columns.params=N", "bootstrap=20", "sensitivity=[]"]


@pytest.mark.thorough
def test_the_command_writes_the_json_prints_tables_and_leaves_nothing_else(arguments, tmp_path):
    before = set(ROOT.iterdir())
    command = [sys.executable, "-m", "experiments.fit", *arguments, "columns.loss='final loss'"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "isoFLOP minima" in done.stdout and "Exponents in compute" in done.stdout
    assert done.stdout.rstrip().endswith(f"written to {tmp_path}/out.json")
    got = json.loads((tmp_path / "out.json").read_text())
    keys = {"arms", "refused", "columns", "derived", "rows", "intervals", "settings", "versions"}
    assert keys <= got.keys() and got["command"].startswith("python -m experiments.fit 'runs=")
    assert got["arms"][0]["power_laws"]["N"]["exponent"].keys() == {"value", "low", "high"}
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["columns.loss=nope"], "error: columns.loss='nope' is no column"),
        ([], "error: columns.loss must be given"),
        (["columns.loss='final loss'", "bootstrap=-1"], "error: bootstrap=-1: give a whole number"),
        (["columns.loss='final loss'", "form=kaplan"], "error: form='kaplan' is none of"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, more, message, tmp_path, capsys):
    ended, said = refused(arguments + more, capsys)
    assert ended == 2 and said.startswith(message) and said.count("\n") == 1 and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("", "is a folder"), ("a b.csv/out.json", "cannot be written"), ("/proc/x/out.json", "/proc")]
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(arguments, out, message, tmp_path, capsys):
    place = out if out.startswith("/") else f"{tmp_path}/{out}"
    absent = [a.replace("a b.csv'", "absent.csv'") for a in arguments if not a.startswith("out=")]
    ended, said = refused([*absent, f"out='{place}'", "columns.loss=x"], capsys)
    assert ended == 2 and message in said and said.count("\n") == 1 and "absent" not in said


def refused(arguments, capsys):
    """The exit code of a command that is refused, and what it says."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("fit", arguments)
    with pytest.raises(SystemExit) as ended:
        main(config)
    return ended.value.code, capsys.readouterr().err
