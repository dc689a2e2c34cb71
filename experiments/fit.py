"""Fit scaling laws to a table of runs: python -m experiments.fit runs=a.csv out=a.json columns.loss=...

All arguments are in configs/fit.yaml.
"""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.table import Table

from experiments import CONFIGS
from experiments.findings import Refused, jsonable, write_json
from experiments.scaling.fit import fit_runs
from experiments.scaling.fit_results import (
    BudgetMinimum,
    Fit,
    PowerLaws,
    RefusedBudget,
    RefusedSurface,
    Sensitivity,
    SurfaceFit,
    SurfaceFits,
)
from experiments.scaling.runs import Columns, read_runs


def minima_table(budgets: Iterable[BudgetMinimum | RefusedBudget]) -> Table:
    table = Table("budget", "sizes", "N*", "D*", "loss", "Akima N*", "status", title="isoFLOP minima")
    for b in budgets:
        if isinstance(b, BudgetMinimum):
            numbers = (b.n_opt, b.tokens_opt, b.loss_opt, b.akima.n_opt)
            cells = [*(f"{x:.4g}" for x in numbers), "; ".join(["ok", *b.flags])]
        else:
            cells = ["-", "-", "-", "-", b.reason]
        table.add_row(f"{b.budget:.3g}", str(b.sizes), *cells)
    return table


def exponents_table(laws: PowerLaws | Refused, surfaces: SurfaceFits) -> Table:
    table = Table("law", "exponent", "95 % interval", "from", title="Exponents in compute")
    if isinstance(laws, Refused):
        table.add_row("isoFLOP", "-", "-", laws.refused)
    else:
        for name, law in (("N*", laws.N), ("D*", laws.D), ("L*", laws.L)):
            exponent = law.exponent
            table.add_row(f"{name}(C)", f"{exponent.value:.4f}", exponent.interval(".4g"), f"{law.budgets} budgets")
    for name, fit in (("huber", surfaces.huber), ("projection", surfaces.projection)):
        table.add_row(f"N*, parametric, {name}", *_surface_cells(fit))
    return table


def _surface_cells(fit: SurfaceFit | RefusedSurface) -> tuple[str, str, str]:
    if isinstance(fit, RefusedSurface):
        return "-", "-", fit.refused
    estimates = fit.bootstrap.estimates if fit.bootstrap else None
    return f"{fit.a:.4f}", estimates.a.interval(".4g") if estimates else "-", f"{fit.runs} runs"


def sensitivity_table(lines: Iterable[Sensitivity]) -> Table:
    table = Table("highest losses dropped", "runs", "isoFLOP", "Huber", "projection", title="Exponent of N* in compute")
    for line in lines:
        exponents = ("-" if x is None else f"{x:.4f}" for x in (line.isoflop, line.huber, line.projection))
        table.add_row(str(line.highest_dropped), str(line.runs), *exponents)
    return table


def print_result(console: Console, fit: Fit) -> None:
    rows = fit.rows
    console.print(f"{rows.fitted} of {rows.read} rows fitted, {rows.refused} refused, {rows.in_no_budget} in no budget")
    for line in fit.derived:
        console.print(f"derived: {line}")
    console.print(minima_table(fit.budgets))
    console.print(exponents_table(fit.power_laws, fit.parametric))
    console.print(sensitivity_table(fit.sensitivity))


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="fit")
def main(config: DictConfig) -> None:
    try:
        c: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        result = fit_runs(
            read_runs(Path(c["runs"])),
            Columns(**c["columns"]),
            query=c["filter"],
            drop_highest=c["drop_highest"],
            sensitivity=tuple(c["sensitivity"]),
            budget_tolerance=c["budget_tolerance"],
            draws=c["bootstrap"],
            seed=c["seed"],
        )
    except MissingMandatoryValue as error:
        sys.exit(f"error: {error.full_key or error} must be given, as {error.full_key or 'name'}=...")
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = Path(c["out"])
    write_json(out, jsonable(result) | {"command": shlex.join(["python", "-m", "experiments.fit", *sys.argv[1:]])})
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 150
    print_result(console, result)
    console.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
