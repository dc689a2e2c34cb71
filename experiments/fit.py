"""Fit scaling laws to a table of runs: python -m experiments.fit runs=a.csv out=a.json columns.loss=...

All arguments are in configs/fit.yaml.
"""

import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.findings import Estimate, Refused, check_writable, jsonable, write_json
from experiments.fits.fit import fit_runs
from experiments.fits.fit_results import (
    ArmFit,
    BudgetMinimum,
    EnvelopeLaws,
    Fit,
    PowerLaws,
    RefusedBudget,
    RefusedSurface,
    Sensitivity,
    Settings,
    SurfaceFit,
    SurfaceFits,
)
from experiments.fits.runs import Columns, read_runs
from experiments.terminal import command, console, given

REASONS = 5  # the commonest, for which rows are refused, that are printed


def minima_table(budgets: Iterable[BudgetMinimum | RefusedBudget]) -> Table:
    columns = ("budget", "sizes", "N*", "error of N*", "weight", "D*", "loss", "Akima N*", "status")
    table = Table(*columns, title="isoFLOP minima")
    for b in budgets:
        if isinstance(b, BudgetMinimum):
            error = f"{math.expm1(b.log_n_error):.0%}"
            numbers = (f"{x:.4g}" for x in (b.tokens_opt, b.loss_opt, b.akima.n_opt))
            cells = [f"{b.n_opt:.4g}", error, f"{b.weight:.2f}", *numbers, "; ".join(["ok", *b.flags])]
        else:
            cells = ["-", "-", "-", "-", "-", "-", b.reason]
        table.add_row(f"{b.budget:.3g}", str(b.sizes), *cells)
    return table


def _interval(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.low) else estimate.interval(".4g")


def _expected(loss: Estimate) -> str:
    return f"{loss.value:.4g}" if math.isnan(loss.low) else f"{loss:.4g}"


def exponents_table(fit: ArmFit) -> Table:
    table = Table("law", "exponent", "95 % interval", "from", title="Exponents in compute")
    laws, envelope = fit.power_laws, fit.envelope
    if isinstance(laws, Refused):
        table.add_row("isoFLOP", "-", "-", laws.refused)
    else:
        for name, law in (("N*", laws.N), ("N*, splines", laws.N_spline), ("D*", laws.D), ("L*", laws.L)):
            table.add_row(name, f"{law.exponent.value:.4f}", _interval(law.exponent), f"{law.points} budgets")
    if isinstance(envelope, Refused):
        table.add_row("envelope", "-", "-", envelope.refused)
    elif isinstance(envelope, EnvelopeLaws):
        for name, law in (("N*, envelope", envelope.N), ("D*, envelope", envelope.D)):
            table.add_row(name, f"{law.exponent.value:.4f}", _interval(law.exponent), f"{envelope.sizes} sizes")
    for name, surface in (("Huber", fit.parametric.huber), ("least squares", fit.parametric.squares)):
        table.add_row(f"N*, {fit.parametric.form}, {name}", *_surface_cells(surface))
    return table


def _surface_cells(fit: SurfaceFit | RefusedSurface) -> tuple[str, str, str]:
    if isinstance(fit, RefusedSurface):
        return "-", "-", fit.refused
    estimates = fit.bootstrap.estimates if fit.bootstrap else None
    return f"{fit.a:.4f}", _interval(estimates["a"]) if estimates else "-", f"{fit.runs} runs"


def constants_table(fits: SurfaceFits) -> Table:
    table = Table("constant", "Huber", "least squares", title=fits.formula)
    names = [list(fit.constants) for fit in (fits.huber, fits.squares) if isinstance(fit, SurfaceFit)]
    for name in names[0] if names else []:
        table.add_row(name, *(_constant(fit, name) for fit in (fits.huber, fits.squares)))
    return table


def _constant(fit: SurfaceFit | RefusedSurface, name: str) -> str:
    if isinstance(fit, RefusedSurface):
        return "-"
    estimates = fit.bootstrap.estimates if fit.bootstrap else None
    value = f"{estimates[name]:.4g}" if estimates else f"{fit.constants[name]:.4g}"
    return f"{value}, at its bound" if name in fit.at_bound else value


def sensitivity_table(lines: Iterable[Sensitivity]) -> Table:
    columns = ("highest losses dropped", "runs", "isoFLOP", "Huber", "least squares")
    table = Table(*columns, title="Exponent of N* in compute")
    for line in lines:
        exponents = ("-" if x is None else f"{x:.4f}" for x in (line.isoflop, line.huber, line.squares))
        table.add_row(str(line.highest_dropped), str(line.runs), *exponents)
    return table


def print_result(console: Console, fit: Fit) -> None:
    rows = fit.rows
    console.print(f"{rows.fitted} of {rows.read} rows fitted, {rows.refused} refused, {rows.left_out} left out")
    for reason, count in Counter(refused.reason for refused in fit.refused).most_common(REASONS):
        console.print(f"refused, {count}: {reason}", markup=False)
    for line in fit.derived:
        console.print(f"derived: {line}")
    if len(fit.arms) > 1:
        console.print(f"{len(fit.arms)} arms, each fitted by itself: {', '.join(arm.arm for arm in fit.arms)}")
    for arm in fit.arms:
        print_arm(console, arm)
    console.print(f"intervals: {fit.intervals}")


def print_arm(console: Console, fit: ArmFit) -> None:
    if fit.arm:
        console.rule(f"{fit.arm}, {fit.runs} runs")
    console.print(f"budgets: {len(fit.budgets)}, {fit.grouping}; {fit.in_no_budget} runs in none")
    if fit.budgets:
        console.print(minima_table(fit.budgets))
    for table in (exponents_table(fit), constants_table(fit.parametric), sensitivity_table(fit.sensitivity)):
        if table.row_count:
            console.print(table)
    for name, surface in (("Huber", fit.parametric.huber), ("least squares", fit.parametric.squares)):
        if isinstance(surface, SurfaceFit) and "E" in surface.at_bound:
            console.print(f"E is at its bound, 0, by {name}: the runs show no irreducible loss")
    if isinstance(fit.power_laws, PowerLaws) and (law := fit.power_laws.L_saturating) and law.at_bound:
        console.print(f"{law.law} ended at a bound, E = {law.E.value:.3g}, g = {law.g.value:.3g}, and says little")
    if isinstance(fit.power_laws, PowerLaws):
        four, sixteen = (_expected(loss) for loss in (fit.power_laws.L_at_4x, fit.power_laws.L_at_16x))
        console.print(f"loss expected at 4 times the largest budget: {four}; at 16 times: {sixteen}", markup=False)
    for line in fit.disagreements:
        console.print(f"the ways disagree: {line}", markup=False)


@command("fit")
def main(config: DictConfig) -> None:
    screen, c = console(), given(config)
    table, out, columns = Path(c.pop("runs")), Path(c.pop("out")), Columns(**c.pop("columns"))
    settings = Settings(**c | {"sensitivity": tuple(c["sensitivity"])})
    check_writable(out)
    result = fit_runs(read_runs(table), columns, settings, report=screen.print)
    write_json(out, jsonable(result) | {"command": shlex.join(["python", "-m", "experiments.fit", *sys.argv[1:]])})
    print_result(screen, result)
    screen.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
