"""A table of runs, ours or anyone's: read, the rows that count selected, and grouped into budgets."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

READERS = {
    ".csv": pd.read_csv,
    ".tsv": lambda path: pd.read_csv(path, sep="\t"),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
}
UNUSABLE = {"failed", "diverged", "crashed", "killed"}  # what a status column may say of a run that is not to be fitted
RULES = {"flops": "6 * params * tokens", "params": "flops / (6 * tokens)", "tokens": "flops / (6 * params)"}
APART = 1.5  # factor between budgets that are found, not named


@dataclass(frozen=True)
class Columns:
    """The table's columns by what they hold; None where it has none. Two of flops, params and tokens suffice."""

    flops: str | None = None
    params: str | None = None
    tokens: str | None = None
    loss: str | None = None
    budget: str | None = None
    status: str | None = None

    def named(self) -> dict[str, str]:
        """Returns those that are not None, by what they hold."""
        return {name: column for name, column in asdict(self).items() if column is not None}


@dataclass(frozen=True)
class RefusedRow:
    """A row that is not fitted, and why. The first row after the header is number 1."""

    row: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """Runs as columns flops, params, tokens, loss and, where it was named, budget; refused rows; derived columns."""

    runs: pd.DataFrame
    refused: tuple[RefusedRow, ...]
    derived: tuple[str, ...]


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


def select_runs(table: pd.DataFrame, columns: Columns, query: str | None = None, drop_highest: int = 0) -> Selection:
    """The runs to be fitted, in numbers; every other row with its reason; what had to be derived by C = 6 N D.

    Raises:
        ValueError: for an unknown column, fewer than two of flops, params and tokens, a filter that pandas cannot
            evaluate, or when no rows are left.
    """
    named = columns.named()
    for name, column in named.items():
        if column not in table.columns:
            raise ValueError(
                f"columns.{name}={column!r} is no column of the table; it has {', '.join(map(repr, table.columns))}"
            )
    if "loss" not in named or len(named.keys() & RULES.keys()) < 2:
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
    for name, rule in RULES.items():
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
    bad = reasons.dropna()
    refused = tuple(map(RefusedRow, bad.index.tolist(), bad.tolist()))
    runs = runs[reasons.isna()]
    if runs.empty:
        first = f", the first because its {refused[0].reason}" if refused else ""
        filtered = len(table) - len(kept)
        raise ValueError(f"no rows are left of {len(table)}: {filtered} filtered out, {len(refused)} refused{first}")
    return Selection(runs, refused, tuple(derived))


def group_budgets(flops: pd.Series, tolerance: float = 0.05, at_least: int = 5) -> pd.Series:
    """The budget of each run, NaN where it has none: the fullest window of +-`tolerance` in ln C is a budget, at its
    runs' geometric mean, then the fullest window of the rest, while they hold `at_least` runs. Budgets lie at least a
    factor `APART` from each other; runs that scatter between them belong to none."""
    log_c = pd.Series(np.log(flops.to_numpy()), flops.index).sort_values()
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
