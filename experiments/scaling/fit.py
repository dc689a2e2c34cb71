"""Scaling laws fitted to a table of runs, ours or anyone's, in every way there is, and how far these agree."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.scaling.fit_results import (
    BudgetMinimum,
    Fit,
    Optimum,
    PinnedLaw,
    PowerLaw,
    PowerLaws,
    RefusedBudget,
    RefusedSurface,
    RowCounts,
    SaturatingLaw,
    Sensitivity,
    Settings,
    Spread,
    SurfaceFit,
    SurfaceFits,
)
from experiments.scaling.isoflop import (
    Curve,
    Line,
    Located,
    estimate,
    find_minimum,
    fit_line,
    fit_saturating,
    resample_minima,
)
from experiments.scaling.parametric import FitRefused, Surface, bootstrap, fit_huber, fit_projection
from experiments.scaling.runs import APART, Columns, group_budgets, select_runs

MIN_BUDGETS = 3
PINNED = (0.0, 0.25, 0.5, 0.75)  # assumed irreducible losses, as fractions of the lowest loss
INTERVALS = "95 %: percentiles of resampled runs, or t(K-1) jackknife over the K budgets, the wider"


@dataclass(frozen=True)
class BudgetCurve:
    """A budget's curve over ln N, and C / (N D) at its minimum: 6 where one of the three was derived, else interpolated
    in ln N from the runs; nan where there is no minimum."""

    curve: Curve
    flops_per_nd: float


def budget_curves(runs: pd.DataFrame) -> list[BudgetCurve]:
    """The curve of each value of the column budget."""
    out = []
    for budget in sorted(runs.budget.dropna().unique()):
        group = runs[runs.budget == budget]
        curve = find_minimum(budget, np.log(group.params.to_numpy()), group.loss.to_numpy())
        group = group.sort_values("params")
        ratio = np.log(group.flops / (group.params * group.tokens))
        x = curve.x if isinstance(curve, Located) else np.nan
        out.append(BudgetCurve(curve, float(np.exp(np.interp(x, np.log(group.params), ratio)))))
    return out


def describe_curve(curve: Curve, flops_per_nd: float) -> BudgetMinimum | RefusedBudget:
    """The minimum of a curve in parameters and tokens, or the reason why there is none."""
    window = 0 if curve.parabola is None else len(curve.parabola.x)
    if not isinstance(curve, Located):
        return RefusedBudget(curve.budget, curve.sizes, window, curve.flags, curve.refused)
    n = float(np.exp(curve.x))
    return BudgetMinimum(
        budget=curve.budget,
        sizes=curve.sizes,
        sizes_in_window=window,
        flags=curve.flags,
        n_opt=n,
        tokens_opt=float(curve.budget / (flops_per_nd * n)),
        loss_opt=curve.loss,
        curvature=curve.parabola.curvature,
        akima=Optimum(float(np.exp(curve.akima_x)), curve.akima_loss),
    )


def fit_power_laws(curves: list[BudgetCurve], draws: int, seed: int) -> PowerLaws | Refused:
    """N*(C), D*(C) and L*(C) through the located minima, or why there are none."""
    ratio = np.array([each.flops_per_nd for each in curves if isinstance(each.curve, Located)])
    minima = [each.curve for each in curves if isinstance(each.curve, Located)]
    if len(minima) < MIN_BUDGETS:
        return Refused(f"{len(minima)} accepted budgets of {len(curves)}, at least {MIN_BUDGETS} are needed")
    c, x, loss = (np.array(values) for values in zip(*((m.budget, m.x, m.loss) for m in minima), strict=True))
    draws_x, draws_loss = resample_minima(minima, draws, seed)
    return PowerLaws(
        N=_power_law(fit_line(c, x, draws_x), "N*"),
        D=_power_law(fit_line(c, np.log(c / ratio) - x, np.log(c / ratio) - draws_x), "D*"),
        L=_power_law(fit_line(c, np.log(loss), np.log(draws_loss)), "L*"),
        akima_N_exponent=fit_line(c, np.array([m.akima_x for m in minima]), draws_x).slope,
        L_saturating=_saturating_law(c, loss, draws_loss) if len(minima) >= 4 else None,
        L_pinned_E=tuple(_pinned_law(fraction * loss.min(), c, loss, draws_loss) for fraction in PINNED),
        intervals=INTERVALS,
    )


def _power_law(line: Line, name: str) -> PowerLaw:
    return PowerLaw(f"{name} = k C^exponent", line.estimate_slope(), line.estimate_at(0.0).map(np.exp), line.budgets)


def _saturating_law(c: np.ndarray, loss: np.ndarray, draws_loss: np.ndarray) -> SaturatingLaw:
    fits = np.array([fit_saturating(c, row) for row in draws_loss])
    left = np.array([fit_saturating(np.delete(c, i), np.delete(loss, i)) for i in range(len(c))])
    # K is per C0 to the -g, and a draw's C0 differs when a budget is left out: only E and g are comparable.
    e, k, g = fit_saturating(c, loss)
    return SaturatingLaw(
        law="L* = E + K (C / C0)^-g",
        E=estimate(e, fits[:, 0], left[:, 0]),
        K=k,
        g=estimate(g, fits[:, 2], left[:, 2]),
        C0=float(np.exp(np.log(c).mean())),
        at_bound=bool(e <= 0 or g >= 1.99),
    )


def _pinned_law(e: float, c: np.ndarray, loss: np.ndarray, draws_loss: np.ndarray) -> PinnedLaw:
    line = fit_line(c, np.log(loss - e), np.log(np.maximum(draws_loss - e, 1e-3 * loss.min())))
    scale = np.exp(np.log(c).mean())
    at_4x, at_16x = (float(e + np.exp(line.at(np.log(factor * c.max())))) for factor in (4, 16))
    return PinnedLaw(float(e), -line.slope, float(np.exp(line.at(np.log(scale)))), float(scale), at_4x, at_16x)


def fit_surfaces(runs: pd.DataFrame, draws: int, seed: int) -> SurfaceFits:
    """L = E + A / N^alpha + B / D^beta by Huber on ln L and by variable projection, each with its intervals (none where
    draws is 0) or the reason it was refused."""
    n, d, loss = (runs[name].to_numpy() for name in ("params", "tokens", "loss"))

    def huber(weights: np.ndarray, s: Surface) -> Surface:
        start = np.array([[np.log(s.A), np.log(s.B), np.log(s.E), s.alpha, s.beta]])
        return fit_huber(n, d, loss, start, weights)

    def projection(weights: np.ndarray, s: Surface) -> Surface:
        return fit_projection(n, d, loss, (s.alpha, s.beta), weights)

    def fitted(
        fit: Callable[[], Surface], refit: Callable[[np.ndarray, Surface], Surface]
    ) -> SurfaceFit | RefusedSurface:
        try:
            surface = fit()
        except FitRefused as error:
            return RefusedSurface(len(runs), error.kind, str(error))
        drawn = bootstrap(surface, lambda weights: refit(weights, surface), len(runs), draws, seed) if draws else None
        return SurfaceFit(len(runs), surface, surface.a, 1 - surface.a, drawn)

    return SurfaceFits(
        huber=fitted(lambda: fit_huber(n, d, loss), huber),
        projection=fitted(lambda: fit_projection(n, d, loss), projection),
    )


def fit_runs(
    table: pd.DataFrame,
    columns: Columns,
    query: str | None = None,
    drop_highest: int = 0,
    sensitivity: tuple[int, ...] = (0, 5),
    budget_tolerance: float = 0.05,
    draws: int = 300,
    seed: int = 0,
) -> Fit:
    """All laws of a table's runs. Raises ValueError as select_runs does."""
    selection = select_runs(table, columns, query, drop_highest)
    runs = selection.runs
    if columns.budget is None:
        runs = runs.assign(budget=group_budgets(runs.flops, budget_tolerance))
        grouping = f"windows of +-{budget_tolerance:g} in ln FLOPs, at least 5 runs, a factor {APART} apart"
    else:
        grouping = f"column {columns.budget}"
    curves = budget_curves(runs)
    power_laws, surfaces = fit_power_laws(curves, draws, seed), fit_surfaces(runs, draws, seed)

    def without(dropped: int) -> Sensitivity:
        fewer, laws, fits = runs, power_laws, surfaces
        if dropped:
            fewer = runs.drop(runs.loss.nlargest(dropped).index)
            laws, fits = fit_power_laws(budget_curves(fewer), 50, seed), fit_surfaces(fewer, 0, seed)
        return Sensitivity(
            highest_dropped=drop_highest + dropped,
            runs=len(fewer),
            isoflop=laws.N.exponent.value if isinstance(laws, PowerLaws) else None,
            huber=fits.huber.a if isinstance(fits.huber, SurfaceFit) else None,
            projection=fits.projection.a if isinstance(fits.projection, SurfaceFit) else None,
        )

    over_6nd = runs.flops / (6 * runs.params * runs.tokens)
    return Fit(
        rows=RowCounts(len(table), len(runs), len(selection.refused), int(runs.budget.isna().sum())),
        columns=columns,
        derived=selection.derived,
        flops_over_6nd=Spread(over_6nd.median(), over_6nd.min(), over_6nd.max()),
        grouping=grouping,
        budgets=tuple(describe_curve(each.curve, each.flops_per_nd) for each in curves),
        power_laws=power_laws,
        parametric=surfaces,
        sensitivity=tuple(without(dropped) for dropped in sensitivity),
        refused=selection.refused,
        settings=Settings(query, drop_highest, draws, seed),
        versions={name: version(name) for name in ("numpy", "scipy", "pandas")},
    )
