"""Arms against each other: compute multipliers, the difference of slopes, and a verdict in words.

Everything is estimated on budgets that both arms have a minimum for. The intervals are those of `isoflop.estimate`:
resampled runs, or the jackknife over budgets where that is wider.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.findings import ArmOutcome, Estimate, Verdict
from experiments.scaling.design import Design
from experiments.scaling.frontier import MIN_BUDGETS, finished, loss_law, with_loss
from experiments.scaling.isoflop import Curve, Line, estimate
from experiments.scaling.results import Comparison, Multiplier, PairedDifference

MARGIN = 1.25  # "no difference" is said only of multipliers known to lie within this factor of 1
REACH = 4  # a law is not believed further than this factor beyond the budgets it was fitted to
RULE = (
    "The budgets are those that both arms have a minimum for. The arm is better where the 95 % interval of its compute "
    "multiplier lies above 1 at every budget, worse where it lies below 1 at every budget, and crosses over where it "
    "lies above 1 at one and below 1 at another. There is no difference at this scale where it lies within a factor "
    f"{MARGIN} of 1 at every budget. Otherwise, and with fewer than {MIN_BUDGETS} budgets, one cannot tell."
)


def compare_arms(
    arm: str,
    reference: str,
    curves: tuple[Sequence[Curve], Sequence[Curve]],
    centre: float,
    bounds: tuple[str, ...],
    paired: PairedDifference | None,
) -> Comparison:
    """An arm against the reference. curves: of both, budget by budget. bounds: which of the two report upper bounds."""
    pairs = [with_loss(pair) for pair in zip(*curves, strict=True)]
    both = [pair for pair in pairs if len(pair) == 2]
    budgets = tuple(curve.budget for curve, _ in both)
    if len(both) < MIN_BUDGETS:
        sentence = (
            f"{arm} against {reference}: cannot tell, only {len(both)} budgets have a minimum for both "
            f"and {MIN_BUDGETS} are needed."
        )
        verdict = Verdict("cannot tell", sentence, None, RULE)
        return Comparison(arm, reference, budgets, bounds, (), None, paired, verdict)
    new, ref = (loss_law(side, centre) for side in zip(*both, strict=True))
    slope = estimate(new.slope - ref.slope, new.draws[:, 1] - ref.draws[:, 1], new.left_out[:, 1] - ref.left_out[:, 1])
    multipliers = tuple(multiplier(new, ref, budget, budgets) for budget in budgets)
    verdict = judge(arm, reference, multipliers, slope, bounds)
    return Comparison(arm, reference, budgets, bounds, multipliers, slope, paired, verdict)


def multiplier(new: Line, reference: Line, budget: float, budgets: Sequence[float]) -> Multiplier:
    """The compute multiplier at one of the budgets that both laws go through."""
    x = math.log(budget) - new.centre

    def log_multiplier(n: np.ndarray, r: np.ndarray) -> np.ndarray:
        """From (intercept, slope) [..., 2] of both."""
        return (n[..., 0] + n[..., 1] * x - r[..., 0]) / r[..., 1] - x

    value = float(
        log_multiplier(np.array([new.intercept, new.slope]), np.array([reference.intercept, reference.slope]))
    )
    draws, left_out = log_multiplier(new.draws, reference.draws), log_multiplier(new.left_out, reference.left_out)
    compute = budget * math.exp(value)
    inside = budgets[0] / REACH <= compute <= budgets[-1] * REACH
    return Multiplier(budget, estimate(value, draws, left_out).map(math.exp), extrapolated=not inside)


def outcome_of(multipliers: Sequence[Multiplier]) -> ArmOutcome:
    """The outcome by `RULE`."""
    intervals = [m.estimate for m in multipliers]
    above, below = [i.low > 1 for i in intervals], [i.high < 1 for i in intervals]
    if any(above) and any(below):
        return "crosses over"
    if all(above):
        return "better"
    if all(below):
        return "worse"
    if all(1 / MARGIN < i.low and i.high < MARGIN for i in intervals):
        return "no difference at this scale"
    return "cannot tell"


def judge(
    arm: str, reference: str, multipliers: Sequence[Multiplier], slope: Estimate, bounds: Sequence[str]
) -> Verdict:
    """The verdict in plain words; its effect is the compute multiplier at the largest budget."""
    outcome = outcome_of(multipliers)
    first, last = multipliers[0], multipliers[-1]
    steeper = "steeper" if slope.high < 0 else "flatter" if slope.low > 0 else "not distinguishable"
    sentence = (
        f"{arm} against {reference}: {outcome}. The reference needs this multiple of the compute for the same "
        f"bits per byte: {first.estimate} at {first.budget:.2g} FLOPs, {last.estimate} at {last.budget:.2g} FLOPs. "
        f"Its slope is {steeper} (difference {slope:+.3f})."
    )
    if first.extrapolated or last.extrapolated:
        sentence += (
            f" That compute lies more than {REACH} times outside the reference's budgets: read its sign, not its size."
        )
    if len(bounds) == 1:
        sentence += f" {bounds[0]} is an upper bound on its bits per byte, so its true place may be better."
    return Verdict(outcome, sentence, last.estimate, RULE)


def paired_difference(
    rows: pd.DataFrame, design: Design, arm: str, reference: str, folder: Path
) -> PairedDifference | None:
    """Difference of the best runs at the largest budget in bits per byte, with the standard error from the held-out
    sequences, which are the same for both; None where a run or its file is missing. folder: the sweep's."""
    best = []
    for name in (arm, reference):
        mine = finished(rows, "fit", name)
        mine = mine[np.isclose(mine.budget_flops, design.budgets[-1])]
        if mine.empty:
            return None
        path = folder / "cells" / mine.loc[mine.bits_per_byte.idxmin()].id / "heldout_nats.npy"
        if not path.exists():
            return None
        best.append(np.load(path))
    difference = best[0] - best[1]
    bits = math.log(2) * design.corpus.heldout_bytes
    return PairedDifference(
        budget=design.budgets[-1],
        bits_per_byte=float(difference.sum() / bits),
        standard_error=float(difference.std(ddof=1) * math.sqrt(len(difference)) / bits),
    )
