"""The report is one file that says the answer first, however far the sweep has come."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from experiments.report import report

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_the_report_has_figures_tables_scalars_and_commands(reported):
    folder, lines = reported
    page = (folder / "report.html").read_text()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    drawn = ["frontier.png", "isoflop.png", "multipliers.png", "tuning.png"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == drawn
    assert not re.search(r'(src|href)="(?!#|cells/)', page) and "http" not in page
    assert "python -m experiments.sweep" in page and "upper bound" in page
    assert "written 2026-01-01T00:00:00+0000, before the first held-out run" in page
    assert pd.read_csv(folder / "tables" / "arms.csv").arm.tolist() == ["reference", "new", "masked"]
    assert (folder / "tensorboard" / "new, lowest").is_dir()


@pytest.mark.thorough
def test_every_line_of_the_terminal_is_about_an_arm_of_the_page(reported):
    folder, lines = reported
    page = (folder / "report.html").read_text()
    assert lines[0].startswith("new against reference: better") and lines[0] in page.replace("&#39;", "'")
    assert all(line.removeprefix("warning: ").split(" ")[0].strip(":,") in page for line in lines[:-1])


@pytest.mark.thorough
def test_the_analysis_stands_in_a_file_with_every_number_and_its_interval(reported):
    got = json.loads((reported[0] / "analysis.json").read_text())
    assert got["reference"] == "reference" and list(got["arms"]) == ["reference", "new", "masked"]
    assert got["arms"]["new"]["law"]["slope"].keys() == {"value", "low", "high"}
    assert got["comparisons"][0]["verdict"].keys() == {"outcome", "sentence", "effect", "rule"}
    assert got["comparisons"][0]["paired"]["standard_error"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("kinds", [(), ("tune",), ("tune", "fit")])
def test_an_unfinished_sweep_is_reported_as_far_as_it_is(make_sweep, tmp_path, kinds):
    folder = make_sweep({"reference": {}, "new": {}}, kinds=kinds).write(tmp_path / "sweep")
    (folder / "prediction.json").unlink()
    lines = report.write(folder)
    assert any("cells" in line and "are missing" in line for line in lines)
    assert "The prediction was not made" in (folder / "report.html").read_text()


@pytest.mark.thorough
def test_failed_runs_are_listed_and_what_others_have_named_is_escaped(make_sweep, tmp_path):
    sweep = make_sweep({"<script>a&b": {}, "</table><b>": {"kind": "bound"}}, noise=0.002)
    sweep.rows.loc[0, ["status", "error", "bits_per_byte"]] = ["failed", "RuntimeError: <boom>", None]
    sweep.rows["device"], sweep.plan["name"], sweep.plan["commands"] = "<i>GPU", "<i>name", ["run <i>me"]
    sweep.plan["corpus"] |= {"name": "<i>text", "digest": "<i>0"}
    sweep.rows["versions"] = [{"<i>torch": "2"}] * len(sweep.rows)
    folder = sweep.write(tmp_path / "sweep")
    said = json.loads((folder / "prediction.json").read_text()) | {"written": "<i>now"}
    (folder / "prediction.json").write_text(json.dumps(said))
    lines = report.write(folder)
    page = (folder / "report.html").read_text()
    assert any("1 failed" in line for line in lines) and "RuntimeError: &lt;boom&gt;" in page
    assert "&lt;script&gt;a&amp;b" in page and "&lt;/table&gt;&lt;b&gt;" in page and page.count("&lt;i&gt;") >= 7
    assert page.count("<script>") == 1 and not re.search(r"<(i|boom)>|<b>[^–−\d∞]", page)


@pytest.mark.thorough
def test_the_notebook_runs_on_a_sweep_and_draws_its_figures(reported, monkeypatch):
    monkeypatch.setenv("ARCHIPELAGO_SWEEP", str(reported[0]))
    notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "scaling_laws.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in outputs) == 4 and sum("text/html" in data for data in outputs) == 4
