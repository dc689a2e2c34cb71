"""The report of a sweep: one HTML file with the answers first, the figures as PNG, the tables as CSV, and scalars."""

from pathlib import Path

import pandas as pd

from experiments.findings import write_json
from experiments.harness import ledger
from experiments.harness.files import write_atomically
from experiments.report import figures, page, scalars, tables
from experiments.report.wording import sentences
from experiments.scaling.analysis import analyse
from experiments.scaling.design import Design, read_design
from experiments.scaling.results import Analysis, Prediction, read_prediction


def write(sweep: Path) -> list[str]:
    """Write <sweep>/report.html, figures/*.png, tables/*.csv, tensorboard/ and analysis.json; return the lines that sum
    it up.

    A sweep that is not finished is reported as far as it is, and the missing cells are counted.
    """
    sweep = Path(sweep)
    design, read, prediction, analysis = so_far(sweep)
    rows = design.losses(read)
    write_json(sweep / "analysis.json", analysis)
    drawn = {
        "frontier": figures.frontier(rows, analysis),
        "multipliers": figures.multipliers(analysis),
        "isoflop": figures.isoflop(rows, analysis),
    }
    if (rows.kind == "tune").any():
        drawn["tuning"] = figures.tuning(rows, analysis)
    written = {
        "arms": tables.arms_table(analysis),
        "laws": tables.laws_table(analysis),
        "multipliers": tables.multiplier_table(analysis),
        "holdout": tables.holdout_table(analysis),
        "minima": tables.minima_table(analysis),
        "runs": read.drop(columns=["versions"]),
    }
    (sweep / "figures").mkdir(exist_ok=True)
    (sweep / "tables").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(sweep / "figures" / f"{name}.png", dpi=200)
    for name, table in written.items():
        table.to_csv(sweep / "tables" / f"{name}.csv", index=False)
    scalars.write(sweep / "tensorboard", read)
    path = sweep / "report.html"
    write_atomically(path, page.render(design, rows, analysis, prediction))
    return [*sentences(analysis), f"report: {path}"]


def so_far(sweep: Path) -> tuple[Design, pd.DataFrame, Prediction | None, Analysis]:
    """Return the design of a sweep, the rows of its ledger, what it has predicted if it has, and what the rows tell."""
    design, rows = read_design(sweep), ledger.read(sweep / "ledger.jsonl")
    said = sweep / "prediction.json"
    prediction = read_prediction(said) if said.exists() else None
    return design, rows, prediction, analyse(rows, design, prediction, sweep)
