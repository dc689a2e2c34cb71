"""A table of runs, ours or anyone's: read, the rows that count selected, and grouped into budgets."""

import ast
import re
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
TUNING = {"tune"}  # what a kind column may say of a run that tunes and is not to be fitted
COMPARING = (ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare)
COMPARING += (ast.cmpop, ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Load)
FLOPS_OVER_6ND = (0.1, 10.0)  # plausible medians of C / (6 N D), whatever is counted
TOKENS_PER_PARAMETER = (0.1, 1e5)  # plausible medians of D / N
SPREAD = 30.0  # plausible factor between the 5 % and the 95 % quantile of C / (6 N D)
APART = 1.3  # factor between budgets that are found, not named


@dataclass(frozen=True)
class Columns:
    """The table's columns by what they hold; None where it has none. Two of flops, params and tokens suffice.

    status, kind, arm: where None, the column of that name if there is one. arm: runs that one law is for. run: the
    learning curve that a row is a point of. total_params, unique_tokens: what a form needs beside params, which are
    then the active ones, and tokens.
    """

    flops: str | None = None
    params: str | None = None
    tokens: str | None = None
    loss: str | None = None
    budget: str | None = None
    status: str | None = None
    kind: str | None = None
    arm: str | None = None
    run: str | None = None
    total_params: str | None = None
    unique_tokens: str | None = None

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
    """Runs as columns flops, params, tokens, loss, arm and, where they were named, budget, total_params and
    unique_tokens; refused rows; derived columns. curves: where learning curves were named, all their points with a
    column run, of which the last of each is a run; else None."""

    runs: pd.DataFrame
    curves: pd.DataFrame | None
    refused: tuple[RefusedRow, ...]
    derived: tuple[str, ...]


def read_runs(path: Path) -> pd.DataFrame:
    """A table of runs. Raises ValueError for a file that is absent, of another kind, or that cannot be read."""
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"table {path}: the name must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"table {path}: there is no such file")
    try:
        table = READERS[path.suffix](path)
    except Exception as error:  # pandas raises whatever its parsers raise
        raise ValueError(f"table {path} cannot be read as {path.suffix}: {error}") from error
    if table.empty:
        raise ValueError(f"table {path} has no rows")
    return table


def select_runs(table: pd.DataFrame, columns: Columns, query: str | None = None, drop_highest: int = 0) -> Selection:
    """The runs to be fitted, in numbers; every other row with its reason; what had to be derived by C = 6 N D. Of each
    arm, the `drop_highest` highest losses are left out.

    Raises:
        ValueError: for an unknown column, fewer than two of flops, params and tokens, a filter that pandas cannot
            evaluate, when no rows are left, or when columns do not fit each other.
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
        check_filter(query)
        try:
            kept = table.query(query)
        except Exception as error:  # pandas raises whatever Python and numexpr raise
            raise ValueError(f"filter={query!r} cannot be evaluated: {error}") from error
    numbers = ["budget", "flops", "params", "tokens", "loss", "total_params", "unique_tokens"]
    numbers = [name for name in numbers if name in named]
    runs = pd.DataFrame(
        {name: pd.to_numeric(kept[named[name]], errors="coerce") for name in numbers}, kept.index
    ).astype(float)
    derived = []
    for name, rule in RULES.items():
        if name not in named:
            runs[name] = runs.eval(rule)
            derived.append(f"{name} = {rule}")
    arm = named.get("arm", "arm" if "arm" in kept.columns else None)
    runs["arm"] = kept[arm].astype(str) if arm else ""
    if columns.run:
        runs["run"] = kept[columns.run].astype(str)

    reasons = pd.Series(index=runs.index, dtype=object)
    for name, words in (("status", UNUSABLE), ("kind", TUNING)):
        column = named.get(name, name if name in kept.columns else None)
        if column:
            bad = kept[column].map(lambda value, words=words: str(value).lower() in words).astype(bool) & reasons.isna()
            reasons[bad] = [f"{column} is {value}" for value in kept[column][bad]]
    for name in numbers:
        bad = ~(np.isfinite(runs[name]) & (runs[name] > 0))
        bad &= reasons.isna()
        reasons[bad] = [f"{named[name]} is {value}, not a positive number" for value in kept[named[name]][bad]]
    good = runs[reasons.isna()]
    reasons[good.index[good.duplicated()]] = "duplicate of an earlier row"
    curves = runs[reasons.isna()] if columns.run else None
    last = runs[reasons.isna()] if curves is None else curves.loc[curves.groupby(["arm", "run"]).tokens.idxmax()]
    highest = [row for _, mine in last.groupby("arm") for row in mine.loss.nlargest(drop_highest).index]
    reasons[highest] = f"among the {drop_highest} highest losses (drop_highest)"
    bad = reasons.dropna()
    refused = tuple(map(RefusedRow, bad.index.tolist(), bad.tolist()))
    runs = last.drop(index=highest)
    if runs.empty:
        first = f", the first because its {refused[0].reason}" if refused else ""
        filtered = len(table) - len(kept)
        raise ValueError(f"no rows are left of {len(table)}: {filtered} filtered out, {len(refused)} refused{first}")
    _check_together(runs, columns)
    return Selection(runs.drop(columns="run", errors="ignore"), curves, refused, tuple(derived))


def check_filter(query: str) -> None:
    """Check that a filter compares columns and does nothing else, since pandas would call what it names.

    Raises:
        ValueError: for anything but names, constants, arithmetic, comparisons, `in`, and, or and not.
    """
    text = re.sub(r"`[^`]*`", "column", query)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"filter={query!r} cannot be evaluated: {error.msg}") from None
    for node in ast.walk(tree):
        if not isinstance(node, COMPARING):
            raise ValueError(
                f"filter={query!r} may compare columns with each other and with constants and join that by and, or and "
                f"not: {ast.unparse(node)!r} is something else"
            )


def _check_together(runs: pd.DataFrame, columns: Columns) -> None:
    """Refuse columns that cannot be what they are named as."""
    names = {name: column for name, column in columns.named().items() if name in RULES}
    words = " and ".join(f"columns.{name}={column!r}" for name, column in names.items())
    remedy = "check that none are swapped and that they are in FLOPs, parameters and tokens"
    ratio = runs.flops / (6 * runs.params * runs.tokens)
    for what, values, (low, high) in (
        ("FLOPs / (6 x parameters x tokens)", ratio, FLOPS_OVER_6ND),
        ("tokens per parameter", runs.tokens / runs.params, TOKENS_PER_PARAMETER),
    ):
        if not low <= values.median() <= high:
            raise ValueError(
                f"{words} do not fit together: the median of {what} is {values.median():.3g}, plausible is {low:g} to "
                f"{high:g}: {remedy}"
            )
    low, high = ratio.quantile([0.05, 0.95])
    if high > SPREAD * low:
        raise ValueError(
            f"{words} do not fit together: FLOPs / (6 x parameters x tokens) goes from {low:.3g} to {high:.3g} (5 % "
            f"and 95 % of the runs), plausible is a factor {SPREAD:g}: {remedy}"
        )
    if columns.total_params and (runs.total_params < 0.99 * runs.params).any():
        raise ValueError(
            f"columns.total_params={columns.total_params!r} is below columns.params={columns.params!r} in some runs: "
            "params are the active ones of all"
        )


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
