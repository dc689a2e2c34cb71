"""Any table of runs can be fitted; what was refused, derived and assumed is in the result."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.scaling.fit import (
    budget_minima,
    fit_power_laws,
    fit_runs,
    group_budgets,
    read_runs,
    select_runs,
    write_json,
)
from experiments.scaling.parametric import Surface

ROOT = Path(__file__).parents[2]
TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
NAMES = {"C": "flops", "N": "params", "D": "tokens", "L": "loss"}
COLUMNS = {"flops": "C", "params": "N", "tokens": "D", "loss": "L"}


def table(noise=0.0, budgets=5, sizes=9, seed=0):
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = np.array([TRUE.optimum(c)[0] for c in flops]) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    d = flops / 6 / n
    return pd.DataFrame({"C": flops, "N": n, "D": d, "L": TRUE.loss(n, d) * np.exp(rng.normal(0, noise, len(n)))})


def test_the_laws_of_a_noise_free_table_are_found_in_every_way():
    got = fit_runs(table(), COLUMNS, bootstrap=20, sensitivity=(0, 3))
    assert got["power_laws"]["N"]["exponent"] == pytest.approx(TRUE.a, abs=1e-6)
    assert got["power_laws"]["D"]["exponent"] == pytest.approx(1 - TRUE.a, abs=1e-6)
    for fit in got["parametric"].values():
        assert fit["status"] == "converged" and fit["a"] == pytest.approx(TRUE.a, abs=1e-5)
    # The parabola's vertex loss is off by what the parabola leaves out, which is little.
    assert got["power_laws"]["L_saturating"]["E"] == pytest.approx(TRUE.E, rel=0.03)
    assert all(
        b["status"] == "ok" and b["tokens_opt"] * b["n_opt"] * 6 == pytest.approx(b["budget"]) for b in got["budgets"]
    )
    assert [line["runs"] for line in got["sensitivity"]] == [45, 42]
    json.dumps(got["parametric"])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), unit=st.sampled_from([1e-6, 1e6]))
def test_the_order_of_rows_and_the_unit_of_size_do_not_change_the_exponents(seed, unit):
    base = table(0.002)
    other = base.sample(frac=1, random_state=seed).assign(N=lambda t: t.N * unit, D=lambda t: t.D / unit)
    one, two = (fit_power_laws(*budget_minima(t.rename(columns=NAMES).assign(budget=t.C)), 2, 0) for t in (base, other))
    for name in "NDL":
        assert two[name]["exponent"] == pytest.approx(one[name]["exponent"], abs=1e-6)


@pytest.mark.parametrize(
    ("missing", "rule"),
    [("flops", "6 * params * tokens"), ("params", "flops / (6 * tokens)"), ("tokens", "flops / (6 * params)")],
)
def test_a_missing_column_is_derived_and_named(missing, rule):
    full, _, none = select_runs(table(), COLUMNS)
    part, _, derived = select_runs(table(), {k: v for k, v in COLUMNS.items() if k != missing})
    assert derived == [f"{missing} = {rule}"] and none == []
    assert part[missing].to_numpy() == pytest.approx(full[missing].to_numpy())


def test_rows_that_cannot_count_are_refused_with_their_number_and_reason():
    bad = table().assign(status="done").astype({"C": object})
    bad.loc[0, "L"] = np.nan
    bad.loc[1, "N"] = -1.0
    bad.loc[2, "C"] = "many"
    bad.loc[3, "status"] = "diverged"
    bad.loc[4, "L"] = np.inf
    bad.loc[6] = bad.loc[5].to_dict()
    runs, refused, _ = select_runs(bad, COLUMNS, drop_highest=1)
    reasons = {r["row"]: r["reason"] for r in refused}
    assert "L is nan" in reasons[1] and "N is -1.0" in reasons[2] and "C is many" in reasons[3]
    assert reasons[4] == "status is diverged" and "L is inf" in reasons[5] and "duplicate" in reasons[7]
    assert sum("highest losses" in reason for reason in reasons.values()) == 1
    assert len(runs) == 45 - 7 and set(reasons).isdisjoint(runs.index)


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        (COLUMNS | {"loss": "l"}, None, "columns.loss='l' is no column of the table; it has 'C', 'N', 'D', 'L'"),
        ({"flops": "C", "loss": "L"}, None, "at least two of flops, params and tokens"),
        ({"flops": "C", "params": "N"}, None, "name the columns of the loss"),
        (COLUMNS, "colour == 'red'", "cannot be evaluated"),
        (COLUMNS, "L > 100", "no rows are left of 45: 45 filtered out"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_is_wrong(columns, query, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        fit_runs(table(), columns, query)


def test_column_names_may_contain_spaces_and_rows_may_be_filtered():
    spaced = table(0.001).rename(columns={"L": "final loss"}).assign(arm=["a", "b", "c"] * 15)
    got = fit_runs(spaced, COLUMNS | {"loss": "final loss"}, "arm != 'c'", sensitivity=(), bootstrap=5)
    assert got["rows"] == {"read": 45, "fitted": 30, "refused": 0, "in_no_budget": 0}


def test_refused_budgets_stay_listed_and_two_are_too_few_for_a_law():
    edge, middle = table(budgets=3, sizes=13), np.sqrt(1e18 * 1e21)
    edge = edge[~np.isclose(edge.C, middle) | (edge.N < 0.99 * TRUE.optimum(middle)[0])]
    got = fit_runs(edge, COLUMNS, sensitivity=(), bootstrap=0)
    assert [b["status"] for b in got["budgets"]] == ["ok", "refused", "ok"]
    assert "edge minimum" in got["budgets"][1]["reason"] and "n_opt" not in got["budgets"][1]
    assert got["power_laws"] == {"refused": "2 accepted budgets of 3, at least 3 are needed"}


def test_scattered_flops_are_grouped_and_runs_between_budgets_belong_to_none():
    rng = np.random.default_rng(0)
    flops = pd.Series(np.concatenate([c * rng.uniform(0.96, 1.04, 8) for c in (1e18, 3e18, 1e19)] + [[1.7e18, 2.1e18]]))
    budget = group_budgets(flops)
    assert budget.dropna().nunique() == 3 and budget.isna().tolist() == [False] * 24 + [True] * 2
    assert np.abs(budget.dropna() / np.repeat([1e18, 3e18, 1e19], 8) - 1).max() < 0.04


def test_tokens_at_the_minimum_follow_the_tables_own_flops_per_parameter():
    heavy = table().assign(D=lambda t: t.D / 2)  # C = 12 N D
    got = fit_runs(heavy, COLUMNS, sensitivity=(), bootstrap=2)
    assert got["flops_over_6nd"]["median"] == pytest.approx(2)
    assert all(b["tokens_opt"] * b["n_opt"] * 12 == pytest.approx(b["budget"]) for b in got["budgets"])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path, content = tmp_path / f"runs.{suffix}", table()
    {
        "csv": lambda: content.to_csv(path, index=False),
        "tsv": lambda: content.to_csv(path, sep="\t", index=False),
        "parquet": lambda: content.to_parquet(path),
        "jsonl": lambda: content.to_json(path, orient="records", lines=True, double_precision=15),
    }[suffix]()
    pd.testing.assert_frame_equal(read_runs(path), content, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", None, "no such file"),
        ("a.xml", "", "must end in"),
        ("a.csv", "C,N\n", "no rows"),
        ("a.parquet", "x", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        read_runs(tmp_path / name)


def test_what_is_not_finite_becomes_null_in_the_json(tmp_path):
    write_json(tmp_path / "sub" / "a.json", {"x": np.float64("nan"), "y": [np.int64(3), np.inf], "z": np.bool_(True)})
    assert json.loads((tmp_path / "sub" / "a.json").read_text()) == {"x": None, "y": [3, None], "z": True}
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.json"]


def run_app(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.fit", *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )


def test_the_command_writes_the_json_prints_tables_and_leaves_nothing_else(tmp_path):
    table(0.002).rename(columns={"L": "final loss"}).to_csv(tmp_path / "a b.csv", index=False)
    before = set(ROOT.iterdir())
    done = run_app(f"runs='{tmp_path}/a b.csv'", f"out={tmp_path}/out.json", "columns.flops=C", "columns.params=N",
                   "columns.loss='final loss'", "bootstrap=5", "sensitivity=[0]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"written to {tmp_path}/out.json")
    got = json.loads((tmp_path / "out.json").read_text())
    keys = {
        "budgets",
        "power_laws",
        "parametric",
        "refused",
        "sensitivity",
        "columns",
        "derived",
        "rows",
        "command",
        "versions",
    }
    assert keys <= got.keys() and "experiments.fit" in got["command"]
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["columns.loss=nope"], "columns.loss='nope' is no column"), ([], "columns.loss must be given")],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    table().to_csv(tmp_path / "a.csv", index=False)
    done = run_app(
        f"runs={tmp_path}/a.csv", f"out={tmp_path}/o.json", "columns.flops=C", "columns.params=N", *arguments
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "o.json").exists()
