"""Any table of runs can be compared, ours or somebody else's."""

import json
import sys

import pandas as pd
import pytest

from experiments import compare, score
from experiments.scaling.foreign import design_of, read_rows

THEIRS = ["columns.arm=model", "columns.loss=nll", "columns.flops=C", "columns.params=N", "columns.tokens=D"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command and returns what it printed, or how it ended."""

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        command.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def theirs(make_sweep, tmp_path):
    """A table of other columns, of arms of which one needs half the compute."""
    rows = make_sweep({"base": {}, "better": {"multiplier": 2.0}}, noise=0.003, kinds=("fit",)).rows
    table = rows[["arm", "bits_per_byte", "flops", "params_total", "tokens"]].set_axis(
        ["model", "nll", "C", "N", "D"], axis=1
    )
    path = tmp_path / "theirs.csv"
    table.to_csv(path, index=False)
    return path


@pytest.mark.thorough
def test_a_table_of_somebody_elses_has_a_verdict(run, theirs, tmp_path):
    out = tmp_path / "found.json"
    said = run(compare, f"ledger={theirs}", "ref=base", f"out={out}", *THEIRS)
    assert "better against base: better" in said
    found = json.loads(out.read_text())["comparisons"][0]["centre"]["estimate"]
    assert found["low"] < 2 < found["high"]


@pytest.mark.thorough
def test_a_sweeps_ledger_needs_no_columns(run, make_sweep, tmp_path):
    folder = make_sweep({"a": {}, "b": {"multiplier": 2.0}}, noise=0.003).write(tmp_path / "sweep")
    said = run(compare, f"ledger={folder / 'ledger.jsonl'}")
    assert "b against a: better" in said and "missing" not in said
    assert "a against b: worse" in run(compare, f"ledger={folder / 'ledger.jsonl'}", "ref=b")


def test_runs_on_no_budget_are_compared_over_the_middle_of_their_flops(theirs):
    rows = read_rows(
        theirs, dict(arm="model", loss="nll", flops="C", params="N", tokens="D", budget=None, seed=None), []
    )
    rows["budget_flops"] = rows.flops = rows.flops * (1 + rows.index / 1000)
    design = design_of(rows, None)
    assert design.arms == ("base", "better") and len(design.budgets) == 4
    assert rows.flops.min() < design.budgets[0] < design.budgets[-1] < rows.flops.max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["ref=none"], "ref='none' is no arm of the table; it has 'base', 'better'"),
        (["columns.arm=family"], "columns.arm='family' is no column of the table"),
        (["columns.loss=null"], "columns.loss"),
        (["ledger=nowhere.csv"], "nowhere.csv"),
        (["out=/proc/no/out.json"], "out=/proc/no/out.json cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(run, theirs, capsys, change, words):
    with pytest.raises(SystemExit) as stopped:
        run(compare, f"ledger={theirs}", *THEIRS, *change)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1


def test_one_arm_is_nothing_to_compare(theirs):
    table = pd.read_csv(theirs)
    table[table.model == "base"].to_csv(theirs, index=False)
    rows = read_rows(
        theirs, dict(arm="model", loss="nll", flops="C", params="N", tokens="D", budget=None, seed=None), []
    )
    with pytest.raises(ValueError, match="a comparison needs two"):
        design_of(rows, None)


@pytest.mark.thorough
def test_every_prediction_below_a_folder_is_scored(run, make_sweep, tmp_path):
    make_sweep({"a": {}, "b": {}}, noise=0.003).write(tmp_path / "first")
    assert "2 of 2 predictions held" in run(score, f"root={tmp_path}")
    with pytest.raises(SystemExit, match="2"):
        run(score, f"root={tmp_path / 'none'}")
