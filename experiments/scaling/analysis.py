"""The analysis of a sweep: every arm by itself, and each against the reference."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.scaling import holdout
from experiments.scaling.compare import compare_arms, paired_difference
from experiments.scaling.design import Design
from experiments.scaling.frontier import MIN_BUDGETS, budget_curves, finished, loss_law, size_law, with_loss
from experiments.scaling.isoflop import Curve, Flat, Line, NoMinimum
from experiments.scaling.results import (
    Analysis,
    ArmResult,
    BestRun,
    CellCounts,
    Comparison,
    Law,
    LawPoint,
    Minimum,
    Prediction,
    RefusedMinimum,
    Tuning,
)


def analyse(
    rows: pd.DataFrame, design: Design, prediction: Prediction | None = None, folder: Path | None = None
) -> Analysis:
    """All that the report says. rows: of the ledger. folder: the sweep's, for the held-out nats of each run."""
    reference = design.arms[0]
    curves = {arm: budget_curves(finished(rows, "fit", arm), design.budgets) for arm in design.arms}
    arms = {arm: arm_result(rows, design, arm, curves[arm], prediction) for arm in design.arms}

    def against_reference(arm: str) -> Comparison:
        bounds = tuple(name for name in (arm, reference) if arms[name].bound)
        paired = None if folder is None else paired_difference(rows, design, arm, reference, folder)
        return compare_arms(arm, reference, (curves[arm], curves[reference]), design.centre, bounds, paired)

    status = rows.status.value_counts()
    return Analysis(
        reference=reference,
        arms=arms,
        comparisons=tuple(against_reference(arm) for arm in design.arms[1:]),
        cells=CellCounts(design.cells, *(int(status.get(word, 0)) for word in ("done", "diverged", "failed"))),
    )


def arm_result(
    rows: pd.DataFrame, design: Design, arm: str, curves: Sequence[Curve], prediction: Prediction | None
) -> ArmResult:
    """One arm: its minima, its laws, what it costs beside FLOPs, its tuning and its held-out outcome."""
    fit = finished(rows, "fit", arm)
    minima = tuple(describe_curve(curve) for curve in curves)
    warnings = [
        f"budget {m.budget:.3g}: {text}"
        for m in minima
        for text in ((m.refused,) if isinstance(m, RefusedMinimum) else m.flags)
    ]
    tuning, warning = describe_tuning(rows[(rows.kind == "tune") & (rows.arm == arm)])
    forecast = None if prediction is None else prediction.arms.get(arm)
    return ArmResult(
        name=arm,
        bound=bool((fit.bits_per_byte_kind == "bound").any()),
        minima=minima,
        law=describe_law(curves, design),
        tuning=tuning,
        best=best_run(fit),
        holdout=holdout.outcome(finished(rows, "holdout", arm), design, forecast),
        warnings=(*warnings, *warning),
    )


def describe_curve(curve: Curve) -> Minimum | RefusedMinimum:
    """The minimum of a curve. One too flat or too noisy to say where it lies still says how low it is, with a flag."""
    if isinstance(curve, NoMinimum):
        return RefusedMinimum(curve.budget, curve.sizes, curve.flags, curve.refused)
    if isinstance(curve, Flat):
        flag = f"{curve.refused}: its lowest fitted point is used, its size is not"
        return Minimum(curve.budget, curve.sizes, (flag,), None, curve.loss)
    return Minimum(curve.budget, curve.sizes, curve.flags, math.exp(curve.x), curve.loss)


def describe_law(curves: Sequence[Curve], design: Design) -> Law | Refused:
    """An arm's laws of loss and size, or the reason why there are none."""
    minima = with_loss(curves)
    if len(minima) < MIN_BUDGETS:
        return Refused(f"{len(minima)} of {len(curves)} budgets have a minimum, a law needs {MIN_BUDGETS}")
    loss, size = loss_law(minima, design.centre), size_law(minima, design.centre)
    return Law(
        centre_flops=math.exp(loss.centre),
        bits_per_byte_at_centre=loss.estimate_at(loss.centre).map(math.exp),
        slope=loss.estimate_slope(),
        size_exponent=None if size is None else size.estimate_slope(),
        band=band(loss, design),
    )


def band(law: Line, design: Design) -> tuple[LawPoint, ...]:
    """The law from the smallest budget to the held-out one, for drawing."""
    ends = design.budgets[0], design.holdout_budget or design.budgets[-1]
    return tuple(LawPoint(float(c), law.estimate_at(math.log(c)).map(math.exp)) for c in np.geomspace(*ends, 40))


def tuned_rate(rows: pd.DataFrame) -> float | None:
    """The learning rate of the lowest bits per byte among an arm's tuning runs; None while there are none."""
    rows = rows[rows.status == "done"]
    return None if rows.empty else float(rows.loc[rows.bits_per_byte.idxmin()].learning_rate)


def describe_tuning(tried: pd.DataFrame) -> tuple[Tuning | None, list[str]]:
    """The learning rate that an arm's tuning runs chose, and a warning where it lies at the edge of those tried."""
    best = tuned_rate(tried)
    if best is None:
        return None, []
    done = tried[tried.status == "done"]
    rates = sorted(tried.learning_rate.dropna())  # a rate that diverged bounds the best one too
    edge = f"learning rate {best:g} is at the edge of the rates tried, {rates[0]:g} to {rates[-1]:g}"
    return Tuning(best, float(done.flops.sum()), len(done)), [edge] if best in (rates[0], rates[-1]) else []


def best_run(fit: pd.DataFrame) -> BestRun | None:
    """The best of an arm's runs at the largest budget that has any; None where there are none."""
    if fit.empty:
        return None
    row = fit.loc[fit[fit.budget_flops == fit.budget_flops.max()].bits_per_byte.idxmin()]

    def optional(name: str) -> float | None:
        return None if pd.isna(row[name]) else row[name]

    return BestRun(
        id=row.id,
        budget_flops=row.budget_flops,
        params_total=row.params_total,
        bits_per_byte=row.bits_per_byte,
        bits_per_byte_se=optional("bits_per_byte_se"),
        tokens_per_second=optional("tokens_per_second"),
        wall_seconds=optional("wall_seconds"),
        peak_memory_bytes=optional("peak_memory_bytes"),
        state_bytes=optional("state_bytes"),
        mfu=optional("mfu"),
    )
