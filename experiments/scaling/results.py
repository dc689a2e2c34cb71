"""The results of a sweep's analysis. `findings.write_json` writes any of them; a prediction is read back."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.findings import Estimate, Refused, Verdict
from experiments.scaling.design import BROKEN


@dataclass(frozen=True)
class Minimum:
    """The minimum of one budget's isoFLOP curve. `params` is None where the curve is too flat to say where it lies."""

    budget: float
    sizes: int
    flags: tuple[str, ...]
    params: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class RefusedMinimum:
    """A budget whose curve has no minimum among the sizes tried, and the reason."""

    budget: float
    sizes: int
    flags: tuple[str, ...]
    refused: str


@dataclass(frozen=True)
class Point:
    """bits_per_byte at x, which is FLOPs on a frontier and parameters on an isoFLOP curve."""

    x: float
    bits_per_byte: Estimate


@dataclass(frozen=True)
class IsoFlopCurve:
    """The surface at one budget over the sizes tried there."""

    budget: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Law:
    """An arm's part of the joint surface.

    centre_flops: the geometric mean of the sweep's budgets. slope: d ln(bits per byte) / d ln C of the frontier there.
    floor: E in bits per byte, which exact arms share; no_floor: it ended at nothing. alpha, beta: exponents of bits per
    byte less the floor in FLOPs per token and in tokens, each where it alone limits the loss. gamma: how soon one takes
    over from the other, which exact arms share: 1 where the two terms add up (Hoffmann et al.), less where losses of
    one budget rise more steeply to both sides of the optimum. size_exponent: of the optimal parameters in counted
    FLOPs; size_exponent_6nd: in 6ND, from the same runs. spread: standard deviation of ln(bits per byte) of runs about
    the surface; seed_spread: of runs that differ by their seed alone, None without such. frontier: from the smallest
    budget to the held-out one.
    """

    centre_flops: float
    bits_per_byte_at_centre: Estimate
    slope: Estimate
    floor: Estimate
    no_floor: bool
    alpha: Estimate
    beta: Estimate
    gamma: Estimate
    size_exponent: Estimate
    size_exponent_6nd: float | None
    spread: float
    seed_spread: float | None
    frontier: tuple[Point, ...]
    curves: tuple[IsoFlopCurve, ...]


@dataclass(frozen=True)
class TuningCurve:
    """The runs of one budget and size that differ by the learning rate, and where a parabola in its log is lowest.

    rates, bits_per_byte: of the finished runs, by rate. optimum: with what the runs' noise leaves open; None where the
    best rate is the lowest or the highest tried.
    """

    budget: float
    params: int
    rates: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    optimum: Estimate | None


@dataclass(frozen=True)
class Tuning:
    """The learning rate that an arm's tuning runs chose, and what they cost.

    learning_rate: at the optimiser's base width and base tokens. curvature: of ln(bits per byte) in the log of the
    rate, k of k (ln rate - ln optimum)^2; None without a minimum. excess: fraction of the loss that the error of the
    chosen rate may still cost (95 %), at the worst fitted budget.
    """

    learning_rate: float
    flops: float
    runs: int
    curves: tuple[TuningCurve, ...]
    curvature: float | None
    excess: float | None


@dataclass(frozen=True)
class BestRun:
    """The run of the lowest bits per byte at an arm's largest fitted budget, as its row in the ledger has it."""

    id: str
    budget_flops: float
    params_total: int
    bits_per_byte: float
    bits_per_byte_se: float | None
    tokens_per_second: float | None
    wall_seconds: float | None
    peak_memory_bytes: float | None
    state_bytes: float | None
    mfu: float | None


@dataclass(frozen=True)
class HeldOut:
    """The outcome at the held-out budget. `predicted` and `inside` are None where nothing was predicted."""

    budget: float
    bits_per_byte: float
    params: float
    how: str
    predicted: Estimate | None
    inside: bool | None


@dataclass(frozen=True)
class ArmResult:
    """All that is said of one arm. bound: its bits per byte are an upper bound, not exact. minima: budget by budget, by
    a parabola, beside the law. warnings: sentences, each with its consequence."""

    name: str
    bound: bool
    minima: tuple[Minimum | RefusedMinimum, ...]
    law: Law | Refused
    tuning: Tuning | None
    best: BestRun | None
    holdout: HeldOut | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """The bits per byte and optimal parameters expected of an arm at the held-out budget, from `runs` runs. It is the
    lowest loss that the surface has at that budget, and its interval that of the best run there."""

    bits_per_byte: Estimate
    params: float | None
    runs: int


@dataclass(frozen=True)
class FormScore:
    """A form of the surface, the root mean square error of ln(bits per byte) at the largest budget when it is fitted
    without that, None where it cannot be, and whether the prediction uses it."""

    form: str
    error: float | None
    used: bool


@dataclass(frozen=True)
class Prediction:
    """The forecasts for the held-out budget by arm, the time at which they were written, and the forms they are of."""

    written: str
    budget: float
    arms: dict[str, Forecast | Refused]
    forms: tuple[FormScore, ...]


@dataclass(frozen=True)
class PredictionRecord:
    """The outcome so far of predictions written before their runs, in all sweeps of its folder, this one included."""

    made: int
    inside: int


@dataclass(frozen=True)
class Multiplier:
    """The compute that the reference needs for an arm's bits per byte at `flops`, over these.

    extrapolated: the reference was not fitted anywhere near that compute.
    """

    flops: float
    estimate: Estimate
    extrapolated: bool


@dataclass(frozen=True)
class CostRatio:
    """The cost of the reference over that of the arm for the same bits per byte, each at its own optimum in that cost.

    cost: in words, with its unit. at: the arm's cost that is meant.
    """

    cost: str
    at: float
    estimate: Estimate


@dataclass(frozen=True)
class ErrorShares:
    """The uncertainty of ln(multiplier) at the centre by source: standard deviations, None where the ledger does not
    say. runs: seeds and what the surface misses. evaluation: other held-out text. bound: Monte
    Carlo."""

    runs: float
    learning_rate: float | None
    evaluation: float | None
    bound: float | None


@dataclass(frozen=True)
class Remedy:
    """A way to tell a multiplier of `target` from 1 with a power of 80 %.

    seeds: in all per cell, None where no number does. larger_budget_power: with one more budget, four times the
    largest, of as many sizes. flops: of the larger budget's runs, both arms.
    """

    target: float
    seeds: int | None
    larger_budget_power: float
    flops: float


@dataclass(frozen=True)
class Power:
    """The smallest multiplier that the design tells from 1 in 80 % of repetitions, and what smaller ones would take."""

    told_apart: float
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class PairedDifference:
    """Bits per byte of an arm's best run at the largest budget minus the reference's, on the same held-out bytes."""

    budget: float
    bits_per_byte: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference, from the joint surface.

    bounds: which of the two report an upper bound. centre: the multiplier at the geometric mean of the budgets, from
    which the verdict is read. multipliers: at every budget. trend: d ln(multiplier) / d ln C between the smallest and
    the largest budget; None where the reference's compute lies far outside its budgets. floor: E of the arm less that
    of the reference in bits per byte, when each has its own; None where the two likelihoods are of different kinds.
    p: probability that a difference as large comes of noise, for offset, trend and floor. costs: the same question in
    other costs. All but verdict, bounds and paired are None or empty where there is no surface.
    """

    arm: str
    reference: str
    bounds: tuple[str, ...]
    centre: Multiplier | None
    multipliers: tuple[Multiplier, ...]
    trend: Estimate | None
    floor: Estimate | None
    p: dict[str, float]
    costs: tuple[CostRatio, ...]
    shares: ErrorShares | None
    power: Power | None
    paired: PairedDifference | None
    verdict: Verdict


@dataclass(frozen=True)
class CellCounts:
    planned: int
    done: int
    diverged: int
    failed: int

    @property
    def missing(self) -> int:
        """Cells that no row stands for; a ledger may hold more rows than its plan has cells."""
        return max(0, self.planned - self.done - self.diverged - self.failed)


@dataclass(frozen=True)
class Analysis:
    """All that a sweep's report says: every arm, and each but the first, the reference, against it. loss: what their
    `bits_per_byte` are, in words."""

    loss: str
    reference: str
    arms: dict[str, ArmResult]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    cells: CellCounts
    record: PredictionRecord | None


def read_prediction(path: Path) -> Prediction:
    """The prediction that a sweep wrote before its held-out runs.

    Raises:
        ValueError: for a file that holds something else.
    """
    try:
        data = json.loads(path.read_text())
        arms = {name: _read_forecast(forecast) for name, forecast in data["arms"].items()}
        forms = tuple(FormScore(**form) for form in data["forms"])
        return Prediction(data["written"], data["budget"], arms, forms)
    except BROKEN as error:
        raise ValueError(f"{path} holds no prediction ({error!r}): put back the file that the sweep wrote") from error


def _read_forecast(data: dict) -> Forecast | Refused:
    if "refused" in data:
        return Refused(data["refused"])
    return Forecast(Estimate(**data["bits_per_byte"]), data["params"], data["runs"])
