"""The results of fitting a table of runs, as `python -m experiments.fit` writes them."""

from dataclasses import dataclass
from typing import Literal

from experiments.findings import Estimate, Refused
from experiments.scaling.parametric import Bootstrap, Surface
from experiments.scaling.runs import Columns, RefusedRow


@dataclass(frozen=True)
class Optimum:
    n_opt: float
    loss_opt: float


@dataclass(frozen=True)
class BudgetMinimum:
    """A budget's optimal size and tokens and their loss by the parabola, and beside it by the Akima spline.

    curvature: k of loss + k (ln N - ln n_opt)^2.
    """

    budget: float
    sizes: int
    sizes_in_window: int
    flags: tuple[str, ...]
    n_opt: float
    tokens_opt: float
    loss_opt: float
    curvature: float
    akima: Optimum
    status: Literal["ok"] = "ok"


@dataclass(frozen=True)
class RefusedBudget:
    budget: float
    sizes: int
    sizes_in_window: int
    flags: tuple[str, ...]
    reason: str
    status: Literal["refused"] = "refused"


@dataclass(frozen=True)
class PowerLaw:
    """`law` = k C^exponent, through the minima of `budgets` budgets."""

    law: str
    exponent: Estimate
    k: Estimate
    budgets: int


@dataclass(frozen=True)
class SaturatingLaw:
    """`law` = E + K (C / C0)^-g. at_bound: the fit ended at E = 0 or at the largest g, and says little."""

    law: str
    E: Estimate
    K: float
    g: Estimate
    C0: float
    at_bound: bool


@dataclass(frozen=True)
class PinnedLaw:
    """L* = E + K (C / C0)^-g with a given E, and the loss that it expects beyond the largest budget."""

    E: float
    g: float
    K: float
    C0: float
    loss_at_4x: float
    loss_at_16x: float


@dataclass(frozen=True)
class PowerLaws:
    """Laws of the optimal size N*, tokens D* and lowest loss L* in compute. L_saturating: None below four budgets."""

    N: PowerLaw
    D: PowerLaw
    L: PowerLaw
    akima_N_exponent: float
    L_saturating: SaturatingLaw | None
    L_pinned_E: tuple[PinnedLaw, ...]
    intervals: str


@dataclass(frozen=True)
class SurfaceFit:
    """A surface through all runs, with the exponents a of N* and b of D* in compute."""

    runs: int
    surface: Surface
    a: float
    b: float
    bootstrap: Bootstrap | None
    status: Literal["converged"] = "converged"


@dataclass(frozen=True)
class RefusedSurface:
    """`status` is the kind of a `FitRefused`, `refused` its reason."""

    runs: int
    status: str
    refused: str


@dataclass(frozen=True)
class SurfaceFits:
    """L = E + A / N^alpha + B / D^beta by Huber's loss on ln L and by variable projection."""

    huber: SurfaceFit | RefusedSurface
    projection: SurfaceFit | RefusedSurface


@dataclass(frozen=True)
class Sensitivity:
    """The exponents of N* in compute without the runs of the highest losses; None where a fit was refused."""

    highest_dropped: int
    runs: int
    isoflop: float | None
    huber: float | None
    projection: float | None


@dataclass(frozen=True)
class RowCounts:
    read: int
    fitted: int
    refused: int
    in_no_budget: int


@dataclass(frozen=True)
class Spread:
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Settings:
    filter: str | None
    drop_highest: int
    bootstrap: int
    seed: int


@dataclass(frozen=True)
class Fit:
    """Everything that `python -m experiments.fit` writes, beside its command."""

    rows: RowCounts
    columns: Columns
    derived: tuple[str, ...]
    flops_over_6nd: Spread
    grouping: str
    budgets: tuple[BudgetMinimum | RefusedBudget, ...]
    power_laws: PowerLaws | Refused
    parametric: SurfaceFits
    sensitivity: tuple[Sensitivity, ...]
    refused: tuple[RefusedRow, ...]
    settings: Settings
    versions: dict[str, str]
