"""Any table of runs can be read; the rows that cannot count are refused with their reason, and nothing is assumed in
silence."""

import re

import numpy as np
import pandas as pd
import pytest

from experiments.fits.runs import Columns, group_budgets, read_runs, select_runs

COLUMNS = {"flops": "C", "params": "N", "tokens": "D", "loss": "L"}


def table():
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    params = np.sqrt(flops / 120) * np.tile(np.geomspace(0.25, 4, 9), 5)
    return pd.DataFrame({"C": flops, "N": params, "D": flops / 6 / params, "L": np.linspace(4, 3, 45)})


@pytest.mark.parametrize(
    ("missing", "rule"),
    [("flops", "6 * params * tokens"), ("params", "flops / (6 * tokens)"), ("tokens", "flops / (6 * params)")],
)
def test_a_missing_column_is_derived_and_named(missing, rule):
    full = select_runs(table(), Columns(**COLUMNS))
    part = select_runs(table(), Columns(**COLUMNS | {missing: None}))
    assert part.derived == (f"{missing} = {rule}",) and full.derived == ()
    assert part.runs[missing].to_numpy() == pytest.approx(full.runs[missing].to_numpy())


def test_rows_that_cannot_count_are_refused_with_their_number_and_reason():
    bad = table().assign(status="done").astype({"C": object})
    bad.loc[0, "L"] = np.nan
    bad.loc[1, "N"] = -1.0
    bad.loc[2, "C"] = "many"
    bad.loc[3, "status"] = "diverged"
    bad.loc[4, "L"] = np.inf
    bad.loc[6] = bad.loc[5].to_dict()
    got = select_runs(bad, Columns(**COLUMNS), drop_highest=1)
    reasons = {refused.row: refused.reason for refused in got.refused}
    assert "L is nan" in reasons[1] and "N is -1.0" in reasons[2] and "C is many" in reasons[3]
    assert reasons[4] == "status is diverged" and "L is inf" in reasons[5] and "duplicate" in reasons[7]
    assert sum("highest losses" in reason for reason in reasons.values()) == 1
    assert len(got.runs) == 45 - 7 and set(reasons).isdisjoint(got.runs.index)


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        (COLUMNS | {"loss": "l"}, None, "columns.loss='l' is no column of the table; it has 'C', 'N', 'D', 'L'"),
        ({"flops": "C", "loss": "L"}, None, "at least two of flops, params and tokens"),
        ({"flops": "C", "params": "N"}, None, "name the columns of the loss"),
        (COLUMNS, "colour == 'red'", "cannot be evaluated"),
        (COLUMNS, "L > 100", "no rows are left of 45: 45 filtered out"),
        (COLUMNS, "@pd.read_pickle('x')", "filter=\"@pd.read_pickle('x')\" cannot be evaluated"),
        (COLUMNS, "L.to_pickle('x')", "is something else"),
        (COLUMNS, "(L > 1) & ~(C.__class__ == 1)", "'C.__class__' is something else"),
        (COLUMNS, "[x for x in C]", "is something else"),
        (COLUMNS, "L >", "cannot be evaluated"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_is_wrong(columns, query, message):
    with pytest.raises(ValueError, match="(?s)" + re.escape(message)):
        select_runs(table(), Columns(**columns), query)


def scaled(**factors):
    return table().assign(**{name: lambda t, n=name, f=factor: t[n] * f for name, factor in factors.items()})


@pytest.mark.parametrize(
    ("runs", "columns", "message"),
    [
        (
            table(),
            COLUMNS | {"params": "D", "tokens": "N"},
            "'D' and columns.tokens='N' do not fit together: the median ",
        ),
        (table(), COLUMNS | {"flops": "N", "params": "C"}, "the median of FLOPs / (6 x parameters x tokens) is 2.6"),
        (scaled(N=1e-6, D=1e-9), COLUMNS, "the median of FLOPs / (6 x parameters x tokens) is 1e+15"),
        (scaled(N=1e-6), {"flops": "C", "params": "N", "loss": "L"}, "tokens per parameter is 2e+13"),
        (scaled(N=np.where(np.arange(45) % 3, 1, 1000)), COLUMNS, "goes from 0.001 to 1 (5 % and 95 % of the runs)"),
        (scaled().assign(T=lambda t: t.N / 2), COLUMNS | {"total_params": "T"}, "params are the active ones of all"),
    ],
)
def test_columns_that_cannot_be_what_they_are_named_as_are_refused(runs, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        select_runs(runs, Columns(**columns))
    assert "\n" not in str(refused.value)


def test_tuning_runs_are_refused_and_arms_told_apart():
    ledger = table().assign(kind=["tune"] * 5 + ["fit"] * 40, arm=["a", "b", "c"] * 15)
    got = select_runs(ledger, Columns(**COLUMNS), drop_highest=1)
    assert {r.reason for r in got.refused[:5]} == {"kind is tune"} and got.runs.arm.nunique() == 3
    assert sum("highest losses" in r.reason for r in got.refused) == 3  # one of each arm
    renamed = ledger.rename(columns={"kind": "purpose", "arm": "family"})
    same = select_runs(renamed, Columns(**COLUMNS, kind="purpose", arm="family"), drop_highest=1)
    pd.testing.assert_frame_equal(same.runs, got.runs)


def test_equal_runs_of_two_arms_are_no_duplicates():
    twice = pd.concat([table().assign(arm="a"), table().assign(arm="b"), table().assign(arm="b")])
    got = select_runs(twice, Columns(**COLUMNS))
    assert len(got.runs) == 90 and len(got.refused) == 45


def test_the_last_point_of_a_learning_curve_is_its_run():
    curves = pd.concat([table().assign(D=lambda t, f=f: t.D * f, C=lambda t, f=f: t.C * f) for f in (0.5, 1.0, 0.25)])
    curves["name"] = [*range(45)] * 3
    got = select_runs(curves, Columns(**COLUMNS, run="name"))
    assert len(got.curves) == 135 and got.refused == ()
    assert sorted(got.runs.flops) == pytest.approx(sorted(table().C))


def test_column_names_may_contain_spaces_and_rows_may_be_filtered():
    spaced = table().rename(columns={"L": "final loss"}).assign(arm=["a", "b", "c"] * 15)
    got = select_runs(spaced, Columns(**COLUMNS | {"loss": "final loss"}), "arm != 'c'")
    assert len(got.runs) == 30 and got.refused == ()


def test_scattered_flops_are_grouped_and_runs_between_budgets_belong_to_none():
    rng = np.random.default_rng(0)
    flops = pd.Series(np.concatenate([c * rng.uniform(0.96, 1.04, 8) for c in (1e18, 3e18, 1e19)] + [[1.7e18, 2.1e18]]))
    budget = group_budgets(flops)
    assert budget.dropna().nunique() == 3 and budget.isna().tolist() == [False] * 24 + [True] * 2
    assert np.abs(budget.dropna() / np.repeat([1e18, 3e18, 1e19], 8) - 1).max() < 0.04


def test_budgets_a_factor_of_the_square_root_of_two_apart_are_told_apart():
    flops = pd.Series(np.repeat(1e18 * 2 ** (np.arange(12) / 2), 6) * np.tile(np.linspace(0.97, 1.03, 6), 12))
    assert group_budgets(flops).nunique() == 12 and group_budgets(flops).notna().all()


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
