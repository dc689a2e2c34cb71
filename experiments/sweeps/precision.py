"""Runs that are added until the multiplier is known as well as was asked.

What is asked is an interval's width and not its place, so that stopping when it is reached favours neither arm.

Shape letters: P parameters of the surface that are free.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.scaling import power
from experiments.scaling.design import Addition, Cell
from experiments.scaling.joint import Joint, join
from experiments.scaling.results import Comparison
from experiments.scaling.surface import Runs
from experiments.sweeps.adaptive import Arms, lay, missing_cells, now
from experiments.sweeps.plan import Plan

STAGE = "precision"
NORMAL = 1.96  # standard errors in half of a 95 % interval
FACTORS = (2.0, 4.0)  # of one more budget, over the largest planned
MOST_SEEDS = 10  # of a size: what is then left of its distance from the surface is the surface's own
GROWTH = 2.0  # FLOPs of an addition for an arm over those of its and the reference's fitted runs so far, at most


@dataclass(frozen=True)
class Wish:
    """The precision that was asked for, and what it may cost.

    half_width: of the 95 % interval of ln(multiplier) at the centre. flops, seconds: of all runs that are added for it,
    the seconds one after the other; infinite without a limit.
    """

    half_width: float
    flops: float
    seconds: float


def read_wish(until: str | None, limit: Mapping | None) -> Wish | None:
    """Returns what the settings `until` and `limit` ask for, None where they ask for nothing.

    Raises:
        ValueError: for words that are not understood, and limits that are not positive.
    """
    limits = {name: (limit or {}).get(name) for name in ("flops", "seconds")}
    for name, value in limits.items():
        if value is not None and (until is None or not float(value) > 0):
            raise ValueError(
                f"limit.{name}={value} must be above 0 and limits what `until` adds: null where that is null"
            )
    if until is None:
        return None
    found = re.fullmatch(r"multiplier within (\d+(?:\.\d+)?) ?%", str(until).strip())
    if not found or not 0 < float(found[1]) <= 100:
        raise ValueError(
            f"until={until!r} is not understood: write until='multiplier within 5 %', or null for no such aim"
        )
    return Wish(math.log(1 + float(found[1]) / 100), *(math.inf if x is None else float(x) for x in limits.values()))


@dataclass(frozen=True)
class Unit:
    """Runs of an arm and the reference that are added together: one more seed of a size each, or one more budget.

    larger: whether it is a budget; only one is added. choices: the cells of each time it is taken, in order. flops,
    seconds: each time. normal, errors: what it adds to the surface's information [P, P], see `power.information`.
    """

    larger: bool
    choices: list[list[Cell]]
    flops: float
    seconds: float
    normal: np.ndarray
    errors: np.ndarray


def further_precision(
    plan: Plan,
    arms: Arms,
    rows: pd.DataFrame,
    wish: Wish,
    comparisons: Iterable[Comparison],
    price: Callable[[Cell], float],
) -> Addition:
    """The runs that bring the multiplier of each arm towards what is wished at the least FLOPs. Without cells there is
    nothing more to run, and the reason says why.

    comparisons: of the analysis of these rows. price: seconds of a cell.
    """
    if failed := missing_cells(plan, arms, rows, plan.select("fit")):
        return Addition(now(), STAGE, f"{len(failed)} runs have no result: start the same command again", [])
    joint = join(rows, plan.design, {})
    if isinstance(joint, Refused):
        return Addition(now(), STAGE, joint.refused, [])
    cells = [cell for addition in plan.additions if addition.stage == STAGE for cell in addition.cells]
    earlier, adding, ended = len(cells), [], []
    for comparison in comparisons:
        extended = replace(plan, additions=[*plan.additions, Addition("", STAGE, "", cells[earlier:])])
        left = Wish(
            wish.half_width,
            wish.flops - sum(cell.flops for cell in cells),
            wish.seconds - sum(map(price, cells)),
        )
        new, why = _cells_for(comparison, joint, extended, arms, rows, left, price)
        (adding if new else ended).append(f"{comparison.arm}: {why}")
        cells += new
    return Addition(now(), STAGE, "; ".join(adding or ended) or "one arm has no multiplier", cells[earlier:])


def _cells_for(
    comparison: Comparison,
    joint: Joint,
    plan: Plan,
    arms: Arms,
    rows: pd.DataFrame,
    left: Wish,
    price: Callable[[Cell], float],
) -> tuple[list[Cell], str]:
    """Cells to add for one arm against the reference, and why these or none."""
    arm, reference = joint.number(comparison.arm), joint.number(comparison.reference)
    centre, shares = comparison.centre, comparison.shares
    if arm is None or reference is None or centre is None or shares is None:
        return [], "there is no multiplier"
    half_width = math.log(centre.estimate.high / centre.estimate.low) / 2 if centre.estimate.low > 0 else math.inf
    known = "the multiplier is " + (f"known within {_percent(half_width)}" if half_width < 3 else "not known")
    if half_width <= left.half_width:
        return [], known
    systematic = math.hypot(*(share for share in (shares.learning_rate, shares.evaluation, shares.bound) if share))
    if NORMAL * systematic >= left.half_width:
        return [], (
            f"{known}, and no run helps: what the learning rate and the held-out text leave open is "
            f"{_percent(NORMAL * systematic)} alone"
        )
    slope = power.gradient(joint.fit, arm, reference, plan.design.centre)
    if not np.isfinite(slope).all():
        return [], f"{known}, and the arms' frontiers do not meet near the centre, so no run can be chosen for it"
    units = _units(joint, plan, arms, rows, (comparison.arm, comparison.reference), price)
    spent = sum(cell.flops for name in (comparison.arm, comparison.reference) for cell in plan.select("fit", name))
    batch = max(GROWTH * spent, min((unit.flops for unit in units), default=0.0))
    normal, errors = (part.sum(0) for part in power.information(joint.fit, joint.fit.model.runs))
    # What the draws find over what the delta method does: the part that is not linear.
    scale = shares.runs / power.deviation(slope, normal, errors)
    taken, expected = _take(units, slope, normal, errors, left, batch, scale, systematic)
    if not taken:
        why = "the limit is reached" if units else f"all sizes have {MOST_SEEDS} seeds and no larger budget can be run"
        return [], f"{known}, and {why}"
    return taken, f"{known}; {len(taken)} more runs should bring it to {_percent(expected)}"


def _take(
    units: list[Unit],
    slope: np.ndarray,
    normal: np.ndarray,
    errors: np.ndarray,
    left: Wish,
    batch: float,
    scale: float,
    systematic: float,
) -> tuple[list[Cell], float]:
    """The cells of the units that lower the variance most per FLOP, one after the other, until the wish is expected to
    be met or what may be spent is, and the half-width then expected."""
    flops, seconds, counts, cells = min(left.flops, batch), left.seconds, [0] * len(units), []
    while True:
        variance = power.deviation(slope, normal, errors) ** 2
        expected = NORMAL * math.hypot(scale * math.sqrt(variance), systematic)
        larger = any(count for unit, count in zip(units, counts, strict=True) if unit.larger)
        gains = [
            (variance - power.deviation(slope, normal + unit.normal, errors + unit.errors) ** 2) / unit.flops
            if count < len(unit.choices)
            and not (larger and unit.larger)
            and unit.flops <= flops
            and unit.seconds <= seconds
            else 0.0
            for unit, count in zip(units, counts, strict=True)
        ]
        if expected <= left.half_width or max(gains, default=0.0) <= 0:
            return cells, expected
        best = int(np.argmax(gains))
        unit = units[best]
        cells += unit.choices[counts[best]]
        counts[best] += 1
        normal, errors = normal + unit.normal, errors + unit.errors
        flops, seconds = flops - unit.flops, seconds - unit.seconds


def _units(
    joint: Joint, plan: Plan, arms: Arms, rows: pd.DataFrame, pair: tuple[str, str], price: Callable[[Cell], float]
) -> list[Unit]:
    """All that may be added for an arm and the reference: seeds of every size that both have, rank by rank as
    `joint.runs_of` pairs them, and one more budget that the held-out one still lies above."""
    choices = []
    for budget in plan.design.budgets:
        of_arm, of_reference = (
            {cell.width: cell for cell in sorted(plan.select("fit", name, budget), key=lambda cell: cell.width)}
            for name in pair
        )
        for place in zip(of_arm.values(), of_reference.values(), strict=False):
            choices.append(_seeds(plan, place))
    larger = [budget for budget in plan.design.budgets if budget > plan.budgets[-1]]
    for budget in larger or [factor * plan.budgets[-1] for factor in FACTORS]:
        missing = [name for name in pair if not plan.select("fit", name, budget)]
        if missing and (plan.holdout_budget is None or budget < plan.holdout_budget):
            choices.append([[cell for name in missing for cell in lay(plan, arms[name], "fit", budget, rows)]])
    return [_unit(joint, which, price, plan.design.budgets[-1]) for which in choices if which and which[0]]


def _seeds(plan: Plan, place: tuple[Cell, Cell]) -> list[list[Cell]]:
    """The cells of each further seed of an arm's size, counted on from its first, with the reference's of that seed
    where it is not there yet."""
    have = set(plan.select("fit"))
    used = {cell.seed for cell in have if cell.arm == place[0].arm and cell == replace(place[0], seed=cell.seed)}
    first = place[0].seed // 1000 * 1000
    unused = [seed for seed in range(first, first + MOST_SEEDS + len(used)) if seed not in used]
    free = unused[: max(0, MOST_SEEDS - len(used))]
    return [[again for cell in place if (again := replace(cell, seed=seed)) not in have] for seed in free]


def _unit(joint: Joint, choices: list[list[Cell]], price: Callable[[Cell], float], largest: float) -> Unit:
    """largest: of the budgets that have runs already."""
    cells = choices[0]
    tokens = np.array([float(cell.tokens) for cell in cells])
    size = np.log([cell.flops for cell in cells]) - np.log(6 * tokens)
    number = np.array([joint.arms.index(cell.arm) for cell in cells])
    # Cells of a unit are paired across the arms by their order.
    within = [sum(other.arm == cell.arm for other in cells[:i]) for i, cell in enumerate(cells)]
    runs = Runs(number, size, np.log(tokens), np.zeros(len(cells)), np.array(within))
    normal, errors = power.information(joint.fit, runs)
    return Unit(
        cells[0].budget > largest,
        choices,
        sum(cell.flops for cell in cells),
        sum(map(price, cells)),
        normal.sum(0),
        errors.sum(0),
    )


def _percent(half_width: float) -> str:
    """A half-width of ln(multiplier) as a person would say it."""
    return f"{100 * math.expm1(half_width):.3g} %"
