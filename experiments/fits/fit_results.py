"""The results of fitting a table of runs, as `python -m experiments.fit` writes them."""

from dataclasses import dataclass
from typing import Literal

from experiments.findings import Estimate, Refused
from experiments.fits.forms import FORMS, Surface
from experiments.fits.parametric import Bootstrap
from experiments.fits.runs import Columns, RefusedRow


@dataclass(frozen=True)
class Settings:
    """The settings of a fit, beside the columns.

    Raises:
        ValueError: for a form that there is none of, or a number that means nothing.
    """

    form: str = "chinchilla"
    filter: str | None = None
    budget_tolerance: float = 0.05
    drop_highest: int = 0
    sensitivity: tuple[int, ...] = (0, 5)
    bootstrap: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is none of {', '.join(FORMS)}")
        counts = {"drop_highest": self.drop_highest, "bootstrap": self.bootstrap, "seed": self.seed}
        for name, count in [*counts.items(), *(("sensitivity", count) for count in self.sensitivity)]:
            if not isinstance(count, int) or count < 0:
                zero = " (0: no intervals)" if name == "bootstrap" else ""
                raise ValueError(f"{name}={count!r}: give a whole number that is not negative{zero}")
        if not isinstance(self.budget_tolerance, (int, float)) or not 0 < self.budget_tolerance < 0.5:
            raise ValueError(
                f"budget_tolerance={self.budget_tolerance!r}: give a number between 0 and 0.5, in ln FLOPs"
            )


@dataclass(frozen=True)
class Optimum:
    n_opt: float
    loss_opt: float


@dataclass(frozen=True)
class BudgetMinimum:
    """A budget's optimal size and tokens and their loss by the parabola, and beside it by the Akima spline.

    log_n_error: standard error of ln n_opt. weight: in the law of N*, of all budgets' weights. curvature: k of
    loss + k (ln N - ln n_opt)^2.
    """

    budget: float
    sizes: int
    sizes_in_window: int
    flags: tuple[str, ...]
    n_opt: float
    log_n_error: float
    tokens_opt: float
    loss_opt: float
    curvature: float
    akima: Optimum
    weight: float
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
    """`law` = k C^exponent, through `points` budgets or points of an envelope."""

    law: str
    exponent: Estimate
    k: Estimate
    points: int


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
    """Laws of the optimal size N*, tokens D* and lowest loss L* in compute. N_spline: N* by the Akima splines.
    L_saturating: None below four budgets. L_at_4x, L_at_16x: what to expect at 4 and 16 times the largest budget, with
    intervals that allow for irreducible losses."""

    N: PowerLaw
    N_spline: PowerLaw
    D: PowerLaw
    L: PowerLaw
    L_saturating: SaturatingLaw | None
    L_pinned_E: tuple[PinnedLaw, ...]
    L_at_4x: Estimate
    L_at_16x: Estimate


@dataclass(frozen=True)
class EnvelopeLaws:
    """Laws of the optimal size and tokens in compute from the envelope of learning curves, through `sizes` sizes."""

    N: PowerLaw
    D: PowerLaw
    sizes: int


@dataclass(frozen=True)
class SurfaceFit:
    """A form through all runs: its constants, what it is in N and D alone, and the exponents a of N* and b of D* in
    compute. at_bound: constants that ended at a bound that means something, such as E at 0."""

    runs: int
    constants: dict[str, float]
    surface: Surface
    a: float
    b: float
    objective: float
    at_bound: tuple[str, ...]
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
    """A form by Huber's loss on ln L and by least squares on L."""

    form: str
    formula: str
    huber: SurfaceFit | RefusedSurface
    squares: SurfaceFit | RefusedSurface


@dataclass(frozen=True)
class Sensitivity:
    """The exponents of N* in compute without the runs of the highest losses; None where a fit was refused."""

    highest_dropped: int
    runs: int
    isoflop: float | None
    huber: float | None
    squares: float | None


@dataclass(frozen=True)
class RowCounts:
    """Rows read, refused, left out by the filter or as earlier points of learning curves, and fitted."""

    read: int
    fitted: int
    refused: int
    left_out: int


@dataclass(frozen=True)
class Spread:
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class ArmFit:
    """All laws of one arm's runs; arm is "" where the table has none. disagreements: in words, the ways whose
    intervals of the exponent of N* do not meet. envelope: None without learning curves."""

    arm: str
    runs: int
    in_no_budget: int
    flops_over_6nd: Spread
    grouping: str
    budgets: tuple[BudgetMinimum | RefusedBudget, ...]
    power_laws: PowerLaws | Refused
    parametric: SurfaceFits
    envelope: EnvelopeLaws | Refused | None
    sensitivity: tuple[Sensitivity, ...]
    disagreements: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """Everything that `python -m experiments.fit` writes, beside its command."""

    rows: RowCounts
    columns: Columns
    derived: tuple[str, ...]
    arms: tuple[ArmFit, ...]
    refused: tuple[RefusedRow, ...]
    intervals: str
    settings: Settings
    versions: dict[str, str]
