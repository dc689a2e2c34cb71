"""Arms against each other, from the joint surface: offset, trend and floor, and a verdict in words."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.findings import ArmOutcome, Estimate, Refused, Verdict, number
from experiments.scaling.arm_runs import finished, lowest_by_budget
from experiments.scaling.cost_ratios import cost_ratios
from experiments.scaling.design import Design
from experiments.scaling.joint import Joint, estimated
from experiments.scaling.power import power_of
from experiments.scaling.results import Comparison, Multiplier, PairedDifference

MARGIN = 1.25  # "no difference" is said only of multipliers known to lie within this factor of 1
REACH = 4  # a surface is not believed further than this factor beyond the budgets it was fitted to
RULE = (
    "The multiplier is the compute that the reference needs for the arm's loss, over the arm's, by one surface "
    "L = E + ((A / M^alpha)^(1 / gamma) + (B / D^beta)^(1 / gamma))^gamma through the runs of all arms (M: FLOPs per "
    "token over 6, D: tokens; A, B, alpha and beta of each arm's own, E and gamma shared by exact likelihoods). The "
    "arm crosses over where the multiplier's 95 % interval lies above 1 at one budget and below 1 at another. Else it "
    "is better where the interval at the geometric mean of the budgets lies above 1, worse where it lies below 1, and "
    f"there is no difference at this scale where it lies within a factor {MARGIN} of 1. Otherwise one cannot tell."
)


def compare_arms(
    arm: str,
    reference: str,
    joint: Joint | Refused,
    own_floors: Joint | Refused,
    design: Design,
    bounds: tuple[str, ...],
    paired: PairedDifference | None,
) -> Comparison:
    """An arm against the reference.

    joint: the surface of the sweep; own_floors: one with a floor for each arm. bounds: which of the two report upper
    bounds.
    """
    new, ref = (None if isinstance(joint, Refused) else joint.number(name) for name in (arm, reference))
    if isinstance(joint, Refused) or new is None or ref is None:
        missing = (
            joint.refused if isinstance(joint, Refused) else f"{arm if new is None else reference} has too few runs"
        )
        verdict = Verdict("cannot tell", f"{arm} against {reference}: cannot tell, {missing}.", None, RULE)
        return Comparison(arm, reference, bounds, None, (), None, None, {}, (), None, None, paired, verdict)
    point, draws = joint.fit.surface, joint.draws
    multipliers = tuple(multiplier(joint, new, ref, math.log(budget), design) for budget in design.budgets)
    centre = multiplier(joint, new, ref, design.centre, design)
    p = {"offset": tail(draws.log_multiplier(new, ref, design.centre))}
    first, last = math.log(design.budgets[0]), math.log(design.budgets[-1])
    trend = floor = None  # a trend that is read far outside the reference's budgets would be that of its extrapolation
    if last > first and not any(m.extrapolated for m in multipliers):
        value, drawn = (surface.trend(new, ref, first, last) for surface in (point, draws))
        if np.isfinite(value).all() and np.isfinite(drawn).all():
            trend, p["trend"] = estimated(value, drawn), tail(drawn)
    if not isinstance(own_floors, Refused) and joint.bounds[new] == joint.bounds[ref]:
        value, drawn = (s.E[:, new] - s.E[:, ref] for s in (own_floors.fit.surface, own_floors.draws))
        floor, p["floor"] = estimated(value, drawn), tail(drawn)
    shares = joint.errors(new, ref, design.centre)
    systematic = math.hypot(*(share for share in (shares.learning_rate, shares.evaluation, shares.bound) if share))
    return Comparison(
        arm=arm,
        reference=reference,
        bounds=bounds,
        centre=centre,
        multipliers=multipliers,
        trend=trend,
        floor=floor,
        p=p,
        costs=cost_ratios(joint, new, ref, design.centre),
        shares=shares,
        power=power_of(joint.fit, new, ref, design.centre, systematic, seeds_of(joint.rows)),
        paired=paired,
        verdict=judge(arm, reference, centre, multipliers, trend, bounds),
    )


def multiplier(joint: Joint, arm: int, reference: int, log_flops: float, design: Design) -> Multiplier:
    """The compute multiplier at some compute."""
    value = joint.fit.surface.log_multiplier(arm, reference, log_flops)
    estimate = estimated(value, joint.draws.log_multiplier(arm, reference, log_flops)).map(np.exp)
    compute = math.exp(log_flops) * estimate.value
    inside = design.budgets[0] / REACH <= compute <= design.budgets[-1] * REACH
    return Multiplier(math.exp(log_flops), estimate, extrapolated=not inside)


def tail(draws: np.ndarray) -> float:
    """Twice the fraction of draws on the rarer side of zero, at least one draw."""
    return float(min(1.0, 2 * max(1, min((draws <= 0).sum(), (draws >= 0).sum())) / len(draws)))


def seeds_of(rows: pd.DataFrame) -> int:
    """Seeds per cell: the median over cells."""
    return int(rows.groupby(["arm", "budget_flops", "params_total"]).seed.nunique().median())


def outcome_of(centre: Estimate, at_budgets: list[Estimate]) -> ArmOutcome:
    """The outcome by `RULE`."""
    if any(e.low > 1 for e in at_budgets) and any(e.high < 1 for e in at_budgets):
        return "crosses over"
    if centre.low > 1:
        return "better"
    if centre.high < 1:
        return "worse"
    return "no difference at this scale" if 1 / MARGIN < centre.low and centre.high < MARGIN else "cannot tell"


def judge(
    arm: str,
    reference: str,
    centre: Multiplier,
    multipliers: tuple[Multiplier, ...],
    trend: Estimate | None,
    bounds: tuple[str, ...],
) -> Verdict:
    """The verdict in plain words; its effect is the compute multiplier at the centre."""
    outcome = outcome_of(centre.estimate, [m.estimate for m in multipliers])
    sentence = (
        f"{arm} against {reference}: {outcome}. The reference needs {number(centre.estimate)} times the compute for "
        f"the same loss at {number(centre.flops)} FLOPs"
    )
    if outcome == "crosses over":
        for end in (multipliers[0], multipliers[-1]):
            sentence += f", {number(end.estimate)} at {number(end.flops)}"
    if trend is None:
        sentence += "."
    elif trend.low > 0 or trend.high < 0:
        grows = "grows" if trend.value > 0 else "falls"
        sentence += (
            f", and this {grows} with compute (a factor {number(trend.map(lambda t: 10**t))} for every factor 10)."
        )
    else:
        sentence += (
            f", with no trend that can be told (a factor {number(trend.map(lambda t: 10**t))} for every factor 10)."
        )
    if centre.extrapolated:
        sentence += (
            f" That compute lies more than {REACH} times outside the reference's budgets: read its sign, not its size."
        )
    if len(bounds) == 1:
        sentence += f" {bounds[0]} is an upper bound on its loss, so its true place may be better."
    return Verdict(outcome, sentence, centre.estimate, RULE)


def paired_difference(
    rows: pd.DataFrame, design: Design, arm: str, reference: str, folder: Path
) -> PairedDifference | None:
    """Difference of the best runs at the largest budget in bits per byte, with the standard error from the held-out
    sequences, which are the same for both; None where a run or its file is missing. folder: the sweep's."""
    best = []
    for name in (arm, reference):
        lowest = lowest_by_budget(finished(rows, name, "fit"))
        ids = lowest.id[np.isclose(lowest.budget_flops.astype(float), design.budgets[-1])]
        best.append(held_out_nats(folder, str(ids.iloc[0])) if len(ids) else None)
    new, ref = best
    if new is None or ref is None:
        return None
    difference = new - ref
    bits = math.log(2) * design.corpus.heldout_bytes
    return PairedDifference(
        budget=design.budgets[-1],
        bits_per_byte=float(difference.sum() / bits),
        standard_error=float(difference.std(ddof=1) * math.sqrt(len(difference)) / bits),
    )


def held_out_nats(folder: Path, row_id: str) -> np.ndarray | None:
    """Returns the nats of each held-out sequence of a run of the sweep in `folder`, or None where the run's file is
    missing."""
    path = folder / "cells" / row_id / "heldout_nats.npy"
    return np.load(path) if path.exists() else None
