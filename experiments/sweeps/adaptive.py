"""What a sweep adds to its plan on the way: learning rates beyond the grid, sizes around the optimum that was found.

Each stage is a function from the plan, its arms and the ledger's rows to the addition that comes next, or None. It
looks only at runs that are finished, and whoever calls it writes the addition before running it, so nothing is decided
twice.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from experiments.fits.isoflop import Located
from experiments.scaling.arm_runs import budget_curves, finished, lowest_by_budget
from experiments.scaling.design import Addition, Cell
from experiments.scaling.joint import runs_of
from experiments.scaling.surface import Form, fit
from experiments.scaling.tuning import rate_curves, tuned_rate
from experiments.sweeps.plan import Arm, Plan, around, own_seeds

Arms = Mapping[str, Arm]
Stage = Callable[[Plan, Arms, pd.DataFrame], Addition | None]


def missing_cells(plan: Plan, arms: Arms, rows: pd.DataFrame, cells: Iterable[Cell]) -> dict[str, Cell]:
    """Those without a result, by the id of their run, each with its arm's learning rate."""
    over = set(rows[rows.status.isin(["done", "diverged"])].id)
    rated = (cell.with_rate(plan.rates.get(cell.arm)) for cell in cells)
    ids = {arms[cell.arm].cell_id(cell): cell for cell in rated}
    return {run: cell for run, cell in ids.items() if run not in over}


def further_rates(plan: Plan, arms: Arms, rows: pd.DataFrame) -> Addition | None:
    """Learning rates to try next: a step beyond the grid where the best is the lowest or the highest tried, and once
    the best lies inside, three around it at the next budget."""
    found = [_rates_of(plan, arm, rows) for name, arm in arms.items() if name not in plan.rates]
    return _joined("learning rates", found)


def _rates_of(plan: Plan, arm: Arm, rows: pd.DataFrame) -> tuple[str, list[Cell]]:
    settings, mine = plan.settings["tuning"], rows[(rows.kind == "tune") & (rows.arm == arm.name)]
    if not settings:
        return "", []
    grid = sorted(map(float, settings["learning_rates"]))
    step = grid[-1] / grid[-2]
    for number, budget in enumerate(sorted(map(float, settings["budgets"]))):
        tried = plan.select("tune", arm.name, budget)
        where = f"{arm.name} at {budget:.3g} FLOPs"
        if not tried:
            best = tuned_rate(mine)
            rates = grid if best is None else around(best, grid)
            width = arm.widths(arm.optimum(budget), 1, 1)[0]
            why = (
                f"{where}: around what smaller budgets found" if best else f"{where}: the grid, smaller budgets failed"
            )
            return why, [arm.cell("tune", budget, width, seed, rate) for rate in rates for seed in settings["seeds"]]
        curves = rate_curves(mine[np.isclose(mine.budget_flops.astype(float), budget)])
        steps = len({cell.learning_rate for cell in tried}) - (len(grid) if number == 0 else 3)
        if missing_cells(plan, {arm.name: arm}, rows, tried) or not curves or not curves[0].at_edge:
            continue
        if steps < settings["widen"]:
            best = math.exp(curves[0].x[curves[0].best])
            rate = float(f"{best * step if curves[0].at_edge == 'highest' else best / step:.3g}")
            why = f"{where}: {rate:g}, since {best:g}, the {curves[0].at_edge} tried, is best"
            return why, [arm.cell("tune", budget, tried[0].width, seed, rate) for seed in settings["seeds"]]
    return "", []


def chosen_rates(plan: Plan, arms: Arms, rows: pd.DataFrame) -> Addition | None:
    """The learning rates that tuning chose, once for all other runs; of arms with a finished tuning run."""
    found = {name: tuned_rate(rows[(rows.kind == "tune") & (rows.arm == name)]) for name in arms}
    new = {name: rate for name, rate in found.items() if rate is not None and name not in plan.rates}
    text = ", ".join(f"{rate:g} for {name}" for name, rate in new.items())
    return Addition(now(), "learning rates", f"tuning chose {text}", [], new) if new else None


def further_sizes(plan: Plan, arms: Arms, rows: pd.DataFrame) -> Addition | None:
    """Sizes to run next: beyond those of a budget whose best is the smallest or the largest, and once every best lies
    inside, the next budget's around the optimum of those before."""
    budgets = [(arm, budget) for budget in plan.budgets for arm in arms.values()]
    widened = _joined("sizes", [_sizes_beyond(plan, arm, budget, rows) for arm, budget in budgets])
    if widened:
        return widened
    for budget in plan.budgets:
        if addition := _laid(plan, arms, "fit", budget, rows):
            return addition
    return None


def held_out_sizes(plan: Plan, arms: Arms, rows: pd.DataFrame) -> Addition | None:
    """The held-out budget's sizes, around the optimum of the fitted budgets, where the plan has none yet."""
    return None if plan.holdout_budget is None else _laid(plan, arms, "holdout", plan.holdout_budget, rows)


def _sizes_beyond(plan: Plan, arm: Arm, budget: float, rows: pd.DataFrame) -> tuple[str, list[Cell]]:
    """One more size on the side where the best of a budget's sizes is the last."""
    cells = plan.select("fit", arm.name, budget)
    if not cells or missing_cells(plan, {arm.name: arm}, rows, cells):
        return "", []
    mine = rows[(rows.kind == "fit") & (rows.arm == arm.name) & np.isclose(rows.budget_flops.astype(float), budget)]
    # A size that diverged counts as worse than any that did not, as a rate does.
    loss = (
        mine.bits_per_byte.astype(float).where(mine.status == "done", math.inf).groupby(mine.width.astype(int)).mean()
    )
    if not np.isfinite(loss.min()):
        return "", []
    best, tried = int(loss.idxmin()), sorted(loss.index)
    first = next(found for group in plan.groups if (found := _widths(group, arm.name, budget)))
    factor = plan.settings["span"] ** (2 / max(1, (arm.sizes or plan.settings["sizes"]) - 1))
    for side, end, extra, way in (
        ("smallest", tried[0], sum(width < min(first) for width in tried), 1 / factor),
        ("largest", tried[-1], sum(width > max(first) for width in tried), factor),
    ):
        width = arm.width_beyond(end, way)
        if best == end and extra < plan.settings["widen"] and width is not None:
            new = _possible(arm, "fit", budget, [(width, own_seeds(plan.settings["seeds"], budget, len(tried)))])
            return f"{arm.name} at {budget:.3g} FLOPs: width {width}, since the {side}, {end}, is best", new
    return "", []


def _widths(cells: Iterable[Cell], arm: str, budget: float) -> set[int]:
    return {cell.width for cell in cells if (cell.kind, cell.arm, cell.budget) == ("fit", arm, budget)}


def _laid(plan: Plan, arms: Arms, kind: str, budget: float, rows: pd.DataFrame) -> Addition | None:
    """The cells of a budget for the arms that have none there."""
    found = [
        (f"{arm.name} at {budget:.3g} FLOPs: around the optimum of its runs so far", lay(plan, arm, kind, budget, rows))
        for arm in arms.values()
        if not plan.select(kind, arm.name, budget)
    ]
    return _joined("sizes" if kind == "fit" else "held-out sizes", found)


def lay(plan: Plan, arm: Arm, kind: str, budget: float, rows: pd.DataFrame) -> list[Cell]:
    """The cells of a budget around the optimum that an arm's finished runs put there, or around N* without such."""
    settings = plan.settings["holdout"] if kind == "holdout" else plan.settings
    centre = optimum(finished(rows, arm.name, "fit"), budget) or arm.optimum(budget)
    sizes = arm.sizes if kind == "fit" and arm.sizes else settings["sizes"]
    seeds = settings.get("seeds") or plan.settings["seeds"]
    widths = enumerate(arm.widths(centre, sizes, settings["span"]))
    return _possible(arm, kind, budget, [(width, own_seeds(seeds, budget, number)) for number, width in widths])


def optimum(runs: pd.DataFrame, budget: float) -> float | None:
    """The optimal number of parameters that one arm's finished runs put at a budget, or None without runs.

    It is the surface's at the largest budget that was run, held within the sizes tried there, and moved on by the
    surface's exponent; with too few runs for a surface, the mean of the isoFLOP minima moved on by the square root.
    """
    if runs.empty:
        return None
    budgets = sorted(set(runs.budget_flops.astype(float)))
    try:
        placed = runs_of(runs, [runs.arm.iloc[0]])
        surface = fit(placed, Form((0,), (0,))).surface
    except ValueError:
        curves = [curve for curve in budget_curves(runs, budgets) if isinstance(curve, Located)]
        best = lowest_by_budget(runs)
        at = [(curve.budget, curve.x) for curve in curves] or list(
            zip(best.budget_flops.astype(float), np.log(best.params_total.astype(float)), strict=True)
        )
        return math.exp(float(np.mean([x + 0.5 * math.log(budget / c) for c, x in at])))
    last, there = math.log(budgets[-1]), np.isclose(runs.budget_flops.astype(float), budgets[-1])
    at_last, at_budget = (float(surface.optimum(0, c)[0][0]) for c in (last, math.log(budget)))
    held = np.clip(at_last, placed.size[there].min(), placed.size[there].max())
    # Parameters of a model of some FLOPs per token, by a line in logs through those that were run.
    slope, level = np.polyfit(placed.size, np.log(runs.params_total.to_numpy(float)), 1)
    return math.exp(float(level + slope * (held + at_budget - at_last)))


def _possible(arm: Arm, kind: str, budget: float, sizes: Iterable[tuple[int, list[int]]]) -> list[Cell]:
    """Cells of these widths and seeds, without those that the budget does not pay for or the corpus is too short
    for."""
    cells = []
    for width, seeds in sizes:
        for seed in seeds:
            try:
                cells.append(arm.cell(kind, budget, width, seed, None))
            except ValueError:
                break
    return cells


def _joined(stage: str, found: Iterable[tuple[str, list[Cell]]]) -> Addition | None:
    """Returns what was found for all arms as one addition, since cells of one addition run side by side."""
    found = [(reason, cells) for reason, cells in found if cells]
    if not found:
        return None
    reason = "; ".join(reason for reason, _ in found)
    return Addition(now(), stage, reason, [cell for _, cells in found for cell in cells])


def now() -> str:
    """The time as plans have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
