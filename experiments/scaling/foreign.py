"""A table of anybody's runs as the ledger of a sweep, and the design that it implies."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.fits.runs import Columns, group_budgets, read_runs, select_runs
from experiments.harness import ledger
from experiments.scaling.design import Corpus, Design

OURS = {"bits_per_byte", "arm", "kind", "budget_flops", "tokens"}  # columns by which a sweep's ledger is known
FALLBACK = 4  # budgets that multipliers are given at, where runs lie on none


def read_rows(path: Path, columns: dict[str, str | None], bounds: list[str]) -> pd.DataFrame:
    """The rows of a file: a sweep's ledger as it is, another table as `rows_of` makes one of it.

    Raises:
        ValueError: as `read_runs` and `rows_of` do.
    """
    table = read_runs(path)
    if not set(table.columns) >= OURS:
        return rows_of(table, columns, bounds)
    return ledger.read(path) if path.suffix == ".jsonl" else table


def rows_of(table: pd.DataFrame, columns: dict[str, str | None], bounds: list[str]) -> pd.DataFrame:
    """A table of runs as rows of a sweep's ledger, each a fitted run.

    Raises:
        ValueError: for a table without the columns named, or without usable rows (see `select_runs`).
    """
    named = dict(columns)
    seed = named.pop("seed")
    if named["arm"] is None:
        raise ValueError("columns.arm must name the column that says which arm a run belongs to")
    if seed is not None and seed not in table.columns:
        raise ValueError(
            f"columns.seed={seed!r} is no column of the table; it has {', '.join(map(repr, table.columns))}"
        )
    runs = select_runs(table, Columns(**named)).runs
    if "budget" not in runs:
        budget = group_budgets(runs.flops)
        runs = runs.assign(budget=budget.fillna(runs.flops))
    rows = pd.DataFrame(None, range(len(runs)), ledger.COLUMNS, dtype=object)
    return rows.assign(
        id=runs.index.astype(str),
        status="done",
        kind="fit",
        arm=runs.arm.to_numpy(),
        budget_flops=runs.budget.to_numpy(),
        flops=runs.flops.to_numpy(),
        params_total=runs.params.to_numpy(),
        tokens=runs.tokens.to_numpy(),
        bits_per_byte=runs.loss.to_numpy(),
        bits_per_byte_kind=["bound" if name in bounds else "exact" for name in runs.arm],
        seed=0 if seed is None else table[seed].to_numpy()[runs.index - 1],
    )


def design_of(rows: pd.DataFrame, reference: str | None) -> Design:
    """The design that rows imply: arms in their order, the reference first, and the budgets that hold runs of more than
    one size, or four over the middle of the FLOPs where there are none.

    Raises:
        ValueError: for a reference that is no arm, or a table of one arm.
    """
    fitted = rows[(rows.kind == "fit") & (rows.status == "done")]
    arms = list(dict.fromkeys(fitted.arm))
    if reference is not None and reference not in arms:
        raise ValueError(f"ref={reference!r} is no arm of the table; it has {', '.join(map(repr, arms))}")
    if len(arms) < 2:
        raise ValueError(f"the table has the finished runs of {len(arms)} arms, {arms}: a comparison needs two")
    first = reference or arms[0]
    arms.sort(key=lambda arm: arm != first)
    sizes = fitted.groupby("budget_flops").params_total.nunique()
    budgets = tuple(float(budget) for budget in sizes.index[sizes > 1])
    if not budgets:
        low, high = np.quantile(fitted.flops.astype(float), [0.1, 0.9])
        budgets = tuple(float(c) for c in np.geomspace(low, high, FALLBACK))
    return Design(
        name="comparison",
        arms=tuple(arms),
        budgets=budgets,
        centre=float(np.log(budgets).mean()),
        holdout_budget=None,
        cells=len(rows),
        corpus=Corpus("", "", 0, 0),
        commands=(),
        holdout_cells={},
    )
