"""Any table of runs can be fitted; what was refused, derived and assumed is in the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.findings import Refused
from experiments.fit import main
from experiments.scaling.fit import budget_curves, fit_power_laws, fit_runs
from experiments.scaling.fit_results import BudgetMinimum, RefusedBudget, SurfaceFit
from experiments.scaling.parametric import Surface
from experiments.scaling.runs import Columns

ROOT = Path(__file__).parents[2]
TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
NAMES = {"C": "flops", "N": "params", "D": "tokens", "L": "loss"}
COLUMNS = Columns(flops="C", params="N", tokens="D", loss="L")


def table(noise=0.0, budgets=5, sizes=9, seed=0):
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = np.array([TRUE.optimum(c)[0] for c in flops]) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    d = flops / 6 / n
    return pd.DataFrame({"C": flops, "N": n, "D": d, "L": TRUE.loss(n, d) * np.exp(rng.normal(0, noise, len(n)))})


@pytest.mark.thorough
def test_the_laws_of_a_noise_free_table_are_found_in_every_way():
    got = fit_runs(table(), COLUMNS, draws=2, sensitivity=(0, 3))
    laws = got.power_laws
    assert laws.N.exponent.value == pytest.approx(TRUE.a, abs=1e-6)
    assert laws.D.exponent.value == pytest.approx(1 - TRUE.a, abs=1e-6)
    for fit in (got.parametric.huber, got.parametric.projection):
        assert isinstance(fit, SurfaceFit) and fit.a == pytest.approx(TRUE.a, abs=1e-5)
    # The parabola's vertex loss is off by what the parabola leaves out, which is little.
    assert laws.L_saturating.E.value == pytest.approx(TRUE.E, rel=0.03)
    assert all(
        isinstance(b, BudgetMinimum) and b.tokens_opt * b.n_opt * 6 == pytest.approx(b.budget) for b in got.budgets
    )
    assert [line.runs for line in got.sensitivity] == [45, 42]
    for line in got.sensitivity:
        assert [line.huber, line.projection] == pytest.approx([TRUE.a] * 2, abs=1e-5)
        assert line.isoflop == pytest.approx(TRUE.a, abs=2e-3)


@pytest.mark.thorough
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), unit=st.sampled_from([1e-6, 1e6]))
def test_the_order_of_rows_and_the_unit_of_size_do_not_change_the_exponents(seed, unit):
    base = table(0.002)
    other = base.sample(frac=1, random_state=seed).assign(N=lambda t: t.N * unit, D=lambda t: t.D / unit)
    one, two = (fit_power_laws(budget_curves(t.rename(columns=NAMES).assign(budget=t.C)), 2, 0) for t in (base, other))
    for a, b in ((one.N, two.N), (one.D, two.D), (one.L, two.L)):
        assert b.exponent.value == pytest.approx(a.exponent.value, abs=1e-6)


@pytest.mark.thorough
def test_what_was_read_refused_and_grouped_is_counted():
    spare = table(budgets=2).iloc[:1].assign(C=5e18)
    got = fit_runs(pd.concat([table(budgets=2), spare, spare]), COLUMNS, sensitivity=(), draws=0)
    counts = got.rows
    assert (counts.read, counts.fitted, counts.refused, counts.in_no_budget) == (20, 19, 1, 1)
    assert got.refused[0].row == 20 and "windows of +-0.05 in ln FLOPs" in got.grouping


@pytest.mark.thorough
def test_refused_budgets_stay_listed_and_two_are_too_few_for_a_law():
    edge, middle = table(budgets=3, sizes=13), np.sqrt(1e18 * 1e21)
    edge = edge[~np.isclose(edge.C, middle) | (edge.N < 0.99 * TRUE.optimum(middle)[0])]
    got = fit_runs(edge, COLUMNS, sensitivity=(), draws=0)
    assert [b.status for b in got.budgets] == ["ok", "refused", "ok"]
    assert isinstance(got.budgets[1], RefusedBudget) and "edge minimum" in got.budgets[1].reason
    assert got.power_laws == Refused("2 accepted budgets of 3, at least 3 are needed")


@pytest.mark.thorough
def test_tokens_at_the_minimum_follow_the_tables_own_flops_per_parameter():
    heavy = table().assign(D=lambda t: t.D / 2)  # C = 12 N D
    got = fit_runs(heavy, COLUMNS, sensitivity=(), draws=2)
    assert got.flops_over_6nd.median == pytest.approx(2)
    assert all(b.tokens_opt * b.n_opt * 12 == pytest.approx(b.budget) for b in got.budgets)


@pytest.fixture
def arguments(tmp_path):
    """Of a command that fits a small table whose column of the loss has a space in its name."""
    table(0.002, budgets=3).rename(columns={"L": "final loss"}).to_csv(tmp_path / "a b.csv", index=False)
    where = [f"runs='{tmp_path}/a b.csv'", f"out={tmp_path}/out.json"]
    return [*where, "columns.flops=C", "columns.params=N", "bootstrap=5", "sensitivity=[]"]


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
    keys = {"budgets", "power_laws", "parametric", "refused", "sensitivity", "columns", "derived", "rows", "versions"}
    assert keys <= got.keys() and got["command"].startswith("python -m experiments.fit 'runs=")
    assert got["power_laws"]["N"]["exponent"].keys() == {"value", "low", "high"}
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [(["columns.loss=nope"], "error: columns.loss='nope' is no column"), ([], "error: columns.loss must be given")],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, columns, message, tmp_path):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("fit", [*arguments, *columns])
    with pytest.raises(SystemExit) as ended:
        main(config)
    assert message in ended.value.code and "\n" not in ended.value.code and not (tmp_path / "out.json").exists()
