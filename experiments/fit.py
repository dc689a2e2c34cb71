"""Fit scaling laws to a table of runs: python -m experiments.fit runs=a.csv out=a.json columns.flops=... columns.loss=..."""

import shlex
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.table import Table

from experiments.scaling.fit import fit_runs, read_runs, write_json


def between(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"


def print_result(console: Console, result: dict) -> None:
    rows = result["rows"]
    console.print(
        f"{rows['fitted']} of {rows['read']} rows fitted, {rows['refused']} refused, {rows['in_no_budget']} in no budget"
    )
    for line in result["derived"]:
        console.print(f"derived: {line}")
    table = Table("budget", "sizes", "N*", "D*", "loss", "Akima N*", "status", title="isoFLOP minima")
    for b in result["budgets"]:
        if b["status"] == "ok":
            numbers = [b["n_opt"], b["tokens_opt"], b["loss_opt"], b["methods"]["akima"]["n_opt"]]
            cells = [*(f"{x:.4g}" for x in numbers), "; ".join(["ok", *b["flags"]])]
        else:
            cells = ["-", "-", "-", "-", b["reason"]]
        table.add_row(f"{b['budget']:.3g}", str(b["sizes"]), *cells)
    console.print(table)
    table = Table("law", "exponent", "95 % interval", "from", title="Exponents in compute")
    laws = result["power_laws"]
    if "refused" in laws:
        table.add_row("isoFLOP", "-", "-", laws["refused"])
    else:
        for name in "NDL":
            law = laws[name]
            table.add_row(
                f"{name}*(C)", f"{law['exponent']:.4f}", between(law["exponent_interval"]), f"{law['budgets']} budgets"
            )
    for name, fit in result["parametric"].items():
        if fit["status"] == "converged":
            table.add_row(
                f"N*, parametric, {name}", f"{fit['a']:.4f}", between(fit["intervals"].get("a")), f"{fit['runs']} runs"
            )
        else:
            table.add_row(f"N*, parametric, {name}", "-", "-", fit["refused"])
    console.print(table)
    table = Table("highest losses dropped", "runs", "isoFLOP", "Huber", "projection", title="Exponent of N* in compute")
    for line in result["sensitivity"]:
        values = [line[name] for name in ("isoflop", "huber", "projection")]
        table.add_row(
            str(line["highest_dropped"]), str(line["runs"]), *("-" if x is None else f"{x:.4f}" for x in values)
        )
    console.print(table)


@hydra.main(version_base="1.3", config_path="../configs", config_name="fit")
def main(config: DictConfig) -> None:
    try:
        c = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        result = fit_runs(
            read_runs(Path(c["runs"])),
            c["columns"],
            query=c["filter"],
            drop_highest=c["drop_highest"],
            sensitivity=tuple(c["sensitivity"]),
            budget_tolerance=c["budget_tolerance"],
            bootstrap=c["bootstrap"],
            seed=c["seed"],
        )
    except MissingMandatoryValue as error:
        sys.exit(f"error: {error.full_key or error} must be given, as {error.full_key or 'name'}=...")
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = Path(c["out"])
    write_json(out, result | {"command": shlex.join(["python", "-m", "experiments.fit", *sys.argv[1:]])})
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 150
    print_result(console, result)
    console.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
