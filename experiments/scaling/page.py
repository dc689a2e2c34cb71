"""The HTML of a sweep's report: one page that needs no other file, the answer first. What users name is escaped."""

from collections.abc import Iterable, Mapping
from html import escape

import pandas as pd

from experiments.scaling.design import Design
from experiments.scaling.results import Comparison, Prediction
from experiments.scaling.tables import number

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem; margin-bottom: 0 }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eee }
th { font-weight: 600; vertical-align: bottom } td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .answer li { margin: .4rem 0 } .warning { color: #8a4b00 }
code, pre { background: #f5f5f5; font-size: 13px; padding: .1rem .3rem } pre { padding: .6rem; overflow-x: auto }
div.wide { overflow-x: auto } .small { color: #555; font-size: 13px }
@media print { body { margin: 0; max-width: none } }
"""
FAILED = ["id", "arm", "kind", "budget_flops", "width", "status", "error"]


def render(
    design: Design,
    rows: pd.DataFrame,
    lines: Iterable[str],
    comparisons: Iterable[Comparison],
    tables: Mapping[str, pd.DataFrame],
    pictures: Mapping[str, str],
    prediction: Prediction | None,
) -> str:
    """The page. lines: what was found, as sentences. tables: arms, minima, multipliers, holdout. pictures: frontier,
    isoflop and, where there were tuning runs, tuning, as URLs of data."""
    corpus, done, unfinished = design.corpus, rows[rows.status == "done"], rows[rows.status != "done"]
    written = f"written {escape(prediction.written)}, before the first held-out run" if prediction else "not made"
    return f"""<!doctype html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(design.name)}: scaling report</title><style>{STYLE}</style>
<h1>{escape(design.name)}</h1>
<p class="small">{escape(corpus.name)}, {corpus.train_tokens:,} training tokens, {corpus.heldout_bytes:,} held-out
bytes; {len(done)} of {design.cells} cells done, {number(done.flops.sum())} FLOPs</p>
<h2>The answer</h2><ul class="answer">{"".join(_answer(line) for line in lines)}</ul>
<h2>Frontier</h2>{_picture("frontier", pictures)}
<p class="small">Each point is the minimum of one isoFLOP curve; lines are power laws through them, bands their 95 %
interval (resampled runs, or the jackknife over budgets where that is wider). The prediction was {written}.</p>
{_table(tables["holdout"])}
<h2>isoFLOP curves</h2>{_picture("isoflop", pictures)}{_table(tables["minima"])}
<h2>Arms</h2>{tables["arms"].set_index("arm").T.to_html(border=0)}
<p class="small">Speed, memory and state are those of the best run at the largest fitted budget. Slope: exponent of bits
per byte in FLOPs. Centre: the geometric mean of the fitted budgets. Peak memory on a CPU is that of the whole
process.</p>
<h2>Compute multipliers</h2>
<p class="small">The compute that the reference needs for the arm's bits per byte, over the arm's. Above 1 the arm is
better.</p>
{_table(tables["multipliers"])}<ul>{"".join(_paired(comparison) for comparison in comparisons)}</ul>
{_tuning(pictures)}
<h2>FLOPs by two counts</h2>
<p>The x axis is counted from each module. Beside it 6ND:</p>
<ul>{_conventions(done)}</ul>
<h2>Runs that failed or diverged</h2>
{unfinished[FAILED].to_html(index=False, border=0) if len(unfinished) else "<p>None.</p>"}
<h2>To reproduce</h2><pre>{escape(chr(10).join(design.commands))}</pre>
<p class="small">Corpus digest {escape(corpus.digest)}. {_circumstances(done)} Files beside this one: plan.json,
prediction.json, ledger.jsonl, analysis.json, figures/, tables/.</p></html>"""


def _answer(line: str) -> str:
    return f"<li{' class=warning' * line.startswith('warning')}>{escape(line)}</li>"


def _picture(name: str, pictures: Mapping[str, str]) -> str:
    return f'<img alt="{name}" src="{pictures[name]}">'


def _table(table: pd.DataFrame) -> str:
    return f'<div class="wide">{table.to_html(index=False, border=0)}</div>' if len(table) else "<p>None.</p>"


def _paired(comparison: Comparison) -> str:
    paired, pair = comparison.paired, f"{escape(comparison.arm)} minus {escape(comparison.reference)}"
    if paired is None:
        return ""
    return (
        f"<li>{pair}, best runs at {number(paired.budget)} FLOPs: "
        f"{paired.bits_per_byte:+.4f} ± {paired.standard_error:.4f} bits per byte "
        "(standard error over the held-out sequences)</li>"
    )


def _tuning(pictures: Mapping[str, str]) -> str:
    if "tuning" not in pictures:
        return ""
    tuned = "Tuned with equal effort; these runs are in the ledger."
    return f"<h2>Learning rates</h2><p>{tuned}</p>{_picture('tuning', pictures)}"


def _conventions(done: pd.DataFrame) -> str:
    ratio = (done.flops_6nd / done.flops).astype(float)
    return "".join(
        f"<li>{escape(arm)}: 6ND is {number(r.min())} to {number(r.max())} of the counted FLOPs</li>"
        for arm, r in ratio.groupby(done.arm)
    )


def _circumstances(done: pd.DataFrame) -> str:
    """Versions, machines, and the time that the runs took."""
    versions = ", ".join(f"{name} {version}" for name, version in (done.versions.iloc[0] if len(done) else {}).items())
    machines = ", ".join(sorted({str(device) for device in done.device.dropna()}))
    in_steps = done.train_seconds.sum() / done.wall_seconds.sum() if len(done) else 0.0
    return (
        f"{escape(versions)}. {escape(machines)}. Runs took {done.wall_seconds.sum():.0f} s one after the other, "
        f"{in_steps:.0%} of it in training steps."
    )
