"""Scaling laws from a table of runs, ours or anyone's: which rows count, which budgets they make, what fits them."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.harness.ledger import write_atomically
from experiments.scaling.isoflop import (
    Line,
    Minimum,
    find_minimum,
    fit_line,
    fit_saturating,
    interval,
    resample_minima,
)
from experiments.scaling.parametric import FitRefused, Surface, bootstrap, fit_huber, fit_projection

READERS = {
    ".csv": pd.read_csv,
    ".tsv": lambda path: pd.read_csv(path, sep="\t"),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
}
UNUSABLE = {"failed", "diverged", "crashed", "killed"}  # what a status column may say of a run that is not to be fitted
MIN_BUDGETS = 3
APART = 1.5  # factor between budgets that are found, not named
PINNED = (0.0, 0.25, 0.5, 0.75)  # assumed irreducible losses, as shares of the lowest loss


def read_runs(path: Path) -> pd.DataFrame:
    """A table of runs. Raises ValueError for a file that is absent, of another kind, or that cannot be read."""
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"runs={path}: the name must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"runs={path}: there is no such file")
    try:
        table = READERS[path.suffix](path)
    except Exception as error:  # pandas raises whatever its parsers raise
        raise ValueError(f"runs={path} cannot be read as {path.suffix}: {error}") from error
    if table.empty:
        raise ValueError(f"runs={path} has no rows")
    return table


def select_runs(
    table: pd.DataFrame, columns: dict[str, str | None], query: str | None = None, drop_highest: int = 0
) -> tuple[pd.DataFrame, list[dict], list[str]]:
    """The runs to be fitted, as columns flops, params, tokens, loss (and budget, where named); the rows refused, each
    with its number (the first row after the header is 1) and reason; the columns that were derived.

    Raises:
        ValueError: for an unknown column, fewer than two of flops, params and tokens, a filter that pandas cannot
            evaluate, or when no rows are left.
    """
    named = {name: column for name, column in columns.items() if column is not None}
    for name, column in named.items():
        if column not in table.columns:
            raise ValueError(
                f"columns.{name}={column!r} is no column of the table; it has {', '.join(map(repr, table.columns))}"
            )
    if "loss" not in named or len(named.keys() & {"flops", "params", "tokens"}) < 2:
        raise ValueError(
            "name the columns of the loss and of at least two of flops, params and tokens, as in columns.loss=... "
            f"columns.flops=... columns.params=...; the table has {', '.join(map(repr, table.columns))}"
        )
    table = table.set_axis(np.arange(1, len(table) + 1), axis=0)
    kept = table
    if query:
        try:
            kept = table.query(query)
        except Exception as error:  # pandas raises whatever Python and numexpr raise
            raise ValueError(f"filter={query!r} cannot be evaluated: {error}") from error
    numbers = [name for name in ("budget", "flops", "params", "tokens", "loss") if name in named]
    runs = pd.DataFrame(
        {name: pd.to_numeric(kept[named[name]], errors="coerce") for name in numbers}, kept.index
    ).astype(float)
    derived = []
    for name, rule in {
        "flops": "6 * params * tokens",
        "params": "flops / (6 * tokens)",
        "tokens": "flops / (6 * params)",
    }.items():
        if name not in named:
            runs[name] = runs.eval(rule)
            derived.append(f"{name} = {rule}")

    reasons = pd.Series(index=runs.index, dtype=object)
    status = named.get("status", "status" if "status" in kept.columns else None)
    if status:
        bad = kept[status].map(lambda value: str(value).lower() in UNUSABLE).astype(bool)
        reasons[bad] = [f"status is {value}" for value in kept[status][bad]]
    for name in numbers:
        bad = ~(np.isfinite(runs[name]) & (runs[name] > 0))
        bad &= reasons.isna()
        reasons[bad] = [f"{named[name]} is {value}, not a positive number" for value in kept[named[name]][bad]]
    good = runs[reasons.isna()]
    reasons[good.index[good.duplicated()]] = "duplicate of an earlier row"
    highest = runs[reasons.isna()].loss.nlargest(drop_highest).index
    reasons[highest] = f"among the {drop_highest} highest losses (drop_highest)"
    refused = [{"row": int(row), "reason": reason} for row, reason in reasons.dropna().items()]
    runs = runs[reasons.isna()]
    if runs.empty:
        raise ValueError(f"no rows are left of {len(table)}: {len(table) - len(kept)} filtered out, {len(refused)} refused"
                         + (f", the first because its {refused[0]['reason']}" if refused else ""))  # fmt: skip
    return runs, refused, derived


def group_budgets(flops: pd.Series, tolerance: float = 0.05, at_least: int = 5) -> pd.Series:
    """The budget of each run, NaN where it has none: the fullest window of +-`tolerance` in ln C is a budget, at its
    runs' geometric mean, then the fullest window of the rest, while they hold `at_least` runs. Budgets lie at least a
    factor `APART` from each other; runs that scatter between them belong to none."""
    log_c = np.log(flops).sort_values()
    budget = pd.Series(np.nan, flops.index)
    while len(log_c):
        ends = np.searchsorted(log_c.to_numpy(), log_c.to_numpy() + 2 * tolerance + 1e-12, side="right")
        first = int(np.argmax(ends - np.arange(len(log_c))))
        window = log_c.iloc[first : ends[first]]
        if len(window) < at_least:
            break
        budget[window.index] = np.exp(window.mean())
        log_c = log_c[(log_c - window.mean()).abs() >= np.log(APART)]
    return budget


def budget_minima(runs: pd.DataFrame) -> tuple[list[Minimum], list[float]]:
    """The minimum of each budget, and C / (N D) there: 6 where one of the three was derived, else interpolated in ln N
    from the runs (nan where the minimum is refused)."""
    minima, ratios = [], []
    for c, group in runs.groupby("budget"):
        minima.append(find_minimum(c, np.log(group.params), group.loss))
        group = group.sort_values("params")
        ratio = np.log(group.flops / (group.params * group.tokens))
        ratios.append(float(np.exp(np.interp(minima[-1].x, np.log(group.params), ratio))))
    return minima, ratios


def _law(line: Line, name: str) -> dict:
    coefficient = (line.at(0.0), *line.interval_at(0.0))
    return {
        "law": f"{name} = k C^exponent",
        "exponent": line.slope,
        "exponent_interval": list(line.slope_interval()),
        "k": float(np.exp(coefficient[0])),
        "k_interval": [float(np.exp(x)) for x in coefficient[1:]],
        "budgets": line.budgets,
    }


def fit_power_laws(minima: list[Minimum], ratios: list[float], draws: int, seed: int) -> dict:
    """N*(C), D*(C) and L*(C) through the accepted minima, or why there are none; `ratios` are C / (N D) at them."""
    ratio = np.array([r for m, r in zip(minima, ratios, strict=True) if not m.refused])
    ok = [m for m in minima if not m.refused]
    if len(ok) < MIN_BUDGETS:
        return {"refused": f"{len(ok)} accepted budgets of {len(minima)}, at least {MIN_BUDGETS} are needed"}
    c, x, loss = (np.array([getattr(m, name) for m in ok]) for name in ("budget", "x", "loss"))
    draws_x, draws_loss = resample_minima(ok, draws, seed)
    size, lowest = fit_line(c, x, draws_x), fit_line(c, np.log(loss), np.log(draws_loss))
    tokens = fit_line(c, np.log(c / ratio) - x, np.log(c / ratio) - draws_x)
    report = {
        "N": _law(size, "N*"),
        "D": _law(tokens, "D*"),
        "L": _law(lowest, "L*"),
        "akima_N_exponent": fit_line(c, np.array([m.akima_x for m in ok]), draws_x).slope,
        "intervals": "95 %: percentiles of resampled runs, or t(K-1) jackknife over the K budgets, the wider",
    }
    scale = np.exp(np.log(c).mean())
    if len(ok) >= 4:
        fits = np.array([fit_saturating(c, row) for row in draws_loss])
        left = np.array([fit_saturating(np.delete(c, i), np.delete(loss, i)) for i in range(len(c))])
        # K is per C0 to the -g, and a draw's C0 differs when a budget is left out: only E and g are comparable.
        e, k, g = fit_saturating(c, loss)
        report["L_saturating"] = {
            "law": "L* = E + K (C / C0)^-g", "E": e, "K": k, "g": g, "C0": float(scale),
            "E_interval": list(interval(e, fits[:, 0], left[:, 0])),
            "g_interval": list(interval(g, fits[:, 2], left[:, 2])),
            "at_bound": bool(e <= 0 or g >= 1.99),
        }  # fmt: skip
    pinned = []
    for share in PINNED:
        e = share * loss.min()
        line = fit_line(c, np.log(loss - e), np.log(np.maximum(draws_loss - e, 1e-3 * loss.min())))
        ahead = {f"{factor}x": float(e + np.exp(line.at(np.log(factor * c.max())))) for factor in (4, 16)}
        pinned.append(
            {
                "E": float(e),
                "g": -line.slope,
                "K": float(np.exp(line.at(np.log(scale)))),
                "C0": float(scale),
                "loss_beyond": ahead,
            }
        )
    report["L_pinned_E"] = pinned
    return report


def _start(s: Surface) -> np.ndarray:
    return np.array([[np.log(s.A), np.log(s.B), np.log(s.E), s.alpha, s.beta]])


def fit_parametric(runs: pd.DataFrame, draws: int, seed: int) -> dict:
    """L = E + A / N^alpha + B / D^beta by Huber on ln L and by variable projection, each with its intervals or the
    reason it was refused."""
    n, d, loss = (runs[name].to_numpy() for name in ("params", "tokens", "loss"))
    methods = {
        "huber": (fit_huber, lambda s: lambda w: fit_huber(n, d, loss, _start(s), w)),
        "projection": (fit_projection, lambda s: lambda w: fit_projection(n, d, loss, (s.alpha, s.beta), w)),
    }
    report = {}
    for name, (method, warm) in methods.items():
        try:
            surface = method(n, d, loss)
        except FitRefused as error:
            report[name] = {"status": error.kind, "refused": str(error), "runs": len(runs)}
            continue
        intervals = bootstrap(warm(surface), len(runs), draws, seed) if draws else {}
        report[name] = {"status": "converged", "runs": len(runs), **surface.as_dict(), "intervals": intervals}
    return report


def fit_runs(
    table: pd.DataFrame,
    columns: dict[str, str | None],
    query: str | None = None,
    drop_highest: int = 0,
    sensitivity: tuple[int, ...] = (0, 5),
    budget_tolerance: float = 0.05,
    bootstrap: int = 300,
    seed: int = 0,
) -> dict:
    """Everything that `python -m experiments.fit` writes, JSON-able. Raises ValueError as select_runs does."""
    runs, refused, derived = select_runs(table, columns, query, drop_highest)
    given = columns.get("budget") is not None
    if not given:
        runs["budget"] = group_budgets(runs.flops, budget_tolerance)
    minima, ratios = budget_minima(runs)
    table_of_drops = []
    for dropped in sensitivity:
        fewer = runs.drop(runs.loss.nlargest(dropped).index)
        parametric = fit_parametric(fewer, 0, seed)
        laws = fit_power_laws(*budget_minima(fewer), 50, seed)
        table_of_drops.append(
            {
                "highest_dropped": drop_highest + dropped,
                "runs": len(fewer),
                "isoflop": laws.get("N", {}).get("exponent"),
            }
            | {name: fit.get("a") for name, fit in parametric.items()}
        )
    over_6nd = runs.flops / (6 * runs.params * runs.tokens)
    return {
        "rows": {
            "read": len(table),
            "fitted": len(runs),
            "refused": len(refused),
            "in_no_budget": int(runs.budget.isna().sum()),
        },
        "columns": columns,
        "derived": derived,
        "flops_over_6nd": {"median": over_6nd.median(), "lowest": over_6nd.min(), "highest": over_6nd.max()},
        "grouping": f"column {columns['budget']}"
        if given
        else f"windows of +-{budget_tolerance:g} in ln FLOPs, at least 5 runs, a factor {APART} apart",
        "budgets": [describe_minimum(m, ratio) for m, ratio in zip(minima, ratios, strict=True)],
        "power_laws": fit_power_laws(minima, ratios, bootstrap, seed),
        "parametric": fit_parametric(runs, bootstrap, seed),
        "sensitivity": table_of_drops,
        "refused": refused,
        "settings": {"filter": query, "drop_highest": drop_highest, "bootstrap": bootstrap, "seed": seed},
        "versions": {name: version(name) for name in ("numpy", "scipy", "pandas")},
    }


def describe_minimum(m: Minimum, ratio: float) -> dict:
    report = {
        "budget": float(m.budget), "status": "refused" if m.refused else "ok", "reason": m.refused, "flags": m.flags,
        "sizes": m.sizes, "sizes_in_window": m.window_sizes,
    }  # fmt: skip
    if m.refused:
        return report
    n = float(np.exp(m.x))
    return report | {
        "n_opt": n, "tokens_opt": float(m.budget / (ratio * n)), "loss_opt": m.loss, "curvature": float(m.curvature),
        "methods": {
            "parabola": {"n_opt": n, "loss_opt": m.loss},
            "akima": {"n_opt": float(np.exp(m.akima_x)), "loss_opt": m.akima_loss},
        },
    }  # fmt: skip


def jsonable(x):
    """NumPy numbers as Python's, anything not finite as None."""
    if isinstance(x, dict):
        return {str(key): jsonable(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [jsonable(value) for value in x]
    if isinstance(x, (np.floating, np.integer, np.bool_)):
        x = x.item()
    return None if isinstance(x, float) and not np.isfinite(x) else x


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")
