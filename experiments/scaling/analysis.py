"""The analysis of a sweep: every arm by itself, and each against the reference."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.findings import Refused, number
from experiments.fits.isoflop import Curve, Flat, NoMinimum
from experiments.harness.ledger import commits
from experiments.scaling import holdout, tuning
from experiments.scaling.arm_runs import budget_curves, finished, lowest_by_budget
from experiments.scaling.compare import compare_arms, paired_difference
from experiments.scaling.design import Design
from experiments.scaling.joint import FEW, Joint, estimated, join, seed_spread
from experiments.scaling.results import (
    Analysis,
    ArmResult,
    BestRun,
    CellCounts,
    Comparison,
    IsoFlopCurve,
    Law,
    Minimum,
    PairedDifference,
    Point,
    Prediction,
    RefusedMinimum,
)

STEPS = 40  # points of a curve that is drawn
LARGE = 2.0  # spread of runs over that of seeds from which the surface is said to miss something


def analyse(
    rows: pd.DataFrame, design: Design, prediction: Prediction | None = None, folder: Path | None = None
) -> Analysis:
    """All that the report says. rows: of the ledger. folder: the sweep's, for the held-out nats of each run and for the
    predictions of the sweeps beside it.

    Raises:
        ValueError: for rows without the loss that the design compares.
    """
    reference, rows = design.arms[0], design.losses(rows)
    paired = {
        arm: None if folder is None else paired_difference(rows, design, arm, reference, folder)
        for arm in design.arms[1:]
    }
    evaluation = {arm: _relative(rows, design, arm, difference) for arm, difference in paired.items()}
    joint, own_floors = join(rows, design, evaluation), join(rows, design, evaluation, own_floors=True, draws=FEW)
    arms = {arm: arm_result(rows, design, arm, joint, prediction) for arm in design.arms}

    def against_reference(arm: str) -> Comparison:
        bounds = tuple(name for name in (arm, reference) if arms[name].bound)
        return compare_arms(arm, reference, joint, own_floors, design, bounds, paired[arm])

    status = rows.status.value_counts()
    return Analysis(
        loss=design.loss,
        reference=reference,
        arms=arms,
        comparisons=tuple(against_reference(arm) for arm in design.arms[1:]),
        warnings=(*_version_warnings(rows), *_seed_warnings(rows)),
        cells=CellCounts(design.cells, *(int(status.get(word, 0)) for word in ("done", "diverged", "failed"))),
        record=None if folder is None else holdout.record(folder.parent),
    )


def _version_warnings(rows: pd.DataFrame) -> tuple[str, ...]:
    """A warning where arms, or runs of an arm, were not made by the same code."""
    done = rows[rows.status == "done"]
    by_arm = done.astype({"code": str, "commit": str}).groupby("arm")
    if (by_arm.code.nunique() < 2).all() and by_arm.commit.agg(frozenset).nunique() < 2:
        return ()
    return (
        f"the runs were made by several versions of the code ({commits(done)}): what changed between them is part of "
        "the comparison",
    )


def _seed_warnings(rows: pd.DataFrame) -> tuple[str, ...]:
    """A warning where sizes of an arm were run with the same seed."""
    fitted = rows[(rows.kind == "fit") & (rows.status == "done")]
    if not fitted.drop_duplicates(["arm", "budget_flops", "params_total", "seed"]).duplicated(["arm", "seed"]).any():
        return ()
    return (
        "sizes share their seeds, or none are named: what an initialisation and an order of the data do to an arm as a "
        "whole when they are used again is not in the intervals, which may be too narrow",
    )


def _relative(rows: pd.DataFrame, design: Design, arm: str, difference: PairedDifference | None) -> float | None:
    """The standard error of a paired difference as a fraction of the arm's loss."""
    if difference is None:
        return None
    return difference.standard_error / float(finished(rows, arm, "fit").bits_per_byte.astype(float).min())


def arm_result(
    rows: pd.DataFrame, design: Design, arm: str, joint: Joint | Refused, prediction: Prediction | None
) -> ArmResult:
    """One arm: its minima, its part of the surface, what it costs beside FLOPs, its tuning and its held-out outcome."""
    runs = finished(rows, arm, "fit")
    minima = tuple(describe_curve(curve) for curve in budget_curves(runs, design.budgets))
    law = describe_law(joint, arm, design)
    spread = None if isinstance(law, Refused) else law.spread
    tuned, warnings = tuning.describe(rows[(rows.kind == "tune") & (rows.arm == arm)], design.budgets, spread)
    forecast = None if prediction is None else prediction.arms.get(arm)
    return ArmResult(
        name=arm,
        bound=bool((runs.bits_per_byte_kind == "bound").any()),
        minima=minima,
        law=law,
        tuning=tuned,
        best=best_run(runs),
        holdout=holdout.outcome(finished(rows, arm, "holdout"), design, forecast),
        warnings=(*warnings, *_law_warnings(law, minima, design)),
    )


def _law_warnings(law: Law | Refused, minima: Sequence[Minimum | RefusedMinimum], design: Design) -> list[str]:
    """Returns what to be wary of in an arm's surface, each with its consequence."""
    warnings = [
        f"at {number(m.budget)} FLOPs there is no minimum among the sizes tried ({m.refused}): there the frontier "
        "stands on the surface's form alone"
        for m in minima
        if isinstance(m, RefusedMinimum)
    ]
    if isinstance(law, Refused):
        return warnings
    if law.no_floor and not design.above_entropy:
        warnings.append("the surface found no floor, as if loss fell to zero: extrapolations are too hopeful")
    if law.seed_spread is not None and law.spread > LARGE * law.seed_spread:
        warnings.append(
            f"runs lie {law.spread:.2%} from the surface (standard deviation) and seeds alone explain "
            f"{law.seed_spread:.2%}: the surface misses something of these models, which the intervals take for noise"
        )
    return warnings


def describe_curve(curve: Curve) -> Minimum | RefusedMinimum:
    """The minimum of a curve. One too flat or too noisy to say where it lies still says how low it is, with a flag."""
    if isinstance(curve, NoMinimum):
        return RefusedMinimum(curve.budget, curve.sizes, curve.flags, curve.refused)
    if isinstance(curve, Flat):
        flag = f"{curve.refused}: its lowest fitted point is used, its size is not"
        return Minimum(curve.budget, curve.sizes, (flag,), None, curve.loss)
    return Minimum(curve.budget, curve.sizes, curve.flags, math.exp(curve.x), curve.loss)


def describe_law(joint: Joint | Refused, arm: str, design: Design) -> Law | Refused:
    """An arm's part of the surface, or the reason why there is none."""
    if isinstance(joint, Refused):
        return joint
    k = joint.number(arm)
    if k is None:
        return Refused("too few finished runs for a surface")
    point, draws, runs = joint.fit.surface, joint.draws, joint.fit.model.runs
    mine = runs.arm == k
    centre, step = design.centre, 0.01
    rows = joint.rows[mine]
    ends = design.budgets[0], design.holdout_budget or design.budgets[-1]

    def slope(surface):
        low, high = (np.log(surface.frontier(k, centre + side * step)) for side in (-1, 1))
        return (high - low) / (2 * step)

    to_params, by_params = joint.law(k, "params_total")[0], joint.by_params
    return Law(
        centre_flops=math.exp(centre),
        bits_per_byte_at_centre=estimated(point.frontier(k, centre), draws.frontier(k, centre)),
        slope=estimated(slope(point), slope(draws)),
        floor=estimated(point.E[:, k], draws.E[:, k]),
        no_floor=bool(joint.fit.no_floor[k]),
        alpha=estimated(point.alpha[:, k], draws.alpha[:, k]),
        beta=estimated(point.beta[:, k], draws.beta[:, k]),
        gamma=estimated(point.gamma[:, k], draws.gamma[:, k]),
        size_exponent=estimated(to_params * point.size_exponent(k), to_params * draws.size_exponent(k)),
        size_exponent_6nd=None if by_params is None else float(by_params.size_exponent(k)[0]),
        spread=float(joint.fit.spread[k]),
        seed_spread=seed_spread(rows),
        frontier=tuple(
            Point(float(c), estimated(point.frontier(k, math.log(c)), draws.frontier(k, math.log(c))))
            for c in np.geomspace(*ends, STEPS)
        ),
        curves=tuple(_curve(joint, k, budget) for budget in sorted(rows.budget_flops.unique())),
    )


def _curve(joint: Joint, arm: int, budget: float) -> IsoFlopCurve:
    """The surface at one budget, over the sizes tried there."""
    runs = joint.fit.model.runs
    tried = runs.size[(runs.arm == arm) & np.isclose(joint.rows.budget_flops.to_numpy(float), budget)]
    size = np.linspace(tried.min(), tried.max(), STEPS)
    data = math.log(budget / 6) - size
    value, draws = joint.fit.surface.loss(arm, size, data)[0], joint.draws.loss(arm, size, data)
    params = joint.params(arm, size)
    points = (Point(float(params[i]), estimated(value[i], draws[:, i])) for i in range(STEPS))
    return IsoFlopCurve(float(budget), tuple(points))


def best_run(fit: pd.DataFrame) -> BestRun | None:
    """The best of an arm's runs at the largest budget that has any; None where there are none."""
    if fit.empty:
        return None
    row = lowest_by_budget(fit).iloc[-1]

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
