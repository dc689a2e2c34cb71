"""The report of a sweep: one HTML file with the answer first, the same figures as PNG and tables as CSV."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure

from experiments.findings import Refused, write_json
from experiments.harness import ledger
from experiments.scaling import figures, page
from experiments.scaling.analysis import analyse
from experiments.scaling.design import read_design
from experiments.scaling.results import Analysis, ArmResult, read_prediction
from experiments.scaling.tables import arms_table, holdout_table, minima_table, multiplier_table, number


def write(sweep: Path) -> list[str]:
    """Write <sweep>/report.html, figures/*.png, tables/*.csv and analysis.json; return the lines that sum it up.

    A sweep that is not finished is reported as far as it is, and the missing cells are counted.
    """
    sweep = Path(sweep)
    design, rows = read_design(sweep), ledger.read(sweep / "ledger.jsonl")
    said = sweep / "prediction.json"
    prediction = read_prediction(said) if said.exists() else None
    analysis = analyse(rows, design, prediction, sweep)
    write_json(sweep / "analysis.json", analysis)
    tables = {
        "arms": arms_table(analysis),
        "minima": minima_table(analysis),
        "multipliers": multiplier_table(analysis),
        "holdout": holdout_table(analysis),
        "runs": rows.drop(columns=["versions"]),
    }
    drawn = {"frontier": figures.frontier(analysis), "isoflop": figures.isoflop_curves(rows, analysis)}
    if (rows.kind == "tune").any():
        drawn["tuning"] = figures.tuning(rows, analysis)
    (sweep / "figures").mkdir(exist_ok=True)
    (sweep / "tables").mkdir(exist_ok=True)
    pictures = {name: png(figure, sweep / "figures" / f"{name}.png") for name, figure in drawn.items()}
    for name, table in tables.items():
        table.to_csv(sweep / "tables" / f"{name}.csv", index=False)
    path = sweep / "report.html"
    lines = sentences(analysis)
    html = page.render(design, rows, lines, analysis.comparisons, tables, pictures, prediction)
    ledger.write_atomically(path, html)
    return [*lines, f"report: {path}"]


def png(figure: Figure, path: Path) -> str:
    """Save a figure and return it as a data URL, so that the page is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sentences(analysis: Analysis) -> list[str]:
    """The findings: one line per arm and one per comparison, then what to be wary of."""
    arms, cells = analysis.arms.values(), analysis.cells
    lines = [arm_sentence(arm) for arm in arms]
    lines += [comparison.verdict.sentence for comparison in analysis.comparisons]
    lines += [f"warning: {arm.name}: {text}" for arm in arms for text in arm.warnings]
    if cells.missing or cells.diverged or cells.failed:
        lines.append(
            f"warning: of {cells.planned} cells {cells.missing} are missing, {cells.diverged} diverged, "
            f"{cells.failed} failed; start the same command again to run what is missing or failed"
        )
    return lines


def arm_sentence(arm: ArmResult) -> str:
    """An arm's level and slope, and its prediction against the outcome."""
    law, held = arm.law, arm.holdout
    if isinstance(law, Refused):
        return f"{arm.name}: no scaling law, {law.refused}"
    kind = "bits per byte (upper bound)" if arm.bound else "bits per byte"
    level = number(law.bits_per_byte_at_centre.value)
    line = f"{arm.name}: {level} {kind} at {law.centre_flops:.2g} FLOPs, slope {law.slope}"
    if held and held.predicted:
        inside = "inside" if held.inside else "OUTSIDE"
        line += f"; held-out budget predicted {held.predicted}, came out {number(held.bits_per_byte)}"
        line += f", {inside} the interval"
    return line
