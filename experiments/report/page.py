"""The HTML of a sweep's report: one page that needs no other file, the answers first. What users name is escaped."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experiments.findings import number
from experiments.report import figures, inline, tables
from experiments.report.wording import error_sentence, power_sentence, prediction_sentence, warnings
from experiments.scaling.design import Design
from experiments.scaling.results import Analysis, Prediction

GLYPHS = dict(zip(figures.MARKERS, "●■▲◆▼✚✖", strict=True))
TEMPLATE = Path(__file__).with_name("page.html")


def render(design: Design, rows: pd.DataFrame, analysis: Analysis, prediction: Prediction | None) -> str:
    """The page. rows: of the ledger. prediction: what was written before the held-out runs, None where nothing was."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    done = rows[rows.status == "done"]
    return environment.from_string(TEMPLATE.read_text()).render(
        design=design,
        centre=math.exp(design.centre),
        analysis=analysis,
        prediction=prediction,
        done=done,
        looks={arm.name: figures.look(analysis, arm) for arm in analysis.arms.values()},
        glyphs=GLYPHS,
        asked=asked(analysis),
        warnings=warnings(analysis),
        drawn=draw(rows, analysis),
        tables=tables,
        unfinished=tables.unfinished_table(rows),
        counts=counts(done),
        circumstances=circumstances(done),
    )


def asked(analysis: Analysis) -> Mapping[str, str]:
    """The questions beside the comparisons that have an answer, with their answers."""
    answers = {
        "Did the laws foretell the held-out budget?": prediction_sentence(analysis),
        "What could these runs tell apart?": power_sentence(analysis),
        "Where does the uncertainty come from?": error_sentence(analysis),
    }
    return {question: answer for question, answer in answers.items() if answer}


def draw(rows: pd.DataFrame, analysis: Analysis) -> Mapping[str, list[Markup]]:
    """The figures as SVG: a panel per arm of those that have one."""

    def svg(title: str, figure: figures.Figure) -> Markup:
        return Markup(inline.svg(figure, title, rows))

    tuned = [arm.name for arm in analysis.arms.values() if (rows[rows.arm == arm.name].kind == "tune").any()]
    return {
        "frontier": [svg("Frontier", figures.frontier(rows, analysis))],
        "multipliers": [svg("Compute multipliers", figures.multipliers(analysis))],
        "isoflop": [svg(f"isoFLOP curves of {arm}", figures.isoflop(rows, analysis, [arm])) for arm in analysis.arms],
        "tuning": [svg(f"Learning rates of {arm}", figures.tuning(rows, analysis, [arm])) for arm in tuned],
    }


def counts(done: pd.DataFrame) -> list[str]:
    """Return the ratio of 6ND to the counted FLOPs in words, arm by arm."""
    ratio = (done.flops_6nd / done.flops).astype(float)
    return [f"{arm}: {number(r.min())} to {number(r.max())}" for arm, r in ratio.groupby(done.arm)]


def circumstances(done: pd.DataFrame) -> str:
    """Versions, machines, and the time that the runs took."""
    if done.empty:
        return "No run is done."
    versions = ", ".join(f"{name} {version}" for name, version in done.versions.iloc[0].items())
    machines = ", ".join(sorted({str(device) for device in done.device.dropna()}))
    seconds = done.wall_seconds.sum()
    return (
        f"{versions}. {machines}. Runs took {seconds:,.0f} s one after the other, "
        f"{done.train_seconds.sum() / seconds:.0%} of it in training steps."
    )
