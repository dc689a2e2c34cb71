"""The results of a sweep's analysis. `findings.write_json` writes any of them; a prediction is read back."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.findings import Estimate, Refused, Verdict


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
class LawPoint:
    flops: float
    bits_per_byte: Estimate


@dataclass(frozen=True)
class Law:
    """Power laws in FLOPs through an arm's minima: bits per byte = k C^slope and N* = k C^size_exponent.

    centre_flops: the geometric mean of the sweep's budgets. size_exponent: None below three minima whose place is
    known. band: the law from the smallest budget to the held-out one.
    """

    centre_flops: float
    bits_per_byte_at_centre: Estimate
    slope: Estimate
    size_exponent: Estimate | None
    band: tuple[LawPoint, ...]


@dataclass(frozen=True)
class Tuning:
    """The learning rate that an arm's tuning runs chose, and what they cost."""

    learning_rate: float
    flops: float
    runs: int


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
    """All that is said of one arm. `bound`: its bits per byte are an upper bound, not exact."""

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
    """The bits per byte and optimal size expected of an arm at the held-out budget, from `budgets` minima."""

    bits_per_byte: Estimate
    params: float | None
    budgets: int


@dataclass(frozen=True)
class Prediction:
    """The forecasts for the held-out budget by arm, and the time at which they were written."""

    written: str
    budget: float
    arms: dict[str, Forecast | Refused]


@dataclass(frozen=True)
class Multiplier:
    """The compute that the reference needs for an arm's bits per byte at a budget, over that budget.

    extrapolated: the reference was not fitted anywhere near that compute.
    """

    budget: float
    estimate: Estimate
    extrapolated: bool


@dataclass(frozen=True)
class PairedDifference:
    """Bits per byte of an arm's best run at the largest budget minus the reference's, on the same held-out bytes."""

    budget: float
    bits_per_byte: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference, on the budgets for which both have a minimum.

    bounds: which of the two report an upper bound. slope_difference: None, and no multipliers, below three budgets.
    """

    arm: str
    reference: str
    budgets: tuple[float, ...]
    bounds: tuple[str, ...]
    multipliers: tuple[Multiplier, ...]
    slope_difference: Estimate | None
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
        return self.planned - self.done - self.diverged - self.failed


@dataclass(frozen=True)
class Analysis:
    """All that a sweep's report says: every arm, and each but the first, the reference, against it."""

    reference: str
    arms: dict[str, ArmResult]
    comparisons: tuple[Comparison, ...]
    cells: CellCounts


def read_prediction(path: Path) -> Prediction:
    """The prediction that a sweep wrote before its held-out runs.

    Raises:
        ValueError: for a file that holds something else.
    """
    try:
        data = json.loads(path.read_text())
        arms = {name: _read_forecast(forecast) for name, forecast in data["arms"].items()}
        return Prediction(data["written"], data["budget"], arms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no prediction ({error!r}): put back the file that the sweep wrote") from error


def _read_forecast(data: dict) -> Forecast | Refused:
    if "refused" in data:
        return Refused(data["refused"])
    return Forecast(Estimate(**data["bits_per_byte"]), data["params"], data["budgets"])
