"""The findings of an experiment: numbers with their intervals, verdicts in words, and both as JSON."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from experiments.harness.files import write_atomically

QUANTILES = (0.025, 0.975)  # the ends of every interval: 95 %

StudyOutcome = Literal["holds", "does not hold", "cannot tell"]
ArmOutcome = Literal["better", "worse", "crosses over", "no difference at this scale", "cannot tell"]
OUTCOMES = tuple(dict.fromkeys((*get_args(StudyOutcome), *get_args(ArmOutcome))))


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval, in the number's own unit.

    Printed as "1.33 [0.96, 1.7]", each of the three by the format's specification, `.3g` where there is none.

    Raises:
        ValueError: when the ends are the wrong way round.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"an interval from {self.low} to {self.high} is the wrong way round: give low, then high")

    def __format__(self, specification: str) -> str:
        return f"{self.value:{specification or '.3g'}} {self.interval(specification)}"

    def __str__(self) -> str:
        return format(self)

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def interval(self, specification: str = "") -> str:
        """Returns the interval alone, as "[0.96, 1.7]"."""
        return f"[{self.low:{specification or '.3g'}}, {self.high:{specification or '.3g'}}]"

    @classmethod
    def of_draws(cls, value: float, draws: np.ndarray) -> "Estimate":
        """Returns the number with the 95 % interval of its draws, some of which may be infinite, moved only as far as
        needed to contain it."""
        low, high = np.quantile(draws, QUANTILES, method="inverted_cdf")
        return cls(value, min(float(low), value), max(float(high), value))

    @classmethod
    def of_mean(cls, values: ArrayLike) -> "Estimate":
        """Returns the mean of at least two values with its 95 % interval (Student's t)."""
        values = np.asarray(values, float)
        reach = float(stdtrit(values.size - 1, QUANTILES[1]) * values.std(ddof=1) / values.size**0.5)
        return cls(float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach)

    def map(self, increasing: Callable[[float], float]) -> "Estimate":
        """Returns the estimate of an increasing function of the number, such as its exponential."""
        return Estimate(*(float(increasing(x)) for x in (self.value, self.low, self.high)))


def number(x: float | Estimate | None, digits: int = 3) -> str:
    """A number to some significant digits, as 1.20, 12,345 or 2.4e11; a dash for None and for what is no number. An
    estimate stands before its interval, all three to two significant digits of the interval's width."""
    if isinstance(x, Estimate):
        return _with_interval(x)
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x and not 1e-4 <= abs(x) < 1e6:
        mantissa, _, exponent = f"{x:.{digits}g}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    elif abs(x) >= 10 ** (digits - 1):
        text = f"{x:,.0f}"
    else:
        text = f"{x:#.{digits}g}" if x else "0"
    return text.replace("-", "−", 1) if x < 0 else text


def _with_interval(x: Estimate) -> str:
    width = x.high - x.low
    if not 1e-6 < width < 1e4 or x.low > 0 and x.high > 10 * x.low:
        value, low, high = (number(end, 2) for end in (x.value, x.low, x.high))
    else:
        decimals = max(0, 1 - math.floor(math.log10(width)))
        value, low, high = (f"{end:.{decimals}f}".replace("-", "−") for end in (x.value, x.low, x.high))
    return f"{value} [{low}, {high}]"


def count(x: float) -> str:
    """A count to three digits with a letter, as 66.9k or 1.2M."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if x >= 0.9995 * 10**power:
            return f"{x / 10**power:.3g}{letter}"
    return f"{x:.0f}"


@dataclass(frozen=True)
class Refused:
    """The reason why there is no result, in the result's place."""

    refused: str


@dataclass(frozen=True)
class Verdict:
    """The answer to a question that was asked before the runs.

    outcome: for a study "holds", "does not hold" or "cannot tell"; for an arm against another "better", "worse",
        "crosses over", "no difference at this scale" or "cannot tell".
    sentence: the answer in plain words, with its numbers.
    effect: the number that the outcome was read from; None where there was not enough to estimate it.
    rule: how the outcome follows from the numbers, in words, written before the runs.

    Raises:
        ValueError: for any other outcome.
    """

    outcome: StudyOutcome | ArmOutcome
    sentence: str
    effect: Estimate | None
    rule: str

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} is none of {', '.join(map(repr, OUTCOMES))}")


def jsonable(x: Any) -> Any:
    """Returns `x` in JSON's types: a dataclass by its fields, NumPy numbers as Python's, NaN and infinity as None."""
    if is_dataclass(x) and not isinstance(x, type):
        return {field.name: jsonable(getattr(x, field.name)) for field in fields(x)}
    if isinstance(x, Mapping):
        return {str(key): jsonable(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [jsonable(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not np.isfinite(x) else x


def write_json(path: Path, content: Any) -> None:
    """Write what `jsonable` makes of `content`, whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")


def check_writable(path: Path) -> None:
    """Refuse a place that nothing can be written to, before there is anything to write.

    Raises:
        ValueError: for a folder, and below what is no folder or must not be written to.
    """
    if path.is_dir():
        raise ValueError(f"out={path} is a folder: give the name of a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        TemporaryFile(dir=above).close()
    except OSError as error:
        raise ValueError(f"out={path} cannot be written: {above}: {error.strerror}") from error
