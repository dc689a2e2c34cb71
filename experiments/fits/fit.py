"""Scaling laws fitted to a table of runs, ours or anyone's, in every way there is, and how far these agree."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.findings import Estimate, Refused
from experiments.fits.envelope import fit_envelope
from experiments.fits.fit_results import (
    ArmFit,
    BudgetMinimum,
    EnvelopeLaws,
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
from experiments.fits.forms import FORMS, Form
from experiments.fits.isoflop import (
    Curve,
    Flat,
    Line,
    Located,
    NoMinimum,
    estimate,
    extrapolate,
    find_minimum,
    fit_line,
    fit_saturating,
    line_weights,
    resample_minima,
    resample_splines,
    vertex_errors,
)
from experiments.fits.parametric import FitRefused, Method, Problem, bootstrap, fit_law
from experiments.fits.runs import APART, Columns, group_budgets, select_runs

MIN_BUDGETS = 3
OURS = "budget_flops"  # the column of nominal budgets in a sweep's ledger
PINNED = (0.0, 0.25, 0.5, 0.75)  # assumed irreducible losses, as fractions of the lowest loss
INTERVALS = (
    "95 %: of minima percentiles of resampled runs or a t(K-1) jackknife over the K budgets, the wider; of surfaces "
    "percentiles of resampled runs; of envelopes a t(K-1) jackknife over the K sizes"
)
NO_INTERVALS = "none (bootstrap=0), but of envelopes a t(K-1) jackknife over the K sizes"
LONG = 6_000_000  # runs x draws from which the draws take long enough to say how many are done

Report = Callable[[str], None]


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
        x = np.nan if isinstance(curve, NoMinimum) else curve.x
        out.append(BudgetCurve(curve, float(np.exp(np.interp(x, np.log(group.params), ratio)))))
    return out


def describe_curves(curves: list[BudgetCurve]) -> tuple[BudgetMinimum | RefusedBudget, ...]:
    """The minima of curves in parameters and tokens, each with its error and weight, or the reasons why there are
    none."""
    minima = [each.curve for each in curves if not isinstance(each.curve, NoMinimum)]
    errors, weights = _errors_and_weights(minima)
    placed = iter(zip(errors, weights / weights.sum(), strict=True))

    def describe(curve: Curve, flops_per_nd: float) -> BudgetMinimum | RefusedBudget:
        window = 0 if curve.parabola is None else len(curve.parabola.x)
        if isinstance(curve, NoMinimum):
            return RefusedBudget(curve.budget, curve.sizes, window, curve.flags, curve.refused)
        n, (error, weight) = float(np.exp(curve.x)), next(placed)
        return BudgetMinimum(
            budget=curve.budget,
            sizes=curve.sizes,
            sizes_in_window=window,
            flags=(*curve.flags, *((f"flat: {curve.refused}",) if isinstance(curve, Flat) else ())),
            n_opt=n,
            log_n_error=float(error),
            tokens_opt=float(curve.budget / (flops_per_nd * n)),
            loss_opt=curve.loss,
            curvature=curve.parabola.curvature,
            akima=Optimum(float(np.exp(curve.akima_x)), curve.akima_loss),
            weight=float(weight),
        )

    return tuple(describe(each.curve, each.flops_per_nd) for each in curves)


def _errors_and_weights(minima: list[Located | Flat]) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the minima in ln N, and what each weighs in the law of N*, each [minima]."""
    if not minima:
        return np.zeros(0), np.zeros(0)
    errors, budgets = vertex_errors(minima), np.array([m.budget for m in minima])
    return errors, line_weights(budgets, np.array([m.x for m in minima]), errors)


def fit_power_laws(curves: list[BudgetCurve], draws: int, seed: int) -> PowerLaws | Refused:
    """N*(C), D*(C) and L*(C) through the minima, or why there are none.

    A minimum weighs by its error and by the scatter of all about the law, a flat curve's little. The losses are known
    about equally well, and weigh alike.
    """
    ratio = np.array([each.flops_per_nd for each in curves if not isinstance(each.curve, NoMinimum)])
    minima = [each.curve for each in curves if not isinstance(each.curve, NoMinimum)]
    if len(minima) < MIN_BUDGETS:
        return Refused(f"{len(minima)} of {len(curves)} budgets have a minimum, at least {MIN_BUDGETS} are needed")
    c, x, loss, spline = (
        np.array(values) for values in zip(*((m.budget, m.x, m.loss, m.akima_x) for m in minima), strict=True)
    )
    draws_x, draws_loss = resample_minima(minima, draws, seed)
    errors, weights = _errors_and_weights(minima)
    weights_spline = line_weights(c, spline, errors)
    return PowerLaws(
        N=_power_law(fit_line(c, x, draws_x, weights=weights), "N*"),
        N_spline=_power_law(fit_line(c, spline, resample_splines(minima, draws, seed), weights=weights_spline), "N*"),
        D=_power_law(fit_line(c, np.log(c / ratio) - x, np.log(c / ratio) - draws_x, weights=weights), "D*"),
        L=_power_law(fit_line(c, np.log(loss), np.log(draws_loss)), "L*"),
        L_saturating=_saturating_law(c, loss, draws_loss) if len(minima) >= 4 else None,
        L_pinned_E=tuple(_pinned_law(fraction * loss.min(), c, loss) for fraction in PINNED),
        L_at_4x=extrapolate(c, loss, draws_loss, float(np.log(4 * c.max()))),
        L_at_16x=extrapolate(c, loss, draws_loss, float(np.log(16 * c.max()))),
    )


def _power_law(line: Line, name: str) -> PowerLaw:
    return PowerLaw(f"{name} = k C^exponent", line.estimate_slope(), line.estimate_at(0.0).map(np.exp), line.budgets)


def _saturating_law(c: np.ndarray, loss: np.ndarray, draws_loss: np.ndarray) -> SaturatingLaw:
    drawn_e, _, drawn_g = fit_saturating(c, draws_loss)
    left = np.array([fit_saturating(np.delete(c, i), np.delete(loss, i)) for i in range(len(c))])
    # K is per C0 to the -g, and a draw's C0 differs when a budget is left out: only E and g are comparable.
    e, k, g = map(float, fit_saturating(c, loss))
    return SaturatingLaw(
        law="L* = E + K (C / C0)^-g",
        E=estimate(e, drawn_e, left[:, 0]),
        K=k,
        g=estimate(g, drawn_g, left[:, 2]),
        C0=float(np.exp(np.log(c).mean())),
        at_bound=bool(e <= 0 or g >= 1.99),
    )


def _pinned_law(e: float, c: np.ndarray, loss: np.ndarray) -> PinnedLaw:
    line = fit_line(c, np.log(loss - e), np.zeros((0, len(c))))
    scale = np.exp(np.log(c).mean())
    at_4x, at_16x = (float(e + np.exp(line.at(np.log(factor * c.max())))) for factor in (4, 16))
    return PinnedLaw(float(e), -line.slope, float(np.exp(line.at(np.log(scale)))), float(scale), at_4x, at_16x)


def fit_surfaces(runs: pd.DataFrame, form: Form, draws: int, seed: int, report: Report) -> SurfaceFits:
    """A form by Huber on ln L and by least squares on L, each with its intervals (none where draws is 0) or the reason
    it was refused."""

    def fitted(method: Method) -> SurfaceFit | RefusedSurface:
        try:
            law = fit_law(Problem(form, runs, method))
        except FitRefused as error:
            return RefusedSurface(len(runs), error.kind, str(error))
        tenths = {draws * i // 10 for i in range(1, 11)} if len(runs) * draws > LONG else set()

        def done(before: int, now: int) -> None:
            if any(before < tenth <= now for tenth in tenths):
                report(f"{method}: {now} of {draws} draws of {len(runs)} runs")

        drawn = bootstrap(law, draws, seed, done) if draws else None
        a = law.surface.a
        return SurfaceFit(len(runs), law.constants, law.surface, a, 1 - a, law.objective, law.at_bound, drawn)

    return SurfaceFits(form.name, form.formula, huber=fitted("huber"), squares=fitted("squares"))


def _envelope_laws(curves: pd.DataFrame) -> EnvelopeLaws | Refused:
    found = fit_envelope(curves)
    if isinstance(found, Refused):
        return found
    size, tokens, sizes = found
    return EnvelopeLaws(_power_law(size, "N*"), _power_law(tokens, "D*"), sizes)


def disagreements(
    laws: PowerLaws | Refused, surfaces: SurfaceFits, envelope: EnvelopeLaws | Refused | None
) -> tuple[str, ...]:
    """In words, each two ways of finding the exponent of N* whose intervals do not meet."""
    exponents: dict[str, Estimate] = {}
    if isinstance(laws, PowerLaws):
        exponents |= {"parabolas": laws.N.exponent, "splines": laws.N_spline.exponent}
    if isinstance(envelope, EnvelopeLaws):
        exponents["the envelope"] = envelope.N.exponent
    for name, fit in (("Huber", surfaces.huber), ("least squares", surfaces.squares)):
        # A tied form's exponent is an assumption.
        if isinstance(fit, SurfaceFit) and fit.bootstrap and fit.bootstrap.estimates and "beta" in fit.constants:
            exponents[name] = fit.bootstrap.estimates["a"]
    return tuple(
        f"the exponent of N* is {a} by {first} and {b} by {second}: their intervals do not meet"
        for (first, a), (second, b) in combinations(exponents.items(), 2)
        if a.high < b.low or b.high < a.low
    )


def fit_arm(
    arm: str, runs: pd.DataFrame, curves: pd.DataFrame | None, columns: Columns, settings: Settings, report: Report
) -> ArmFit:
    """All laws of one arm's runs and, where there are any, learning curves."""
    form = FORMS[settings.form]
    if columns.budget is None:
        runs = runs.assign(budget=group_budgets(runs.flops, settings.budget_tolerance))
        grouping = (
            f"found in the FLOPs: windows of +-{settings.budget_tolerance:g} in ln FLOPs, at least 5 runs, a factor "
            f"{APART} apart"
        )
    else:
        grouping = f"column {columns.budget}"

    def laws_of(runs: pd.DataFrame, draws: int) -> tuple[list[BudgetCurve], PowerLaws | Refused, SurfaceFits]:
        surfaces = fit_surfaces(runs, form, draws, settings.seed, report)
        if len(form.columns) > 2:
            reason = f"form={form.name} has more than size and data, and the runs of a budget differ in all of it"
            return [], Refused(f"{reason}: filter them to one value and take form=chinchilla"), surfaces
        if not runs.budget.notna().any():
            reason = f"no 5 runs within +-{settings.budget_tolerance:g} in ln FLOPs"
            return [], Refused(f"{reason}: name columns.budget or raise budget_tolerance"), surfaces
        found = budget_curves(runs)
        return found, fit_power_laws(found, draws, settings.seed), surfaces

    found, laws, surfaces = laws_of(runs, settings.bootstrap)

    def without(dropped: int) -> Sensitivity:
        fewer = runs.drop(runs.loss.nlargest(dropped).index)
        _, isoflop, fits = laws_of(fewer, 0) if dropped else (found, laws, surfaces)
        return Sensitivity(
            highest_dropped=settings.drop_highest + dropped,
            runs=len(fewer),
            isoflop=isoflop.N.exponent.value if isinstance(isoflop, PowerLaws) else None,
            huber=fits.huber.a if isinstance(fits.huber, SurfaceFit) else None,
            squares=fits.squares.a if isinstance(fits.squares, SurfaceFit) else None,
        )

    envelope = None if curves is None else _envelope_laws(curves)
    over_6nd = runs.flops / (6 * runs.params * runs.tokens)
    return ArmFit(
        arm=arm,
        runs=len(runs),
        in_no_budget=int(runs.budget.isna().sum()),
        flops_over_6nd=Spread(over_6nd.median(), over_6nd.min(), over_6nd.max()),
        grouping=grouping,
        budgets=describe_curves(found),
        power_laws=laws,
        parametric=surfaces,
        envelope=envelope,
        sensitivity=tuple(without(dropped) for dropped in settings.sensitivity if dropped < len(runs)),
        disagreements=disagreements(laws, surfaces, envelope),
    )


def fit_runs(
    table: pd.DataFrame, columns: Columns, settings: Settings = Settings(), report: Report = lambda line: None
) -> Fit:
    """All laws of a table's runs, of each arm by itself. `report` is given a line now and then while draws take long.

    Raises:
        ValueError: as select_runs does, and for a form whose columns are not named.
    """
    form = FORMS[settings.form]
    missing = [name for name in form.columns[2:] if name not in columns.named()]
    if missing:
        raise ValueError(f"form={form.name} needs {' and '.join(f'columns.{name}=...' for name in missing)}")
    if columns.budget is None and OURS in table.columns:
        columns = replace(columns, budget=OURS)
    selection = select_runs(table, columns, settings.filter, settings.drop_highest)

    def curves_of(arm: str) -> pd.DataFrame | None:
        return None if selection.curves is None else selection.curves[selection.curves.arm == arm]

    return Fit(
        rows=RowCounts(
            read=len(table),
            fitted=len(selection.runs),
            refused=len(selection.refused),
            left_out=len(table) - len(selection.runs) - len(selection.refused),
        ),
        columns=columns,
        derived=selection.derived,
        arms=tuple(
            fit_arm(str(arm), runs.drop(columns="arm"), curves_of(str(arm)), columns, settings, report)
            for arm, runs in selection.runs.groupby("arm")
        ),
        refused=selection.refused,
        intervals=INTERVALS if settings.bootstrap else NO_INTERVALS,
        settings=settings,
        versions={name: version(name) for name in ("numpy", "scipy", "pandas")},
    )
