"""The report of a sweep: one HTML file with the answer first, the same figures as PNG and tables as CSV."""

import base64
import html
import io
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.harness import ledger
from experiments.scaling import compare, figures
from experiments.scaling.fit import write_json

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eee } th { font-weight: 600; vertical-align: bottom }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } .answer li { margin: .4rem 0 }
.warning { color: #8a4b00 } code, pre { background: #f5f5f5; font-size: 13px; padding: .1rem .3rem } pre { padding: .6rem; overflow-x: auto }
div.wide { overflow-x: auto } .small { color: #555; font-size: 13px } @media print { body { margin: 0; max-width: none } }
"""


def write(sweep: Path) -> list[str]:
    """Write <sweep>/report.html, figures/*.png, tables/*.csv and analysis.json; return the lines that sum it up.

    A sweep that is not finished is reported as far as it is, and the missing cells are counted.
    """
    sweep = Path(sweep)
    plan = json.loads((sweep / "plan.json").read_text())
    rows = ledger.read(sweep / "ledger.jsonl")
    said = sweep / "prediction.json"
    prediction = json.loads(said.read_text()) if said.exists() else None
    analysis = compare.analyse(rows, plan, prediction, sweep)
    write_json(sweep / "analysis.json", analysis)
    tables = {
        "arms": arms_table(analysis),
        "minima": minima_table(analysis),
        "multipliers": multiplier_table(analysis),
        "holdout": holdout_table(analysis),
        "runs": rows.drop(columns=["versions"]),
    }
    drawn = {"frontier": figures.frontier(analysis), "isoflop": figures.isoflop(rows, analysis)}
    if (rows.kind == "tune").any():
        drawn["tuning"] = figures.tuning(rows, analysis)
    (sweep / "figures").mkdir(exist_ok=True)
    (sweep / "tables").mkdir(exist_ok=True)
    pictures = {name: png(figure, sweep / "figures" / f"{name}.png") for name, figure in drawn.items()}
    for name, table in tables.items():
        table.to_csv(sweep / "tables" / f"{name}.csv", index=False)
    path = sweep / "report.html"
    ledger.write_atomically(path, page(plan, rows, analysis, tables, pictures, prediction))
    return [*sentences(analysis), f"report: {path}"]


def png(figure: Figure, path: Path) -> str:
    """Save a figure and return it as a data URL, so that the page is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None else f"{x:.{digits}g}"


def between(interval, digits: int = 3) -> str:
    return "" if interval is None else f" [{number(interval[0], digits)}, {number(interval[1], digits)}]"


def sentences(analysis: dict) -> list[str]:
    """What was found, one line an arm and one a comparison, then what to be wary of."""
    lines, cells = [], analysis["cells"]
    for name, arm in analysis["arms"].items():
        law = arm["law"]
        if "refused" in law:
            lines.append(f"{name}: no scaling law, {law['refused']}")
            continue
        kind = "bits per byte (upper bound)" if arm["bound"] else "bits per byte"
        line = f"{name}: {number(law['bits_per_byte_at_centre'])} {kind} at {law['centre_flops']:.2g} FLOPs, slope "
        line += number(law["slope"]) + between(law["slope_interval"])
        held = arm["holdout"]
        if held and "predicted" in held:
            line += f"; held-out budget predicted {number(held['predicted'])}{between(held['interval'])}, came out "
            line += f"{number(held['bits_per_byte'])}, {'inside' if held['inside'] else 'OUTSIDE'} the interval"
        lines.append(line)
    lines += [c["sentence"] for c in analysis["comparisons"]]
    lines += [f"warning: {name}: {text}" for name, arm in analysis["arms"].items() for text in arm["warnings"]]
    missing = cells["planned"] - cells["done"] - cells["diverged"] - cells["failed"]
    if missing or cells["diverged"] or cells["failed"]:
        lines.append(
            f"warning: of {cells['planned']} cells {missing} are missing, {cells['diverged']} diverged, "
            f"{cells['failed']} failed; start the same command again to run what is missing or failed"
        )
    return lines


def arms_table(analysis: dict) -> pd.DataFrame:
    out = []
    for name, arm in analysis["arms"].items():
        law, best, tuned = arm["law"], arm.get("best", {}), arm.get("tuning", {})
        out.append(
            {
                "arm": name,
                "likelihood": "upper bound" if arm["bound"] else "exact",
                "slope": number(law.get("slope")) + between(law.get("slope_interval")),
                "bits/byte at centre": number(law.get("bits_per_byte_at_centre"))
                + between(law.get("bits_per_byte_interval")),
                "exponent of N*": number(law.get("size_exponent")) + between(law.get("size_exponent_interval")),
                "tuned learning rate": number(tuned.get("learning_rate")),
                "tuning FLOPs": number(tuned.get("flops")),
                "best run: parameters": number(best.get("params_total")),
                "tokens/s": number(best.get("tokens_per_second")),
                "wall s": number(best.get("wall_seconds")),
                "peak memory MB": number(best["peak_memory_bytes"] / 1e6) if best.get("peak_memory_bytes") else "–",
                "decode state kB": number(best["state_bytes"] / 1e3) if best.get("state_bytes") else "–",
                "MFU": number(best.get("mfu"), 2),
            }
        )
    return pd.DataFrame(out)


def minima_table(analysis: dict) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": name,
            "budget": number(m["budget"]),
            "parameters": number(m["params"]),
            "bits/byte": number(m["bits_per_byte"], 4),
            "sizes": m["sizes"],
            "status": m["refused"] and f"refused: {m['refused']}" or "; ".join(m["flags"]) or "ok",
        }
        for name, arm in analysis["arms"].items()
        for m in arm["minima"]
    )


def multiplier_table(analysis: dict) -> pd.DataFrame:
    columns = ["arm", "against", "budget", "compute multiplier", "95 % interval"]
    return pd.DataFrame(
        [
            [c["arm"], c["reference"], number(m["budget"]), number(m["value"]), between(m["interval"]).strip()]
            for c in analysis["comparisons"]
            for m in c.get("multipliers", [])
        ],
        columns=columns,
    )


def holdout_table(analysis: dict) -> pd.DataFrame:
    columns = ["arm", "budget", "predicted", "95 % interval", "outcome", "inside", "outcome from"]
    return pd.DataFrame(
        [
            [
                name, number(h["budget"]), number(h.get("predicted"), 4), between(h.get("interval"), 4).strip(),
                number(h["bits_per_byte"], 4), {True: "yes", False: "no"}.get(h.get("inside"), "–"), h["how"],
            ]
            for name, arm in analysis["arms"].items()
            if (h := arm["holdout"])
        ],
        columns=columns,
    )  # fmt: skip


def page(plan: dict, rows: pd.DataFrame, analysis: dict, tables: dict, pictures: dict, prediction: dict | None) -> str:
    text = html.escape
    corpus, done = plan["corpus"], rows[rows.status == "done"]

    def table(name: str) -> str:
        t = tables[name]
        return f'<div class="wide">{t.to_html(index=False, border=0)}</div>' if len(t) else "<p>None.</p>"

    def picture(name: str) -> str:
        return f'<img alt="{name}" src="{pictures[name]}">' if name in pictures else ""

    def items(lines: list[str]) -> str:
        return "".join(f"<li{' class=warning' * line.startswith('warning')}>{text(line)}</li>" for line in lines)

    bad = rows[rows.status != "done"]
    ratio = (done.flops_6nd / done.flops).astype(float)
    conventions = "".join(
        f"<li>{text(arm)}: 6ND is {number(r.min())} to {number(r.max())} of the counted FLOPs</li>"
        for arm, r in ratio.groupby(done.arm)
    )
    machine = ", ".join(sorted({text(str(d)) for d in done.device.dropna()}))
    versions = ", ".join(f"{k} {v}" for k, v in (done.versions.iloc[0] if len(done) else {}).items())
    share = done.train_seconds.sum() / done.wall_seconds.sum() if len(done) else 0.0
    paired = "".join(
        f"<li>{text(c['arm'])} minus {text(c['reference'])}, best runs at {number(p['budget'])} FLOPs: "
        f"{p['bits_per_byte']:+.4f} ± {p['standard_error']:.4f} bits per byte (standard error over the held-out sequences)</li>"
        for c in analysis["comparisons"]
        if (p := c["paired"])
    )
    arms = tables["arms"].set_index("arm").T.to_html(border=0)
    tuned = ""
    if "tuning" in pictures:
        tuned = (
            f"<h2>Learning rates</h2><p>Tuned with equal effort; these runs are in the ledger.</p>{picture('tuning')}"
        )
    written = (
        f"written {prediction['written']}, before the first held-out run"
        if prediction and "written" in prediction
        else ""
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{text(plan["name"])}: scaling report</title><style>{STYLE}</style>
<h1>{text(plan["name"])}</h1>
<p class="small">{text(corpus["name"])}, {corpus["train_tokens"]:,} training tokens, {corpus["heldout_bytes"]:,} held-out bytes;
{len(done)} of {len(plan["cells"])} cells done, {number(done.flops.sum())} FLOPs</p>
<h2>The answer</h2><ul class="answer">{items(sentences(analysis))}</ul>
<h2>Frontier</h2>{picture("frontier")}
<p class="small">Each point is the minimum of one isoFLOP curve; lines are power laws through them, bands their 95 % interval
(resampled runs, or the jackknife over budgets where that is wider). The prediction was {written or "not made"}.</p>
{table("holdout")}
<h2>isoFLOP curves</h2>{picture("isoflop")}{table("minima")}
<h2>Arms</h2>{arms}
<p class="small">Speed, memory and state are those of the best run at the largest fitted budget. Slope: exponent of bits per
byte in FLOPs. Centre: the geometric mean of the fitted budgets. Peak memory on a CPU is that of the whole process.</p>
<h2>Compute multipliers</h2>
<p class="small">The compute that the reference needs for the arm's bits per byte, over the arm's. Above 1 the arm is better.</p>
{table("multipliers")}<ul>{paired}</ul>
{tuned}
<h2>FLOPs by two counts</h2><p>The x axis is counted from each module. Beside it 6ND:</p><ul>{conventions}</ul>
<h2>Runs that failed or diverged</h2>
{bad[["id", "arm", "kind", "budget_flops", "width", "status", "error"]].to_html(index=False, border=0) if len(bad) else "<p>None.</p>"}
<h2>To reproduce</h2><pre>{text(chr(10).join(plan["commands"]))}</pre>
<p class="small">Corpus digest {text(corpus["digest"])}. {text(versions)}. {machine}. Runs took {done.wall_seconds.sum():.0f} s one after
the other, {share:.0%} of it in training steps. Files beside this one: plan.json, prediction.json, ledger.jsonl, analysis.json,
figures/, tables/.</p></html>"""
