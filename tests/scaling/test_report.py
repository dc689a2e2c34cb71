"""The report is one file that says the answer first, however far the sweep has come."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from experiments.scaling import report

ROOT = Path(__file__).parents[2]
ARMS = {"reference": {}, "new": {"slope": 0.1}, "masked": {"level": 4.0, "kind": "bound"}}


def test_the_report_has_figures_tables_commands_and_needs_no_other_file(make_sweep):
    folder = make_sweep(ARMS, noise=0.002)
    lines = report.write(folder)
    page = (folder / "report.html").read_text()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["frontier.png", "isoflop.png", "tuning.png"]
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert "python -m experiments.sweep" in page and "upper bound" in page
    arms = pd.read_csv(folder / "tables" / "arms.csv")
    assert arms.arm.tolist() == list(ARMS)
    assert json.loads((folder / "analysis.json").read_text())["reference"] == "reference"
    assert all(line.split(":")[0] in page for line in lines[:-1])


@pytest.mark.parametrize("kinds", [(), ("tune",), ("tune", "fit")])
def test_an_unfinished_sweep_is_reported_as_far_as_it_is(make_sweep, kinds):
    folder = make_sweep({"reference": {}, "new": {}}, kinds=kinds)
    lines = report.write(folder)
    assert any("cells" in line and "are missing" in line for line in lines)
    assert (folder / "report.html").exists()


def test_failed_and_diverged_runs_are_listed(make_sweep):
    folder = make_sweep({"reference": {}}, noise=0.002)
    path = folder / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"status": "failed", "error": "RuntimeError: <boom>", "bits_per_byte": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report.write(folder)
    page = (folder / "report.html").read_text()
    assert any("1 failed" in line for line in lines) and "RuntimeError: &lt;boom&gt;" in page


def test_the_notebook_runs_on_a_sweep_and_draws_its_figures(make_sweep, monkeypatch):
    folder = make_sweep(ARMS, noise=0.002)
    monkeypatch.setenv("ARCHIPELAGO_SWEEP", str(folder))
    notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "scaling_laws.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    images = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) >= 3
